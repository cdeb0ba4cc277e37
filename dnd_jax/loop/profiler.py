"""Profiler traces of some steps of a run."""

import pathlib
from typing import Any

import jax
from tqdm import tqdm


class Profiler:
    """Traces the steps first < i <= last of a run into DIRECTORY/profile, for TensorBoard's or
    Perfetto's viewer; each of several processes into a folder of its own there, since those of one
    host would write the same file."""

    def __init__(self, directory: pathlib.Path, window: tuple[int, int] | None):
        own = f"profile/process_{jax.process_index()}" if jax.process_count() > 1 else "profile"
        self._directory, self._window, self._running = directory / own, window or (-1, -1), False

    def at(self, done: int, wait_for: Any) -> None:
        """Starts or stops after `done` steps; wait_for: what the last traced step computes."""
        first, last = self._window
        if first <= done < last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif done == last and self._running:
            jax.block_until_ready(wait_for)
            self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            tqdm.write(f"profile: {self._directory}")
