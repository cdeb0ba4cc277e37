"""Where every array is kept on a mesh: parameters and optimizer state by rules, batches over the
data axes."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dnd_jax.core.errors import InputError, listed
from dnd_jax.parallel.mesh import describe_mesh
from dnd_jax.parallel.placement import BATCH_AXES, batch_ways


def path_name(path: tuple) -> str:
    """A pytree path as "decoder/stage_0/conv1w"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shard_by_rules(mesh: jax.sharding.Mesh, rules: tuple, shapes: Any) -> Any:
    """NamedShardings for a tree of arrays or shapes.

    rules: ordered (pattern, axes), axes being a mesh axis, a tuple of them or None for each
    dimension; () replicates. The first rule decides whose pattern is found in the leaf's path, that
    has an entry for each of its dimensions and whose axes divide them. Scalars are replicated.
    Raises InputError listing every leaf that no rule fits, with why.
    """
    faults = []

    def place(path, leaf) -> NamedSharding:
        name, tried = path_name(path), []
        for pattern, axes in rules if leaf.shape else ():
            if not re.search(pattern, name):
                continue
            if not axes or (len(axes) == len(leaf.shape) and _divides(mesh, axes, leaf.shape)):
                return NamedSharding(mesh, PartitionSpec(*axes))
            tried.append(f"{axes} does not fit")
        if leaf.shape:
            faults.append(
                f"{name} {leaf.shape} has no rule in "
                f"config.mesh.rules{': ' + '; '.join(tried) if tried else ''}"
            )
        return NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree.map_with_path(place, shapes)
    if faults:
        raise listed(f"sharding over {describe_mesh(mesh)}", faults)
    return shardings


def _divides(mesh: jax.sharding.Mesh, axes: tuple, shape: tuple[int, ...]) -> bool:
    """Whether every dimension is a multiple of its axes' sizes."""

    def ways(entry) -> int:
        return math.prod(
            mesh.shape[a]
            for a in (entry if isinstance(entry, tuple) else (entry,))
            if a is not None
        )

    return all(size % ways(entry) == 0 for size, entry in zip(shape, axes, strict=True))


def shapes_of(init: Callable, *inputs: Any) -> Any:
    """The shapes of what `init(key, *inputs)` makes; nothing is computed, nor is the key."""
    return jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), *inputs)


def shaped(shapes: Any, shardings: Any) -> Any:
    """The shapes with their shardings, for compilation without arrays."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def bytes_per_device(shapes: Any, shardings: Any) -> tuple[int, int]:
    """(bytes of a whole tree of arrays or shapes, bytes of it that one device holds)."""
    total = held = 0
    for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        total += math.prod(leaf.shape) * leaf.dtype.itemsize
        held += math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total, held


def held_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes that have shardings."""
    return bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree))[1]


def sharding_table(shapes: Any, shardings: Any) -> list[str]:
    """One line a leaf: path, type, shape, axes of each dimension and the shape on one device."""
    lines = []
    for (path, leaf), where in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        axes = ", ".join(str(a) for a in where.spec) or "-"
        lines.append(
            f"{path_name(path)} {leaf.dtype}{list(leaf.shape)} ({axes}) "
            f"{list(where.shard_shape(leaf.shape))}"
        )
    return lines


def leading(mesh: jax.sharding.Mesh, size: int, what: str) -> NamedSharding:
    """The sharding that splits the first axis (batch, tasks) over slice x data x fsdp. Raises
    InputError naming `what` when they do not divide its size."""
    ways = batch_ways(mesh)
    if size % ways:
        fits = max(ways, size // ways * ways)
        raise InputError(
            f"{what} = {size} is not divisible by slice x data x fsdp = {ways}; {fits} is"
        )
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shapes(samples: Mapping, size: int, over_batch: NamedSharding) -> dict:
    """Of a batch of `size` samples, one of which has these shapes."""
    return {
        key: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=over_batch)
        for key, x in samples.items()
    }


def finest(where: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding whose parts are those of `where`, equal ones split among the devices that have
    them as far as the array's dimensions divide. Its mesh has the same devices in the same order,
    and an axis for each prime factor of an axis' size."""
    if not isinstance(where, NamedSharding) or where.mesh.size == 1 or not shape:
        return where
    of_axis = {
        axis: [(f"{axis}_{i}", prime) for i, prime in enumerate(_primes(size))]
        for axis, size in where.mesh.shape.items()
    }
    every = [axis for axes in of_axis.values() for axis in axes]
    left = list(where.shard_shape(shape))
    entries = [*where.spec, *(None,) * (len(shape) - len(where.spec))]
    split = [
        [name for a in (e if isinstance(e, tuple) else (e,)) if a for name, _ in of_axis.pop(a)]
        for e in entries
    ]
    for name, prime in (axis for axes in of_axis.values() for axis in axes):
        fitting = [i for i, size in enumerate(left) if size % prime == 0]
        if fitting:
            largest = max(fitting, key=left.__getitem__)
            left[largest] //= prime
            split[largest].append(name)
    mesh = jax.sharding.Mesh(
        where.mesh.devices.reshape([prime for _, prime in every]), [name for name, _ in every]
    )
    fine = NamedSharding(mesh, PartitionSpec(*(tuple(names) or None for names in split)))
    return where if fine.is_equivalent_to(where, len(shape)) else fine


def _primes(number: int) -> list[int]:
    """Its prime factors."""
    found, factor = [], 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
