"""Stored tensors -> parameters, one parameter at a time and each device's shard by itself: no host
ever holds a whole model.

Names and shapes come from the files' headers and are checked against a table before the first value
is read: every tensor is mapped exactly once; unknown, missing and misshapen ones are listed in one
error.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dnd_jax.base.names import HEAD, Table, part_of, wrapped_by
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


@dataclasses.dataclass
class _Source:
    """The stored tensors of one parameter, those of all layers of a stacked one."""

    names: list[str]
    transposed: bool
    stacked: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """As a tensor is stored whose parameter, or layer's part of it, has this one."""
        shape = shape[1:] if self.stacked else shape
        return shape[::-1] if self.transposed else shape

    def placed(
        self,
        weights: StoredWeights,
        shape: tuple[int, ...],
        dtype: Any,
        where: jax.sharding.Sharding | None,
    ) -> jax.Array:
        """The parameter on its devices. Equal shards (of replicas) are read once."""
        parts: dict[str, np.ndarray] = {}

        def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
            with weights.reader(name) as reader:
                value = reader(index[::-1] if self.transposed else index)
            return np.asarray(value.T if self.transposed else value, dtype)

        def read_all(index: tuple[slice, ...]) -> np.ndarray:
            layers, *inside = index
            names = self.names[layers]
            first = read(names[0], tuple(inside))
            value = np.empty((len(names), *first.shape), dtype)
            value[0] = first
            for i, name in enumerate(names[1:], 1):
                value[i] = read(name, tuple(inside))
            return value

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if (key := str(index)) not in parts:
                parts[key] = read_all(index) if self.stacked else read(self.names[0], index)
            return parts[key]

        if where is None:
            return jnp.asarray(part((slice(None),) * len(shape)))
        # Waiting keeps a device that is slower than the disk from piling up arrays in host memory.
        return jax.block_until_ready(jax.make_array_from_callback(shape, where, part))


def _sources(table: Table) -> dict[str, _Source]:
    """{path of a parameter: where it is stored}, by a table whose layers come in their order."""
    found: dict[str, _Source] = {}
    for theirs, ours, transposed in table:
        path, layer = part_of(ours)
        found.setdefault(path, _Source([], transposed, layer is not None)).names.append(theirs)
    return found


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
    sources = _sources(table)
    for ours, source in sources.items():
        wanted = source.shape(expected[ours])
        faults += [
            f"{theirs} has shape {weights.shapes[theirs]}, which config.json does not give"
            for theirs in source.names
            if weights.shapes.get(theirs, wanted) != wanted
        ]
    if faults:
        raise listed(f"{weights.folder}: the weights do not match the architecture", sorted(faults))
    flat = {
        ours: source.placed(weights, expected[ours], dtype, shardings.get(ours))
        for ours, source in sources.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")
