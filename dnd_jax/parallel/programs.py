"""How many of the programs that this process needed it read instead of compiling them: JAX keeps
them in $JAX_COMPILATION_CACHE_DIR, which dnd sets where there is a TPU or GPU."""

import collections
import pathlib

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
