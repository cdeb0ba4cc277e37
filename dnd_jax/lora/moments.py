"""Statistics over checkpoints that are read one at a time: Welford's running moments, and the
importance weights that come from them."""

import numpy as np

from dnd_jax.core.errors import InputError

BLOCK = 1 << 18  # cells that are updated at a time: what a processor's cache holds in float64


class Moments:
    """Mean and squared deviations of token arrays [T, h, w] in one pass, in float64 (Welford).

    by_token: of the squared deviations only their mean over a token's cells is kept, [T]. NaN cells
    do not count.
    """

    def __init__(self, by_token: bool = False):
        self.count = 0
        self._by_token = by_token
        self.mean = np.zeros(0)  # [T, h, w] after the first array
        self._square = np.zeros(0)  # [T, h, w], or [T] by token

    def add(self, tokens: np.ndarray) -> None:
        """The next array, [T, h, w]."""
        if not self.count:
            self.mean = np.zeros(tokens.shape)
            self._square = np.zeros(tokens.shape[:1] if self._by_token else tokens.shape)
        self.count += 1
        size = max(1, BLOCK // tokens[0].size)
        for first in range(0, len(tokens), size):
            at = slice(first, first + size)
            step = tokens[at] - self.mean[at]
            self.mean[at] += step / self.count
            square = step * (tokens[at] - self.mean[at])
            self._square[at] += np.nanmean(square, axis=(1, 2)) if self._by_token else square

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation: [T, h, w], or [T] by token."""
        return np.sqrt(self._square / self.count)


def importance_weights(moments: Moments, source: str = "") -> np.ndarray:
    """Importance of each token: the spread of its cells over a dataset's checkpoints
    (docs/METHOD.md section 3), float32 [T], mean 1 over all cells.

    Raises InputError for fewer than two checkpoints, or some that do not differ.
    """
    of = f" ({source})" if source else ""
    if moments.count < 2:
        raise InputError(
            f"importance weights need at least two checkpoints a dataset, got {moments.count}{of}"
        )
    std = moments.std
    total = np.nansum(std)
    if not total > 0:
        raise InputError(
            f"importance weights need checkpoints that differ; all of this dataset's are equal{of}"
        )
    share = np.nanmean(std, axis=(1, 2)) / total
    return (share * np.count_nonzero(~np.isnan(std))).astype(np.float32)
