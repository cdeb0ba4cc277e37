"""Which training tasks a set of prompts is close to."""

from collections.abc import Mapping

import numpy as np


def nearest(prompts: np.ndarray, datasets: Mapping[str, np.ndarray]) -> str:
    """The dataset whose mean embedding (of n_d, C) has the highest cosine with that of the prompts
    (n, C), after centring."""
    means = {name: pooled.mean(axis=0) for name, pooled in datasets.items()}
    centre = np.mean(list(means.values()), axis=0)

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12)

    query = prompts.mean(axis=0) - centre
    return max(means, key=lambda name: cosine(query, means[name] - centre))
