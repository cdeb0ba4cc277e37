"""A generator's folder: written by training and by the import of released weights, read by
generation and further training.

generator.json            settings, what it was taught by (the digest of LoRA checkpoints; of the
                          base that was asked, and how), features, layout, adapter,
                          encoder_fingerprint; removed first and written last: a folder with it is
                          whole
model.safetensors         parameters by path, "decoder/stage_0/conv1w", ...
statistics.safetensors    importance weights (T,), the statistics of the target, and the training
                          tasks' mean embeddings (D, C)
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from safetensors import safe_open

from dnd_jax.base.hub import is_repo_id, resolve
from dnd_jax.config import schema, validate
from dnd_jax.config.choices import PRECISIONS
from dnd_jax.config.schema import Features
from dnd_jax.config.training import FEWEST
from dnd_jax.core.errors import InputError, first_line, listed
from dnd_jax.core.files import as_json, replacing, sync
from dnd_jax.core.formats import FORMAT as KEY
from dnd_jax.core.formats import read_numbered
from dnd_jax.core.packages import PACKAGE
from dnd_jax.core.tensors import (
    DTYPES,
    opened,
    read_safetensors,
    write_safetensors,
    write_tensors,
)
from dnd_jax.generator.nearest import TrainedTasks, tasks_of
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.lora import targets
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.lora.targets import token_grid

FORMAT = 1  # of generator.json
LARGEST = 1 << 20  # N, L or C of a stage
# Keys of generator.json beside its settings: generator/objective.py.
TAUGHT_BY = ("checkpoints", "base", "answer", "max_length", "lora", "spread")
DESCRIPTION, MODEL, STATISTICS = "generator.json", "model.safetensors", "statistics.safetensors"
FILES = (DESCRIPTION, MODEL, STATISTICS)
PACKAGED = {f"{PACKAGE}skills": pathlib.Path(__file__).with_name("packaged") / "skills"}
TASK_MEANS = "task_means"  # of the statistics: `TrainedTasks.means`


def find_generator(run_dir: str | os.PathLike) -> pathlib.Path:
    """The generator folder that run_dir is, or that the workdir run_dir has; of "package:skills"
    the one that comes with dnd_jax, of "package:NAME/REST" the one in an installed package, of
    USER/NAME, if there is no such folder here, the hub's. Raises InputError when there is none."""
    name, folder = os.fspath(run_dir), pathlib.Path(run_dir)
    if name in PACKAGED:
        folder = PACKAGED[name]
    elif name.startswith(PACKAGE) or (is_repo_id(name) and not folder.exists()):
        folder = resolve(name, FILES)
    if not (folder / DESCRIPTION).is_file() and (folder / "generator" / DESCRIPTION).is_file():
        folder = folder / "generator"
    if not (folder / DESCRIPTION).is_file():
        raise InputError(
            f"{folder}: no {DESCRIPTION}, so no trained generator; give the folder that `dnd "
            "train` or `dnd import-generator` wrote"
        )
    return folder


@dataclasses.dataclass(frozen=True)
class Description:
    """What generator.json says."""

    settings: dict  # as they were recorded, of any version
    seed: int
    condition: schema.Condition
    generator: schema.Generator
    dtype: str  # of the computation
    precision: str  # of products of float32
    features: tuple[Features, ...]  # (N, L, C) of each stage, no zeros
    layout: LoraLayout
    adapter: AdapterConfig
    encoder_fingerprint: str
    encoder_revision: str  # the commit of an encoder from the hub
    task_names: tuple[str, ...] = ()  # of the training tasks, where it says so
    task_distances: dict = dataclasses.field(default_factory=dict)  # of `TrainedTasks`

    @property
    def spec(self) -> DecoderSpec:
        """The decoder that the parameters are of."""
        how = {"features": self.features, "precision": self.precision}
        return DecoderSpec.of(self.generator, self.condition, self.dtype, **how)

    @property
    def fewest(self) -> int:
        """How few prompts it takes: fewer than N only where training met so few."""
        few, n = self.settings["train"].get("few_prompts"), self.condition.num_prompts
        return min(FEWEST, n) if few else n

    def tasks(self, statistics: Mapping[str, np.ndarray]) -> TrainedTasks | None:
        """The training tasks, where the folder says what they are."""
        if not self.task_names:
            return None
        return TrainedTasks(self.task_names, statistics[TASK_MEANS], **self.task_distances)


