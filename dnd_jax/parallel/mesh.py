"""The device mesh, and where every array is kept on it: parameters and optimiser state by rules,
batches over its data axes."""

import math
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from dnd_jax.config import schema
from dnd_jax.config.choices import AXES
from dnd_jax.core.errors import InputError

# Flags by which a user names an axis.
KEYS = {"slice": "slices", "data": "data", "fsdp": "fsdp", "tensor": "tensor"}


def make_mesh(
    config: schema.Mesh, device_list: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh slice x data x fsdp x tensor of all devices, or of those given. Slices are connected
    by the data centre's network.

    config.slices 0: as many slices as TPUs report, else one. More than one where none are reported:
    equal runs of processes, in order, so that what is split inside a slice stays inside a host of
    GPUs where it fits one. One of data, fsdp and tensor may be -1: the rest. If the
    sizes do not fit the devices, raises InputError with the equation and a mesh that works.
    """
    devices = list(jax.devices() if device_list is None else device_list)
    slices = config.slices or len({_slice(d) for d in devices})
    sizes = {"slice": slices, **{axis: getattr(config, axis) for axis in AXES[1:]}}
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        given = ", ".join(f"{KEYS[axis]} {size}" for axis, size in sizes.items())
        raise InputError(
            f"config.mesh: {given}; each is at least 1, and one of data, fsdp and tensor may be "
            "-1 (the rest)"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if unknown and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        shown = {axis: size for axis, size in sizes.items() if axis != "slice" or size > 1}
        equation = " x ".join(
            f"{axis} {'?' if size == -1 else size}" for axis, size in shown.items()
        )
        total = f"a multiple of {known}" if unknown else known
        flags = " ".join(
            f"--config.mesh.{KEYS[axis]}={size}"
            for axis, size in _working(sizes, len(devices)).items()
        )
        raise InputError(
            f"config.mesh: {equation} = {total}, but {_counted(devices)}; this works: {flags}"
        )
    shape = tuple(sizes.values())
    return jax.sharding.Mesh(
        _arrange(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def own_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh, or where other processes have a part of it, one of this process' own devices alone:
    as much of fsdp as they divide, data the rest."""
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if len(mine) == mesh.size:
        return mesh
    fsdp = math.gcd(len(mine), mesh.shape["fsdp"])
    return make_mesh(schema.Mesh(slices=1, data=-1, fsdp=fsdp, tensor=1, rules=()), mine)


def _slice(device: jax.Device) -> int:
    """The number of its slice. Of GPUs each host reports to be one, which binds no mesh: several
    hosts are one slice, or those that config.mesh.slices makes of them."""
    return 0 if device.platform == "gpu" else getattr(device, "slice_index", 0) or 0


def _counted(devices: Sequence[jax.Device]) -> str:
    """ "16 devices (4 hosts x 4)"."""
    per_host = Counter(d.process_index for d in devices)
    counts = set(per_host.values())
    each = (
        f" ({len(per_host)} hosts x {counts.pop()})"
        if len(counts) == 1 and len(per_host) > 1
        else ""
    )
    return f"{len(devices)} device{'s' * (len(devices) > 1)}{each}"


def _working(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """The nearest sizes that fit: tensor and fsdp by their common divisors with what is left of the
    devices, data the rest."""
    left, found = devices, {}
    for axis in ("slice", "tensor", "fsdp"):
        found[axis] = math.gcd(left, max(sizes[axis], 1))
        left //= found[axis]
    found["data"] = left
    return {
        axis: found[axis] for axis in AXES if axis != "slice" or found[axis] > 1 or sizes[axis] > 1
    }


def _arrange(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of this shape, such that neighbours in it are neighbours in the
    network."""
    slices, reported = shape[0], len({_slice(d) for d in devices})
    if reported not in (1, slices):
        raise InputError(
            f"config.mesh.slices = {slices}, but the devices are in {reported} slices; leave it "
            "at 0"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # No slices of their own: equal runs of processes, such as the hosts of a GPU cluster.
    if reported == 1:
        ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
        per_slice = len(devices) // slices
        parts = [ordered[i * per_slice : (i + 1) * per_slice] for i in range(slices)]
        inner = [
            mesh_utils.create_device_mesh(shape[1:], part, allow_split_physical_axes=True)
            for part in parts
        ]
        return np.stack(inner)
    inside, outside = (1, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(
        inside, outside, devices, allow_split_physical_axes=True
    )


def describe_mesh(mesh: jax.sharding.Mesh) -> str:
    """ "data 2 x fsdp 4 over 8 TPU v5p devices (2 hosts x 4)"."""
    sizes = " x ".join(
        f"{axis} {size}" for axis, size in mesh.shape.items() if axis != "slice" or size > 1
    )
    devices = list(mesh.devices.flat)
    return f"{sizes} over {_counted(devices)} ({devices[0].device_kind})"


def mesh_record(mesh: jax.sharding.Mesh) -> dict:
    """Axis sizes and the order of the devices, for a run's record."""
    return {"axes": dict(mesh.shape), "devices": [d.id for d in mesh.devices.flat]}
