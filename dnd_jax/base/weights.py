"""Stored tensors -> parameters, one at a time and each device's shard by itself: no host ever holds
a whole model.

Names and shapes come from the files' headers and are checked against a table before the first value
is read: every tensor is mapped exactly once; unknown, missing and misshapen ones are listed in one
error.
"""

import contextlib
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dnd_jax.base.names import HEAD, Table, wrapped_by
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.tensors import DTYPES, opened, stored_tensors
from dnd_jax.parallel.rules import shard_by_rules

ROWS = 4096  # compared at once


class StoredWeights:
    """A folder's model.safetensors, or the shards that its index names. `names`: all stored names
    -> {stored name: table's name}, without those that are not used.

    Raises InputError listing tensors that are stored under two names, or in a type that is no
    floating-point number's.
    """

    def __init__(self, folder: pathlib.Path, names: Callable[[Collection[str]], Mapping[str, str]]):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[pathlib.Path, str]] = {}
        tensors, faults = stored_tensors(folder), []
        for stored, name in names(tensors.keys()).items():
            tensor = tensors[stored]
            if name in self.shapes:
                twice = self._where[name][1]
                faults.append(f"{stored} and {twice} are the same tensor; remove one")
            if tensor.dtype not in DTYPES:
                faults.append(
                    f"{stored} is stored as {tensor.dtype}, which is no plain number type"
                )
            self.shapes[name] = tensor.shape
            self._where[name] = (tensor.path, stored)
        if faults:
            raise listed(f"{folder}: the weights cannot be read", sorted(faults))

    def leave(self, name: str) -> None:
        """Does as if the tensor were not stored."""
        del self.shapes[name], self._where[name]

    def alike(self, one: str, other: str) -> bool:
        """Whether two matrices have the same values, in float32; read a block of rows at a time."""
        if self.shapes[one] != self.shapes[other]:
            return False
        with self.reader(one) as read, self.reader(other) as read_other:
            count = self.shapes[one][0]
            for first in range(0, count, ROWS):
                rows = (slice(first, min(first + ROWS, count)),)
                if (read(rows).astype(np.float32) != read_other(rows).astype(np.float32)).any():
                    return False
        return True

    @contextlib.contextmanager
    def reader(self, name: str) -> Iterator[Callable[[tuple[slice, ...]], np.ndarray]]:
        """Gives read(index): that part of one tensor, of the stored type."""
        path, stored = self._where[name]
        with opened(path) as file:
            yield file.get_slice(stored).__getitem__


def _place(
    weights: StoredWeights,
    name: str,
    transposed: bool,
    shape,
    dtype,
    where: jax.sharding.Sharding | None,
) -> jax.Array:
    """One tensor on its devices. Equal shards (of replicas) are read once."""
    parts: dict[str, np.ndarray] = {}

    with weights.reader(name) as read:

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if str(index) not in parts:
                value = read(index[::-1] if transposed else index)
                parts[str(index)] = np.asarray(value.T if transposed else value, dtype)
            return parts[str(index)]

        if where is None:
            return jnp.asarray(part((slice(None),) * len(shape)))
        # Waiting keeps a device that is slower than the disk from piling up tensors in host memory.
        return jax.block_until_ready(jax.make_array_from_callback(shape, where, part))


def load_params(
    weights: StoredWeights,
    table: Table,
    shapes: Mapping,
    rules: tuple,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.float32,
) -> dict:
    """Nested parameters of the given shapes, of one dtype: on the mesh by the rules, or without one
    on the default device.

    Raises InputError listing every tensor that does not fit, and as `shard_by_rules` does.
    """
    expected = {
        "/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    shardings = (
        {}
        if mesh is None
        else traverse_util.flatten_dict(shard_by_rules(mesh, rules, shapes), sep="/")
    )
    names = {theirs for theirs, _, _ in table}
    unknown, missing = weights.shapes.keys() - names, names - weights.shapes.keys()
    if unknown and (who := wrapped_by(unknown, names)):
        raise InputError(
            f"{weights.folder}: its tensors are named as {who} wraps a model; save the model "
            "itself, unwrapped, by its save_pretrained"
        )
    faults = [f"{name} is missing" for name in missing]
    faults += [f"{name} is unknown" for name in unknown]
    if missing == {HEAD}:
        faults.append("if the embeddings are the head, say tie_word_embeddings in config.json")
    for theirs, ours, transposed in table:
        if (
            theirs in weights.shapes
            and expected[ours] != weights.shapes[theirs][:: -1 if transposed else 1]
        ):
            faults.append(
                f"{theirs} has shape {weights.shapes[theirs]}, which config.json does not give"
            )
    if faults:
        raise listed(f"{weights.folder}: the weights do not match the architecture", sorted(faults))
    flat = {
        ours: _place(weights, theirs, transposed, expected[ours], dtype, shardings.get(ours))
        for theirs, ours, transposed in table
    }
    return traverse_util.unflatten_dict(flat, sep="/")