def _precision(train: Mapping) -> str:
    """Of a record of any version. Raises ValueError for one that is none."""
    found = train.get("precision", PRECISIONS[0])
    if found not in PRECISIONS:
        raise ValueError(f"train.precision {found!r} is none of {', '.join(PRECISIONS)}")
    return found


def read_record(folder: pathlib.Path) -> dict:
    """The recorded settings of a generator folder, of any version; as "encoder" the encoder's
    fingerprint, and what it was taught by (`TAUGHT_BY`), as far as it says. Raises InputError when
    its description has none."""
    file = folder / DESCRIPTION
    raw = _sections(file, read_numbered(file, FORMAT), "settings")
    digests = {"encoder": raw.get("encoder_fingerprint")}
    digests |= {key: raw.get(key) for key in TAUGHT_BY}
    return raw["settings"] | {key: value for key, value in digests.items() if value is not None}


def read_description(folder: pathlib.Path) -> Description:
    """The description of a generator folder, checked. Raises InputError naming the file and what it
    lacks or has too much."""
    file = folder / DESCRIPTION
    raw = _sections(file, read_numbered(file, FORMAT), "settings", "layout", "adapter")
    try:
        settings = _sections(file, raw["settings"], "condition", "generator", "train")
        # At first, form and layer were not recorded.
        condition = {"form": "prompt", "layer": -1, **settings["condition"]}
        description = Description(
            settings=settings,
            seed=int(settings["seed"]),
            condition=validate.section(schema.Condition, condition, "condition"),
            generator=validate.section(schema.Generator, settings["generator"], "generator"),
            dtype=str(np.dtype(settings["train"]["dtype"])),
            precision=_precision(settings["train"]),
            features=_features(raw["features"]),
            layout=LoraLayout.from_json(raw["layout"]),
            adapter=validate.section(AdapterConfig, raw["adapter"], "adapter"),
            encoder_fingerprint=str(raw["encoder_fingerprint"]),
            encoder_revision=str(raw.get("encoder_revision", "")),
            **tasks_of(raw.get("tasks")),
        )
        grid = token_grid(description.generator.target, description.layout)
        if description.features[-1] != grid:
            raise ValueError(f"features end with {description.features[-1]}, the layout has {grid}")
        return description
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InputError(
            f"{file}: not a generator of this version ({why}); train or import it again"
        ) from None


def _features(raw: object) -> tuple[Features, ...]:
    """(N, L, C) of each stage. Raises ValueError for what cannot be."""
    sizes = tuple(tuple(stage) for stage in raw)
    right = [
        len(stage) == 3 and all(type(n) is int and 0 < n <= LARGEST for n in stage)
        for stage in sizes
    ]
    if len(sizes) < 2 or not all(right):
        raise ValueError("features are not two or more triples of sizes")
    return sizes


def _sections(file: pathlib.Path, raw: object, *names: str) -> dict:
    """A JSON value that has these sections, themselves objects."""
    if not isinstance(raw, dict) or not all(isinstance(raw.get(name), dict) for name in names):
        raise InputError(
            f"{file}: no {', '.join(names)} in it, so not a generator's description; copy the "
            "folder or train again"
        )
    return raw


def write_generator(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    params: Iterator[tuple[str, np.ndarray]],
    statistics: Mapping[str, np.ndarray],
    description: Mapping,
) -> None:
    """Writes the three files, or leaves those that are there. params: (path, array) in the order of
    `shapes` {path: (shape, dtype)}, held one at a time.

    The old description goes before the first of the new files takes its place, and the new one
    comes last: killed between, the folder has none, and is no generator.
    """
    with (
        replacing(folder / DESCRIPTION) as described,
        replacing(folder / STATISTICS) as its_statistics,
        replacing(folder / MODEL) as model,
    ):
        write_tensors(model, shapes, params)
        write_safetensors(its_statistics, statistics)
        described.write_text(as_json({KEY: FORMAT, **description}), encoding="utf-8")
        sync(model)  # here, not while there is no description
        (folder / DESCRIPTION).unlink(missing_ok=True)
        sync(folder)
    # The blocks end from the last to the first: model, statistics, description.


@contextlib.contextmanager
def steady(folder: pathlib.Path) -> Iterator[None]:
    """A block that reads several files of a generator. Raises InputError when they were replaced
    meanwhile, so that they may be of two generators."""

    def written() -> tuple[int, int] | None:
        try:
            stat = (folder / DESCRIPTION).stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    before = written()
    replaced = InputError(f"{folder}: was replaced while it was read; run the same command again")
    try:
        yield
    except InputError:
        if written() != before:
            raise replaced from None
        raise
    if written() != before:
        raise replaced


