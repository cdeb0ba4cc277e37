"""The honest competitors of a generated adapter, made from the same training checkpoints and prompt embeddings.

mean adapter: the average of all training checkpoints. nearest: the training dataset whose prompts look most alike. ridge: a linear
map from mean-pooled prompt embeddings to weights, its strength chosen by leaving training datasets out, never on a test.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dnd_jax.targets import ElementTarget

RIDGE_STRENGTHS = tuple(10.0**p for p in range(-3, 5))  # times the mean squared norm of a centred embedding


def nearest(prompts: np.ndarray, datasets: Mapping[str, np.ndarray]) -> str:
    """The dataset whose mean embedding (of n_d, C) has the highest cosine with that of the prompts (n, C), after centring."""
    means = {name: pooled.mean(axis=0) for name, pooled in datasets.items()}
    centre = np.mean(list(means.values()), axis=0)

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12)

    query = prompts.mean(axis=0) - centre
    return max(means, key=lambda name: cosine(query, means[name] - centre))


def mean_weights(checkpoints: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The element-wise mean of adapters with the same keys."""
    total: dict[str, np.ndarray] = {}
    count = 0
    for tensors in checkpoints:
        count += 1
        for key, value in tensors.items():
            total[key] = total.get(key, 0.0) + np.asarray(value, np.float64)
    return {key: (value / count).astype(np.float32) for key, value in total.items()}


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Weights = mean + (embedding - centre) @ coefficients, in a target's normalised tokens."""

    target: ElementTarget
    centre: np.ndarray  # (C,)
    coefficients: np.ndarray  # (C, T * r * w)
    strength: float
    left_out_error: float  # mean squared error on left-out datasets relative to predicting zero

    @classmethod
    def fit(
        cls,
        target: ElementTarget,
        pooled: Mapping[str, np.ndarray],
        weights: Mapping[str, np.ndarray],
        batches: Sequence[Sequence[np.ndarray]],
    ) -> "Ridge":
        """pooled: (n_d, C) prompt embeddings of each training dataset; weights: its mean normalised tokens (T, r, w);
        batches: for each dataset in order, rows of several draws of N prompts, so that it sees the noise that it will meet."""
        x = np.stack([pooled[name][rows].mean(axis=0) for name, draws in zip(pooled, batches, strict=True) for rows in draws])
        group = np.repeat(np.arange(len(batches)), [len(draws) for draws in batches])
        y = np.stack([np.nan_to_num(weights[name]).reshape(-1) for name in pooled])  # a row a dataset
        centre = x.mean(axis=0)
        x = x - centre
        gram = x @ x.T
        unit = np.trace(gram) / len(gram)

        def left_out(strength: float) -> float:
            error = 0.0
            for g in range(len(y)):
                keep = group != g
                solved = np.linalg.solve(gram[np.ix_(keep, keep)] + strength * unit * np.eye(keep.sum()), gram[keep][:, ~keep])
                # Predictions combine the other datasets' rows: sum the coefficients of each dataset's draws.
                share = np.stack([solved[group[keep] == d].sum(axis=0) for d in range(len(y))])  # (datasets, draws left out)
                prediction = share.T @ y
                error += np.mean((prediction - y[g]) ** 2) / np.mean(y**2)
            return error / len(y)

        errors = {strength: left_out(strength) for strength in RIDGE_STRENGTHS}
        strength = min(errors, key=errors.get)
        solved = np.linalg.solve(gram + strength * unit * np.eye(len(gram)), x)  # (rows, C)
        per_dataset = np.stack([solved[group == d].sum(axis=0) for d in range(len(y))])
        return cls(target, centre, per_dataset.T @ y, strength, errors[strength])

    def tensors(self, prompts: np.ndarray) -> dict[str, np.ndarray]:
        """Pooled prompt embeddings (N, C) -> LoRA tensors."""
        tokens = (prompts.mean(axis=0) - self.centre) @ self.coefficients
        return self.target.decode(tokens.reshape(self.target.shape))
