"""Stage `export-generator`: a generator folder -> the original's .pth, bit for bit.

dnd export-generator DIR --out=X.pth
"""

import os
import pathlib

from flax import traverse_util

from dnd_jax.core.errors import InputError
from dnd_jax.core.stage import NONE, OUT, Given, Stage
from dnd_jax.core.tensors import open_tensors, read_safetensors
from dnd_jax.generator.folder import MODEL, STATISTICS, find_generator, read_description, steady
from dnd_jax.generator.model import Generator
from dnd_jax.generator.released import save_reference_generator


def export_generator(run_dir: str | os.PathLike, path: str | os.PathLike) -> pathlib.Path:
    """A generator folder -> the original's .pth file; returns it. Raises InputError for an element
    target, which the original has no place for."""
    folder = find_generator(run_dir)
    with steady(folder):
        description = read_description(folder)
        target = description.generator.target
        if target != "chunk":
            raise InputError(
                f"{folder}: generator.target = {target!r}; the original's format knows only "
                "chunk tokens"
            )
        if not (folder / MODEL).is_file():
            raise InputError(f"{folder / MODEL}: no such file")
        params = traverse_util.unflatten_dict(open_tensors(folder / MODEL), sep="/")
        return save_reference_generator(
            Generator(description.spec),
            params,
            path,
            read_safetensors(folder / STATISTICS)["importance"],
        )


def _run(given: Given) -> None:
    given.need("out")
    print(f"state dict: {export_generator(given.argument, given['out']).absolute()}")


STAGE = Stage(_run, (OUT,), ("torch",), argument="GENERATOR", settings=NONE)
