"""A generator's folder: written by training and by the import of released weights, read by generation and further training.

generator.json            settings, features, layout, adapter, encoder_fingerprint; written last: a folder with it is whole
model.safetensors         parameters by path, "decoder/stage_0/conv1w", ...
statistics.safetensors    importance weights (T,) and the statistics of the target
"""

import os
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from safetensors.numpy import save_file

from dnd_jax.errors import InputError, listed
from dnd_jax.files import read_json, replacing, write_json
from dnd_jax.models.weights import opened
from dnd_jax.tensor_file import write_tensors

DESCRIPTION, MODEL, STATISTICS = "generator.json", "model.safetensors", "statistics.safetensors"


def find_generator(run_dir: str | os.PathLike) -> pathlib.Path:
    """The generator folder that run_dir is, or that the workdir run_dir has. Raises InputError when there is none."""
    folder = pathlib.Path(run_dir)
    if not (folder / DESCRIPTION).is_file() and (folder / "generator" / DESCRIPTION).is_file():
        folder = folder / "generator"
    if not (folder / DESCRIPTION).is_file():
        raise InputError(
            f"{folder}: no {DESCRIPTION}, so no trained generator; give the folder that `dnd train` or `dnd import-generator` wrote"
        )
    return folder


def write_generator(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    params: Iterator[tuple[str, np.ndarray]],
    statistics: Mapping[str, np.ndarray],
    description: Mapping,
) -> None:
    """Writes the three files. params: (path, array) in the order of `shapes` {path: (shape, dtype)}, held one at a time."""
    with replacing(folder / MODEL) as temporary:
        write_tensors(temporary, shapes, params)
    with replacing(folder / STATISTICS) as temporary:
        save_file(dict(statistics), temporary)
    write_json(folder / DESCRIPTION, description)


def initial_params(run_dir: str | os.PathLike, shapes: Mapping, shardings: Mapping, settings: Mapping) -> dict:
    """The parameters of a generator folder, to go on training from, on `shardings`; a process reads only what its devices hold.

    shapes: those of the generator to train (nested, as its parameters); settings: its config.generator as a dictionary.
    Raises InputError listing every parameter that is missing, unknown or of another shape, and a target or length projection
    of another kind, which the shapes alone do not tell.
    """
    folder = find_generator(run_dir)
    stored = read_json(folder / DESCRIPTION)["settings"]["generator"]
    faults = [
        f"config.generator.{key} is {settings[key]!r}, there it is {stored[key]!r}"
        for key in ("target", "length_projection")
        if stored[key] != settings[key]
    ]
    with opened(folder / MODEL) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, not a dict
        wanted = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(shapes)}
        faults += [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
        faults += [f"{key} is unknown" for key in sorted(found.keys() - wanted.keys())]
        faults += [
            f"{key} has shape {found[key]}, here it is {shape}" for key, shape in wanted.items() if found.get(key, shape) != shape
        ]
        if faults:
            raise listed(f"config.train.init_from = {folder}: not a generator of this configuration", faults)

        def read(keys, leaf, sharding):
            part = file.get_slice("/".join(k.key for k in keys))
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: part[index].astype(leaf.dtype))

        return jax.tree_util.tree_map_with_path(read, shapes, shardings)
