"""A generator's folder: written by training and by the import of released weights, read by
generation and further training.

generator.json            settings, checkpoints (digest of the LoRAs it was trained on), features,
layout, adapter,
                          encoder_fingerprint; written last: a folder with it is whole
model.safetensors         parameters by path, "decoder/stage_0/conv1w", ...
statistics.safetensors    importance weights (T,) and the statistics of the target
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from dnd_jax.config import schema, validate
from dnd_jax.config.schema import Features
from dnd_jax.core.errors import InputError, first_line, listed
from dnd_jax.core.files import replacing
from dnd_jax.core.formats import read_numbered, write_numbered
from dnd_jax.core.tensors import opened, write_safetensors, write_tensors
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.peft_settings import AdapterConfig

FORMAT = 1  # of generator.json
DESCRIPTION, MODEL, STATISTICS = "generator.json", "model.safetensors", "statistics.safetensors"


def find_generator(run_dir: str | os.PathLike) -> pathlib.Path:
    """The generator folder that run_dir is, or that the workdir run_dir has. Raises InputError when
    there is none."""
    folder = pathlib.Path(run_dir)
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
    features: tuple[Features, ...]  # (N, L, C) of each stage, no zeros
    layout: LoraLayout
    adapter: AdapterConfig
    encoder_fingerprint: str
    encoder_revision: str  # the commit of an encoder from the hub

    @property
    def spec(self) -> DecoderSpec:
        """The decoder that the parameters are of."""
        return DecoderSpec.of(self.generator, self.condition, self.dtype, features=self.features)


def read_record(folder: pathlib.Path) -> dict:
    """The recorded settings of a generator folder, of any version; as "encoder" the encoder's
    fingerprint, and as "checkpoints" the digest of its LoRAs where there is one. Raises InputError
    when its description has none."""
    file = folder / DESCRIPTION
    raw = _sections(file, read_numbered(file, FORMAT), "settings")
    digests = {"encoder": raw.get("encoder_fingerprint"), "checkpoints": raw.get("checkpoints")}
    return raw["settings"] | {key: value for key, value in digests.items() if value is not None}


def read_description(folder: pathlib.Path) -> Description:
    """The description of a generator folder, checked. Raises InputError naming the file and what it
    lacks or has too much."""
    file = folder / DESCRIPTION
    raw = _sections(file, read_numbered(file, FORMAT), "settings", "layout", "adapter")
    try:
        settings = _sections(file, raw["settings"], "condition", "generator", "train")
        condition = {
            "form": "prompt",
            "layer": -1,
            **settings["condition"],
        }  # recorded without them at first
        return Description(
            settings=settings,
            seed=int(settings["seed"]),
            condition=validate.section(schema.Condition, condition, "condition"),
            generator=validate.section(schema.Generator, settings["generator"], "generator"),
            dtype=str(np.dtype(settings["train"]["dtype"])),
            features=tuple((int(n), int(length), int(c)) for n, length, c in raw["features"]),
            layout=LoraLayout.from_json(raw["layout"]),
            adapter=validate.section(AdapterConfig, raw["adapter"], "adapter"),
            encoder_fingerprint=str(raw["encoder_fingerprint"]),
            encoder_revision=str(raw.get("encoder_revision", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InputError(
            f"{file}: not a generator of this version ({why}); train or import it again"
        ) from None


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
    """Writes the three files. params: (path, array) in the order of `shapes` {path: (shape,
    dtype)}, held one at a time."""
    with replacing(folder / MODEL) as temporary:
        write_tensors(temporary, shapes, params)
    with replacing(folder / STATISTICS) as temporary:
        write_safetensors(temporary, statistics)
    write_numbered(folder / DESCRIPTION, FORMAT, description)


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
    stored = dataclasses.asdict(read_description(folder).generator)
    faults = [
        f"config.generator.{key} is {settings[key]!r}, there it is {stored[key]!r}"
        for key in ("target", "length_projection")
        if stored[key] != settings[key]
    ]
    with opened(folder / MODEL) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, not a dict
        wanted = {
            "/".join(k.key for k in keys): leaf.shape
            for keys, leaf in jax.tree.leaves_with_path(shapes)
        }
        faults += [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
        faults += [f"{key} is unknown" for key in sorted(found.keys() - wanted.keys())]
        faults += [
            f"{key} has shape {found[key]}, here it is {shape}"
            for key, shape in wanted.items()
            if found.get(key, shape) != shape
        ]
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
