"""Stage `export-generator`: a generator folder -> the original's .pth, bit for bit.

dnd export-generator DIR --out=X.pth
"""

import os
import pathlib

from flax import traverse_util

from dnd_jax.core.errors import InputError
from dnd_jax.core.stage import Given
from dnd_jax.core.tensors import open_tensors
from dnd_jax.generator.folder import (
    MODEL,
    check_parameters,
    find_generator,
    read_description,
    read_statistics,
    steady,
)
from dnd_jax.generator.model import Generator, param_shapes
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
        module = Generator(description.spec)
        check_parameters(folder, param_shapes(module))
        statistics = read_statistics(folder, description)
        params = traverse_util.unflatten_dict(open_tensors(folder / MODEL), sep="/")
        return save_reference_generator(module, params, path, statistics["importance"])


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("out")
    if os.path.lexists(given["out"]):
        raise InputError(f"--out={given['out']}: exists already; choose another --out")
    print(f"state dict: {export_generator(given.argument, given['out']).absolute()}")
