"""The honest competitors of a generated adapter, made from the same training checkpoints and prompt
embeddings.

mean adapter: the average of all training checkpoints. nearest: the training dataset whose prompts
look most alike. ridge: a linear map from mean-pooled prompt embeddings to weights, its strength
chosen by leaving training datasets out, never on a test.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dnd_jax.lora.moments import BLOCK
from dnd_jax.lora.targets import ElementTarget

# Times the mean squared norm of a centred embedding.
RIDGE_STRENGTHS = tuple(10.0**p for p in range(-3, 5))


def mean_weights(checkpoints: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The element-wise mean of adapters with the same keys."""
    total: dict[str, np.ndarray] = {}
    count = 0
    for tensors in checkpoints:
        count += 1
        for key, value in tensors.items():
            total[key] = total.get(key, 0.0) + np.asarray(value, np.float64)
    return {key: (value / count).astype(np.float32) for key, value in total.items()}


def running_mean(values: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of float32 arrays of one shape, of which one is held at a time."""
    mean = 0.0
    for count, value in enumerate(values, 1):
        mean = mean + (value - mean) / np.float32(count)
    return mean


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Tokens = (embedding - centre) @ shares.T @ tokens of the training datasets, normalised by a
    target.

    The coefficients, (C, T * r * w), are never multiplied out: of a 7B base they would be 124 GB.
    """

    target: ElementTarget
    centre: np.ndarray  # (C,)
    shares: np.ndarray  # (D, C), a row a training dataset
    tokens: np.ndarray  # float32 (D, T * r * w)
    strength: float
    left_out_error: float  # mean squared error on left-out datasets relative to predicting zero

    @classmethod
    def fit(
        cls,
        target: ElementTarget,
        pooled: Mapping[str, np.ndarray],
        tokens: Iterable[np.ndarray],
        batches: Sequence[Sequence[np.ndarray]],
    ) -> "Ridge":
        """pooled: (n_d, C) prompt embeddings of each training dataset; tokens: for each in order,
        its mean normalised tokens (T, r, w), read once; batches: rows of several draws of N
        prompts, so that it sees the noise that it will meet."""
        x = np.stack(
            [
                pooled[name][rows].mean(axis=0)
                for name, draws in zip(pooled, batches, strict=True)
                for rows in draws
            ]
        )
        group = np.repeat(np.arange(len(batches)), [len(draws) for draws in batches])
        y = np.empty((len(pooled), math.prod(target.shape)), np.float32)  # a row a dataset
        for row, of_dataset in zip(y, tokens, strict=True):
            row[:] = np.nan_to_num(of_dataset).reshape(-1)
        y_gram = _gram(y)
        centre = x.mean(axis=0)
        x = x - centre
        gram = x @ x.T
        unit = np.trace(gram) / len(gram)

        def left_out(strength: float) -> float:
            inverse = np.linalg.inv(gram + strength * unit * np.eye(len(gram)))
            error = 0.0
            for g in range(len(y)):
                keep, own = group != g, group == g
                # The system without g's rows, solved for them, by blocks of the whole inverse.
                solved = -np.linalg.solve(inverse[np.ix_(own, own)], inverse[np.ix_(own, keep)]).T
                # Predictions combine the other datasets' rows: sum the coefficients of each
                # dataset's draws.
                # (D, draws left out)
                share = np.stack([solved[group[keep] == d].sum(axis=0) for d in range(len(y))])
                share[g] = -1  # now share.T @ y is prediction - y[g]
                error += np.einsum("de,df,fe->e", share, y_gram, share).mean() / (
                    np.trace(y_gram) / len(y)
                )
            return error / len(y)

        errors = {strength: left_out(strength) for strength in RIDGE_STRENGTHS}
        strength = min(errors, key=errors.get)
        solved = np.linalg.solve(gram + strength * unit * np.eye(len(gram)), x)  # (rows, C)
        shares = np.stack([solved[group == d].sum(axis=0) for d in range(len(y))])
        return cls(target, centre, shares, y, strength, errors[strength])

    def tensors(self, prompts: np.ndarray) -> dict[str, np.ndarray]:
        """Pooled prompt embeddings (N, C) -> LoRA tensors."""
        tokens = ((prompts.mean(axis=0) - self.centre) @ self.shares.T).astype(
            np.float32
        ) @ self.tokens
        return self.target.decode(tokens.reshape(self.target.shape))


def _gram(rows: np.ndarray) -> np.ndarray:
    """rows @ rows.T in float64, a block of columns at a time."""
    width = max(1, BLOCK // len(rows))
    blocks = (
        rows[:, first : first + width].astype(np.float64)
        for first in range(0, rows.shape[1], width)
    )
    return sum(block @ block.T for block in blocks)
