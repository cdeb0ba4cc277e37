"""Whether our reading of a base's files gives PyTorch's numbers: measured before hours are spent on
it, once for the same files, in a process of its own on the CPU.

    python -m dnd_jax.base.reading FOLDER
"""

import contextlib
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping

import jax
import numpy as np

from dnd_jax.base.folder import load_base, load_tokenizer
from dnd_jax.base.greedy import pad_left
from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.hub import is_hub_id, resolve
from dnd_jax.base.identity import base_digest
from dnd_jax.base.names import lm_names, lm_table
from dnd_jax.base.torch_base import load_torch_base, torch
from dnd_jax.config.schema import Config
from dnd_jax.core import digests, packages
from dnd_jax.core.errors import CheckFailed, InputError, first_line, is_no_room
from dnd_jax.core.files import cache_folder, read_json, write_json
from dnd_jax.core.memory import free_memory
from dnd_jax.core.processes import finished, of_module
from dnd_jax.core.tensors import stored_tensors
from dnd_jax.parallel import hosts

# Largest difference of a logit that is rounding, as a share of the largest logit: both compute in
# float32 on the CPU. Small random bases differ by 1e-6, real ones by up to 1e-4.
BOUND = 1e-3
TEXTS = (
    "Which sea is the deepest, and who measured it first?",
    "Sort: 31, 4, 15, 9. The smallest comes first.",
)
RANDOM = (96, 17)  # tokens of rows that are drawn
# Bytes of memory a parameter: PyTorch's copy in float32, and what it is read from. JAX's comes
# after it.
NEEDED = 6
SECONDS = 1800  # that it may take
# Notes that stay, so that what ends so is not tried at every start.
NO_ROOM, SLOW = "no room in memory", f"not done in {SECONDS // 60} minutes"
BEGUN = "begun and not ended: another process is at it, or one died, perhaps for lack of memory"
# oneDNN would compute in fewer bits where these ask it to.
EXACT = dict.fromkeys(("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"), "STRICT")
OFF = "--config.evaluate.agreement=False goes on without the comparison"


def check_files(path: str | os.PathLike) -> None:
    """Raises CheckFailed where our reading of a base differs from PyTorch's by more than rounding,
    InputError for files that either cannot read. Where it cannot be measured it says a note."""
    found = comparison(path)
    if "note" in found:
        _say(f"note: {resolve(path)}: not compared with PyTorch's reading ({found['note']})")
    elif fault := difference(found):
        raise CheckFailed(f"{resolve(path)}: {fault}")


def comparison(path: str | os.PathLike) -> dict:
    """`measured` of a base: what is kept of the same files by this version, else measured now; only
    a "note" where that cannot be. Raises InputError for files that cannot be read."""
    folder = resolve(path)
    if not packages.is_installed("torch"):
        return {"note": f"PyTorch is not installed; {packages.how_to_install(['torch'])}"}
    load_base_config(folder)
    if note := _no_room(folder):  # before gigabytes are hashed
        return {"note": note}
    try:
        kept = _kept(folder)
    except importlib.metadata.PackageNotFoundError as error:
        return {"note": first_line(error)}
    found = _read(kept)
    if found is None:
        _say(f"{folder}: comparing with PyTorch's reading of these files, once")
        found = _measured_and_kept(folder, kept)
    elif "note" in found:
        found = {"note": f"{found['note']}; remove {kept} to try again"}
    return found


def check_reading(config: Config, path: str | os.PathLike) -> None:
    """`check_files` by process 0 of a base that the settings give, unless they turn it off: within
    `hosts.lead_first`, so that the others wait. One that dnd pretrained itself is its own
    writing."""
    if config.base.path and config.evaluate.agreement and hosts.lead():
        check_files(path)


def check_given(config: Config) -> None:
    """`check_reading` by process 0, before what does not read the base itself; where it is not on
    this machine, or cannot be read, that is no fault. Raises CheckFailed."""
    if not is_hub_id(config.base.path) and hosts.lead():
        try:
            check_reading(config, config.base.path)
        except InputError as error:
            _say(f"note: not compared with PyTorch's reading: {error}")


def difference(found: Mapping) -> str:
    """What is wrong with what `measured` found, in numbers; empty where it is rounding."""
    apart, largest = found["largest_logit_difference"], found["largest_logit"]
    if apart <= BOUND * max(1.0, largest):
        return ""
    return (
        f"dnd_jax reads it otherwise than PyTorch: logits are up to {apart:.3g} apart (the largest "
        f"is {largest:.3g}, rounding makes at most {BOUND * max(1.0, largest):.1g}), and "
        f"{found['same_tokens']} of {found['tokens']} next tokens are the same; please report it "
        f"with its config.json ({OFF})"
    )


