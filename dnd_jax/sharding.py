"""The device mesh, and where every array lies on it: parameters by ordered rules, batches over the data axes."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dnd_jax import config as config_lib
from dnd_jax.errors import InputError, listed

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: config_lib.Mesh, device_list: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices, or of those given. One axis size may be -1.

    Raises InputError with the equation when the sizes do not fit.
    """
    devices = jax.device_count() if device_list is None else len(device_list)
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"config.mesh: sizes {dict(zip(AXES, sizes, strict=True))}; each is at least 1, one of them may be -1")
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        equation = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise InputError(
            f"config.mesh: {equation} is not {devices} devices; set data to -1 and the others to divisors of {devices}"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=device_list)


def path_name(path: tuple) -> str:
    """A pytree path as "decoder/stage_0/conv1w"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shard_by_rules(mesh: jax.sharding.Mesh, rules: tuple, shapes: Any) -> Any:
    """NamedShardings for a tree of arrays or shapes: the first rule whose pattern is found in a leaf's path decides.

    Scalars are replicated. Raises InputError listing every leaf without a rule or with a dimension that its axis does not divide.
    """
    faults = []

    def place(path, leaf) -> NamedSharding:
        name = path_name(path)
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), None)
        if axes is None:
            faults.append(f"{name} {leaf.shape} matches no rule of config.mesh.rules")
            axes = ()
        for dimension, axis in zip(leaf.shape, axes, strict=False):
            if axis is not None and dimension % mesh.shape[axis]:
                faults.append(f"{name} {leaf.shape}: {dimension} is not divisible by {axis} = {mesh.shape[axis]}")
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map_with_path(place, shapes)
    if faults:
        raise listed("sharding", faults)
    return shardings


def batch_ways(mesh: jax.sharding.Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def kernel_ways(mesh: jax.sharding.Mesh) -> int:
    """How many parts a convolution's kernel is split into."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"]


def leading(mesh: jax.sharding.Mesh, size: int, what: str) -> NamedSharding:
    """The first axis (batch, tasks) over data x fsdp. Raises InputError when it does not divide."""
    ways = batch_ways(mesh)
    if size % ways:
        raise InputError(f"{what} = {size} is not divisible by data x fsdp = {ways}")
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