def initial_params(
    run_dir: str | os.PathLike, shapes: Mapping, shardings: Mapping, settings: Mapping
) -> dict:
    """The parameters of a generator folder, to go on training from, on `shardings`; a process reads
    only what its devices hold.

    shapes: those of the generator to train (nested, as its parameters); settings: its
    config.generator as a dictionary. Raises InputError listing every parameter that is missing,
    unknown or of another shape, and a target or length projection of another kind, which the shapes
    alone do not tell.
    """
    folder = find_generator(run_dir)
    with steady(folder):
        return _read_params(folder, shapes, shardings, settings)


def _read_params(
    folder: pathlib.Path, shapes: Mapping, shardings: Mapping, settings: Mapping
) -> dict:
    stored = dataclasses.asdict(read_description(folder).generator)
    faults = [
        f"config.generator.{key} is {settings[key]!r}, there it is {stored[key]!r}"
        for key in ("target", "length_projection")
        if stored[key] != settings[key]
    ]
    with opened(folder / MODEL) as file:
        faults += _parameter_faults(file, shapes)
        if faults:
            raise listed(
                f"config.train.init_from = {folder}: not a generator of this configuration", faults
            )

        def read(keys, leaf, sharding):
            part = file.get_slice("/".join(k.key for k in keys))
            return jax.make_array_from_callback(
                leaf.shape, sharding, lambda index: part[index].astype(leaf.dtype)
            )

        return jax.tree_util.tree_map_with_path(read, shapes, shardings)


def check_parameters(folder: pathlib.Path, shapes: Mapping) -> None:
    """Raises InputError listing the parameters of a generator folder that are missing, unknown or
    of another shape or kind than `shapes` (nested, as the parameters of its description)."""
    with opened(folder / MODEL) as file:
        faults = _parameter_faults(file, shapes)
    if faults:
        raise listed(f"{folder / MODEL}: not what {DESCRIPTION} describes; copy the folder", faults)


def _parameter_faults(file: safe_open, shapes: Mapping) -> list[str]:
    """What is wrong with the parameters of a file, by its header alone."""
    stored = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, not a dict
    found = {key: tuple(part.get_shape()) for key, part in stored.items()}
    wanted = {
        "/".join(k.key for k in keys): leaf.shape
        for keys, leaf in jax.tree.leaves_with_path(shapes)
    }
    faults = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
    faults += [f"{key} is unknown" for key in sorted(found.keys() - wanted.keys())]
    faults += [
        f"{key} has shape {found[key]}, here it is {shape}"
        for key, shape in wanted.items()
        if found.get(key, shape) != shape
    ]
    kinds = {key: part.get_dtype() for key, part in stored.items()}
    return faults + [f"{key} holds {kind}" for key, kind in kinds.items() if kind not in DTYPES]


def read_statistics(folder: pathlib.Path, description: Description) -> dict[str, np.ndarray]:
    """The importance weights (T,) and the statistics of the target. Raises InputError naming what
    the file lacks, or has in another shape."""
    path, grid = folder / STATISTICS, description.spec.token_grid
    wanted = {"importance": grid[:1]}
    if description.generator.target == "element":
        wanted |= {"mean": grid, "scale": grid[:1]}
    if description.task_names:
        wanted[TASK_MEANS] = len(description.task_names), description.features[0][2]
    found = read_safetensors(path)
    shapes = {key: value.shape for key, value in found.items() if value.dtype in DTYPES.values()}
    wrong = [
        f"{key} {shapes.get(key)}, not {of}" for key, of in wanted.items() if shapes.get(key) != of
    ]
    if wrong:
        raise listed(f"{path}: not of this generator; copy the folder again", wrong)
    return found


def read_target(run_dir: str | os.PathLike) -> tuple[targets.Target, AdapterConfig]:
    """(what the tokens of a generator mean, the settings of its adapters). Raises InputError as
    `read_description` and `read_statistics`."""
    folder = find_generator(run_dir)
    with steady(folder):
        description = read_description(folder)
        statistics = read_statistics(folder, description)
    kind, layout = description.generator.target, description.layout
    return targets.from_statistics(kind, layout, statistics), description.adapter
