"""How programs are compiled, and how many of those that this process needed it read instead: JAX
keeps them in $JAX_COMPILATION_CACHE_DIR, which dnd sets where there is a TPU or GPU."""

import collections
import pathlib
from typing import Any

import jax

_ASKED = "/jax/compilation_cache/compile_requests_use_cache"
_FOUND = "/jax/compilation_cache/cache_hits"
_SAVED = "/jax/compilation_cache/compile_time_saved_sec"
_COMPILING = tuple(
    f"/jax/core/compile/{part}_duration"
    for part in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
_seen: collections.Counter[str] = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: _seen.update({name: 1}))
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: _seen.update({name: seconds})
)


def compiler_options(platform: str, deterministic: bool = False) -> dict[str, Any] | None:
    """Options for jax.jit of a program of large convolutions or matrix products.

    A CPU runs them one after the other: each uses all cores anyway, and side by side their arrays
    took half as much memory again (`dnd bench`). Of YNNPACK it takes the sums alone: its
    convolution takes two to three times as long over a kernel's gradient as XLA's own, and with its
    products a step of LoRAs takes longer. deterministic: a GPU then adds in one order, and chooses
    no algorithm by measuring.
    """
    return {
        "cpu": {
            "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
            "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
        },
        "gpu": {"xla_gpu_deterministic_ops": True} if deterministic else None,
    }.get(platform)


def keep_in(folder: pathlib.Path) -> None:
    """Keeps programs in another folder from now on. Of several processes process 0 writes them, so
    that the others find them only in one that all share."""
    jax.config.update("jax_compilation_cache_dir", str(folder))


def compiling() -> float:
    """Seconds that this process has spent on making programs so far."""
    return sum(_seen[name] for name in _COMPILING)


def from_cache() -> str:
    """A line on what was read so far; empty where programs are not kept."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not _seen[_ASKED]:
        return ""
    saved = max(0.0, _seen[_SAVED])
    return (
        f"programs: {_seen[_FOUND]} of {_seen[_ASKED]} read from {folder}, which saved {saved:.0f} "
        "s of compiling"
    )
