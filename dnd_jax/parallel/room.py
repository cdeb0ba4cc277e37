"""How much memory a device has free."""

import os

import jax

from dnd_jax.core.memory import free_memory


def free_bytes(device: jax.Device) -> int:
    """What a program may take on a device beside the arrays that are there. On CPUs, what the
    machine (or the container) has free, shared by all devices of the process."""
    stats = _stats(device)
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    here = sum(d.process_index == device.process_index for d in jax.devices())
    return (free_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // here


def _stats(device: jax.Device) -> dict:
    return (device.memory_stats() if device.platform != "cpu" else None) or {}