def measured(folder: pathlib.Path) -> dict:
    """`compare` in a process of its own; only a "note" where it had no room, took too long or
    failed. Raises InputError for files that cannot be read."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} | EXACT
    command = of_module("dnd_jax.base.reading", str(folder))
    try:
        code, out, err = finished(command, environment, SECONDS)
    except TimeoutError:
        return {"note": SLOW}
    except OSError as error:
        return {"note": f"no process for it: {first_line(error)}"}
    if code == -9:  # the kernel's way of saying so
        return {"note": NO_ROOM}
    if code:
        lines = err.strip().splitlines() or [f"exit status {code}"]
        return {"note": lines[-1][:300]}
    found = json.loads(out.strip().splitlines()[-1])
    if "error" in found:
        raise InputError(found["error"])
    return found


def compare(folder: pathlib.Path) -> dict:
    """{"largest_logit_difference", "largest_logit", "tokens", "same_tokens"} of a few rows of
    tokens, in float32: PyTorch first, whose copy is gone when JAX reads the files."""
    rows = _rows(folder)
    ids, valid = pad_left(rows, 0)
    model = load_torch_base(folder)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(valid)}
    with torch.inference_mode():
        theirs = model(**given).logits.float().numpy()
    del model
    gc.collect()
    module, params = load_base(folder)
    apply = jax.jit(lambda params: module.apply({"params": params}, ids, valid_BxS=valid))
    ours, real = np.asarray(apply(params)), valid > 0
    ours, theirs = ours[real], theirs[real]
    return {
        "largest_logit_difference": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "tokens": len(ours),
        "same_tokens": int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
    }


def _say(text: str) -> None:
    print(text, flush=True)


def _rows(folder: pathlib.Path) -> list[list[int]]:
    """Texts in the base's own tokens, and tokens drawn from all that it has."""
    rng, vocabulary = np.random.default_rng(0), load_base_config(folder).vocab_size
    drawn = [rng.integers(0, vocabulary, n).tolist() for n in RANDOM]
    return load_tokenizer(folder)(list(TEXTS), add_special_tokens=False)["input_ids"] + drawn


def _kept(folder: pathlib.Path) -> pathlib.Path:
    """The file that keeps what was found, named by all that it depends on."""
    libraries = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    name = digests.of_json([base_digest(folder), digests.of_program(), *libraries])
    return cache_folder() / "reading" / f"{name}.json"


def _measured_and_kept(folder: pathlib.Path, kept: pathlib.Path) -> dict:
    """`measured`, kept in a file, which holds a note meanwhile: where memory is short, this process
    may be ended with its own."""
    with contextlib.suppress(InputError):  # a cache that cannot be written
        write_json(kept, {"note": BEGUN})
    found: dict = {}
    try:
        found = measured(folder)
    finally:
        with contextlib.suppress(InputError, OSError):
            if found and found.get("note", NO_ROOM).startswith((NO_ROOM, SLOW)):
                write_json(kept, found)
            else:  # stopped, or failed otherwise
                kept.unlink(missing_ok=True)
    return found


def _read(kept: pathlib.Path) -> dict | None:
    """What a file keeps, if it is whole."""
    try:
        found = read_json(kept)
        if "note" not in found:
            difference(found)
    except (InputError, TypeError, KeyError):
        return None
    return found


def _no_room(folder: pathlib.Path) -> str:
    """Why there is no room in memory; empty where there is, or where that cannot be seen."""
    config, stored = load_base_config(folder), stored_tensors(folder)
    wanted = {theirs for theirs, _, _ in lm_table(config)}
    used = [name for name, theirs in lm_names(stored, config).items() if theirs in wanted]
    count, free = sum(math.prod(stored[name].shape) for name in used), free_memory()
    if free is None or NEEDED * count < free:
        return ""
    return f"it needs {NEEDED * count / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"


def main(folder: str) -> None:
    """Prints what `compare` finds as one line of JSON, or the line that refuses the files."""
    try:
        found = compare(pathlib.Path(folder))
    except (InputError, RuntimeError, MemoryError) as error:
        if not is_no_room(error) and not isinstance(error, InputError):
            raise
        line = first_line(error)
        found = {"note": f"{NO_ROOM}: {line}"} if is_no_room(error) else {"error": line}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
