"""Batches: their order, and their making ahead of time by a thread."""

import collections
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dnd_jax.core.files import unreadable

# Batches made before they are needed, while the next step, dispatched already, has its own.
AHEAD = 1


def ahead(
    batch_at: Callable[[int], Any], first: int, steps: int
) -> Iterator[tuple[int, Any, float]]:
    """(i, batch_at(i), seconds that were waited for it) for i in first..steps - 1, made by a thread
    AHEAD of their use. Raises InputError naming the file that cannot be read, and what else
    batch_at does."""
    pool = ThreadPoolExecutor(1, "input")
    queue = collections.deque(
        pool.submit(batch_at, i) for i in range(first, min(first + AHEAD, steps))
    )
    try:
        for i in range(first, steps):
            started = time.perf_counter()
            try:
                batch = queue.popleft().result()
            except OSError as error:
                raise unreadable(error, "the training data") from error
            if i + AHEAD < steps:
                queue.append(pool.submit(batch_at, i + AHEAD))
            yield i, batch, time.perf_counter() - started
    finally:
        pool.shutdown(cancel_futures=True)


def shuffled_rows(size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of the step-th batch when `size` examples are read epoch after epoch, each in a new
    order, from (seed, step) alone."""
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(size)
        for epoch in np.unique(at // size)
    }
    return np.array([orders[i // size][i % size] for i in at])
