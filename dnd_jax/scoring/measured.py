"""What is measured when all is scored and reported, with our own base in JAX: how well it agrees
with PyTorch's, and what generating an adapter costs against tuning one.

Neither changes a score, and neither may keep one from being written: a base for which there is no
room, or that only PyTorch runs, leaves a note in the report. What was measured is kept beside the
scores; what failed is tried again only by `dnd evaluate --remeasure`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dnd_jax.base.agreement import Asked, agreement
from dnd_jax.base.architecture import BaseLM
from dnd_jax.base.hf_config import load_base_config, read_config
from dnd_jax.base.hub import resolve
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.schema import Config
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError, first_line, is_no_room
from dnd_jax.core.files import read_json, write_json
from dnd_jax.core.workdir import held, timed
from dnd_jax.data.suite import Suite
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.peft_settings import load_adapter_config
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.rules import shapes_of
from dnd_jax.scoring.generate_vs_tune import measure_overhead

AGAIN = "`dnd evaluate --remeasure` tries again"
BEGUN = f"Not measured: the process ended meanwhile, perhaps for lack of memory; {AGAIN}."
NO_ROOM = (
    f"Not measured, because there was no room for it ({{}}); {AGAIN}, on other devices or with "
    "mesh.fsdp."
)
NOT_RUN = "Not measured, because only PyTorch runs this base. {}"
FAILED = f"Not measured: {{}}; {AGAIN}."
SERVED = (
    "Not measured, because a server scored: `dnd verify-adapter --server` compares it with PyTorch."
)
OFF = "Not measured: evaluate.{} is off."
TIMED = 100  # steps of tuning that are timed
LARGE = 2**30  # parameters of a base that is run in the type it is stored in, not in float32


def measure(
    config: Config,
    suite: Suite,
    base_path: str,
    workdir: pathlib.Path,
    names: tuple[str, ...] = ("agreement", "overhead"),
    again: bool = False,
) -> dict[str, dict]:
    """{"agreement", "overhead", "seconds"} of a scored run, of these names; a measurement that is
    switched off or failed is only a "note". seconds: of its stages, as they are then. again: what
    failed is tried anew."""
    with held(workdir, "evaluate"):
        return _measure(config, suite, base_path, workdir, names, again)


def _measure(
    config: Config,
    suite: Suite,
    base_path: str,
    workdir: pathlib.Path,
    names: tuple[str, ...],
    again: bool,
) -> dict[str, dict]:
    """`measure`, in a folder that this process has."""
    path = workdir / paths.EVALUATION
    stored = read_json(path)
    result = stored["result"]
    found: dict[str, dict] = {}
    for name in names:
        failed = result.get(name, {}).keys() == {"note"}
        if name in result and not (failed and again):
            found[name] = result[name]
        elif not getattr(config.evaluate, name):
            found[name] = {"note": OFF.format(name)}
        elif name == "agreement" and config.evaluate.engine:
            found[name] = {"note": SERVED}
        else:
            # What stays if the machine kills this process for memory.
            result[name] = {"note": BEGUN}
            write_json(path, stored)
            try:
                with timed(workdir, "measure"):
                    found[name] = _found(MEASURES[name], config, suite, base_path, workdir)
                result[name] = found[name]
            except BaseException:  # stopped: the same command goes on with it
                del result[name]
                raise
            finally:
                write_json(path, stored)
    return found | {"seconds": read_json(workdir / paths.SECONDS)}


def _found(
    measurement: Callable[..., dict], config: Config, suite: Suite, base_path, workdir
) -> dict:
    """What it measures, or a note that says why it does not."""
    try:
        load_base_config(base_path)
    except InputError as error:
        return {"note": NOT_RUN.format(error)}
    try:
        return measurement(config, suite, base_path, workdir)
    except (InputError, RuntimeError, MemoryError) as error:
        if is_no_room(error):
            return {"note": NO_ROOM.format(first_line(error))}
        if isinstance(error, InputError):
            return {"note": FAILED.format(error)}
        raise


def _agreement(config: Config, suite: Suite, base_path, workdir: pathlib.Path) -> dict:
    """Of the first generated adapter of each unseen dataset."""
    # In float32, whatever the scores are in: JAX is compared.
    base = TorchBase.of(base_path, dataclasses.replace(config.evaluate, dtype="float32"))

    def asked(dataset) -> Asked:
        folder = workdir / paths.ADAPTERS / dataset.name
        scale = load_adapter_config(folder).scale
        return Asked(folder, load_adapter(folder), scale, dataset.test)

    unseen = tqdm(suite.unseen, desc="compare with JAX", unit="dataset", dynamic_ncols=True)
    return agreement(
        base, map(asked, unseen), config.evaluate.batch_size, **_base_in_jax(config, base_path)
    )


def _overhead(config: Config, suite: Suite, base_path, workdir: pathlib.Path) -> dict:
    return measure_overhead(
        config, suite, workdir, base_path, TIMED, **_base_in_jax(config, base_path)
    )


MEASURES: Mapping[str, Callable[..., dict]] = {"agreement": _agreement, "overhead": _overhead}


def _base_in_jax(config: Config, base_path) -> dict[str, Any]:
    """Where and in which type our own base is loaded: on the mesh, in float32, a large one as it is
    stored."""
    module = BaseLM(load_base_config(base_path))
    shapes = shapes_of(module.init, np.zeros((1, 2), np.int32))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    raw = read_config(resolve(base_path, ("config.json",)))[1]
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    kept = size > LARGE and stored in ("bfloat16", "float16")
    return {"mesh": make_mesh(config.mesh), "dtype": jnp.dtype(stored if kept else "float32")}
