"""What a train step computes with, made from what a batch brings: the condition with its gaps and
noise, and the tokens of LoRA checkpoints, where these stay on the devices (docs/METHOD.md section
6)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from dnd_jax.config.training import OF_LORAS, Train
from dnd_jax.core.chips import chip_of
from dnd_jax.encoders.load import encode_windows
from dnd_jax.parallel import hosts
from dnd_jax.parallel.placement import BATCH_AXES, Placement
from dnd_jax.parallel.rules import held_bytes

SUBLANES, LANES = 8, 128  # of a tile of a TPU's memory, in float32
WITHIN_A_SLICE = ("data", "fsdp")  # which checkpoints lie over; each slice has them all
SHARE = 1 / 8  # of a device's room, at most, that they take unasked


# Conditions.


def condition_of(
    batch: Mapping, encoder: nn.Module | None, encoder_params: Any, place: Placement
) -> jax.Array:
    """The condition (B, N, L, C) of a batch, float32, as noise is added: as it is, or made here
    by the text encoder."""
    if encoder is None:
        return batch["condition"].astype(jnp.float32)
    b, n, length = batch["ids"].shape
    ids, valid = (place.activation(batch[key].reshape(b * n, length)) for key in ("ids", "valid"))
    flat = place.activation(encode_windows(encoder, encoder_params, ids, valid))
    return jax.lax.stop_gradient(flat).astype(jnp.float32).reshape(b, n, length, -1)


def with_gaps(x_BxNxLxC: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """The condition with zeros in place of a share of its token vectors, drawn one by one."""
    if not share:
        return x_BxNxLxC
    kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - share, x_BxNxLxC.shape[:-1])
    return jnp.where(kept[..., None], x_BxNxLxC, 0)


def noisy(x: jax.Array, deviation: float, key: jax.Array) -> jax.Array:
    """With Gaussian noise of a standard deviation."""
    return x + deviation * jax.random.normal(key, x.shape, x.dtype)


# LoRA checkpoints on the devices.


def kept_shape(
    checkpoints: int, grid: tuple[int, int, int], mesh: jax.sharding.Mesh
) -> jax.ShapeDtypeStruct:
    """Of the tokens (T, h, w) of all checkpoints: (M, rows, LANES), a checkpoint's cells one behind
    the other and filled up so that each device of a slice has as many rows of it, by SUBLANES: as a
    TPU keeps an array, it then reads one checkpoint without a copy of all."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-math.prod(grid) // (ways * SUBLANES * LANES)) * ways * SUBLANES
    return jax.ShapeDtypeStruct((checkpoints, rows, LANES), jnp.float32, sharding=over_cells(mesh))


def over_cells(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How they lie: every device has its part of each checkpoint, so that picking some of them
    needs no other device."""
    return NamedSharding(mesh, PartitionSpec(None, WITHIN_A_SLICE))


def stay(config: Train, kept: jax.ShapeDtypeStruct) -> bool:
    """Whether checkpoints, as `kept_shape`, stay on the devices, if a step needs any: as
    config.targets_on says, or where they take no more than SHARE of a known chip's room."""
    if not config.of_loras.keys() & {*config.taught}:
        return False
    if config.targets_on != "auto":
        return config.targets_on == "devices"
    chip = chip_of(kept.sharding.mesh.devices.flat[0].device_kind)
    return chip is not None and held_bytes(kept) <= SHARE * chip.room


def kept_checkpoints(
    config: Train, targets: Sequence[np.ndarray | None], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """{"checkpoints": those of all datasets, (M, T, h, w) each, one dataset after the other, as
    `kept_shape`} where they `stay`, else nothing. Each process reads its devices' parts."""
    targets = [x for x in targets if x is not None]
    if not targets:
        return {}
    count, grid = sum(map(len, targets)), targets[0].shape[1:]
    kept = kept_shape(count, grid, mesh)
    if not stay(config, kept):
        return {}
    if hosts.lead():
        held = held_bytes(kept)
        print(f"LoRA checkpoints stay on the devices: {held / 1e9:.3g} GB of each", flush=True)
    cells, flat = math.prod(grid), [x.reshape(len(x), -1) for x in targets]
    places: dict[tuple[int, int], list] = {}  # of other slices and of `tensor` some have the same
    for device, (_, rows, _) in kept.sharding.addressable_devices_indices_map(kept.shape).items():
        places.setdefault(rows.indices(kept.shape[1])[:2], []).append(device)
    arrays = []
    for (first, last), devices in places.items():  # one part at a time in the host's memory
        part = np.zeros((count, (last - first) * LANES), kept.dtype)
        known = max(0, min(last * LANES, cells) - first * LANES)
        for_some = [x[:, first * LANES : first * LANES + known] for x in flat]
        np.concatenate(for_some, out=part[:, :known])
        part = part.reshape(count, -1, LANES)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    whole = jax.make_array_from_single_device_arrays(kept.shape, kept.sharding, arrays)
    return {"checkpoints": whole}


def with_tokens(
    batch: Mapping, kept: jax.Array, grid: tuple[int, int, int], mesh: jax.sharding.Mesh
) -> Mapping:
    """The batch with the tokens (B, T, h, w) of its checkpoints in place of their numbers (B,)
    among those that are kept; grid: (T, h, w)."""
    picked = {key: batch[key] for key in OF_LORAS.values() if key in batch}
    return {**batch, **{key: _pick(kept, at, grid, mesh) for key, at in picked.items()}}


def _pick(
    kept: jax.Array, at_B: jax.Array, grid: tuple[int, int, int], mesh: jax.sharding.Mesh
) -> jax.Array:
    """Every device picks its part of all samples of its slice, and the parts change hands: the
    bytes of the batch travel once."""

    def local(kept, at):
        every = jax.lax.all_gather(at, WITHIN_A_SLICE, tiled=True)
        # One after the other: a gather would first copy all that is kept.
        parts = jax.lax.map(lambda i: jax.lax.dynamic_index_in_dim(kept, i, keepdims=False), every)
        return jax.lax.all_to_all(parts, WITHIN_A_SLICE, 0, 1, tiled=True)

    specs = over_cells(mesh).spec, PartitionSpec(BATCH_AXES)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(BATCH_AXES), check_vma=False
    )
    cells = mapped(kept, at_B).reshape(len(at_B), -1)[:, : math.prod(grid)]
    return cells.reshape(-1, *grid)
