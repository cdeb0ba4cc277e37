"""Confidence intervals: a percentile bootstrap over test questions, drawn from the seed.

Questions of a dataset are drawn with replacement, the same ones for all methods and for all seeds
that were asked the same ones. A mean over datasets (and over seeds with questions of their own)
draws in each of them on its own. The interval says how much a score depends on which questions were
asked, not on the seed of the training. Where all questions score alike it has no width.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95
CELLS_AT_ONCE = 4_000_000
NOTE = (
    f"{LEVEL:.0%} intervals: percentile bootstrap over test questions, {RESAMPLES} resamples; "
    "they say nothing of another training "
    "seed, and have no width where all questions score alike."
)


def replicates(
    questions: Mapping[Hashable, np.ndarray], seed: int, name: str
) -> dict[Hashable, np.ndarray]:
    """Scores question by question (n,) under any keys -> their means over RESAMPLES draws of n
    questions, (RESAMPLES,)."""
    values = np.stack(list(questions.values()), axis=1)  # (n, keys)
    n = len(values)
    rng = np.random.default_rng([seed, *name.encode()])
    rows = max(1, CELLS_AT_ONCE // n)
    sizes = [min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows)]
    means = np.concatenate(
        [rng.multinomial(n, np.full(n, 1 / n), size) @ values / n for size in sizes]
    )
    return dict(zip(questions, means.T, strict=True))


def average(groups: Sequence[Mapping[Hashable, np.ndarray]]) -> dict[Hashable, np.ndarray]:
    """The replicates of a mean of several datasets or seeds, under the keys that all of them
    have."""
    return {
        key: np.mean([g[key] for g in groups], axis=0)
        for key in groups[0]
        if all(key in g for g in groups)
    }


def interval(of_mean: np.ndarray) -> list[float]:
    """[low, high] of replicates, rounded beyond what sums in another order change."""
    return [round(float(x), 6) for x in np.quantile(of_mean, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
