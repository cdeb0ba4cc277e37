"""Training pairs: N random prompts of a dataset with one of that dataset's LoRA checkpoints (METHOD.md section 1).

A pair is drawn from (seed, step) alone and knows its dataset by name.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dnd_jax.errors import listed


@dataclasses.dataclass(frozen=True)
class PairedDataset:
    """prompts: one entry a prompt along axis 0 of every array, either {"condition": (n, L, C)} or {"ids", "valid": (n, L)};
    targets: (M, T, h, w), one a checkpoint."""

    name: str
    prompts: Mapping[str, np.ndarray]
    targets: np.ndarray

    @property
    def num_prompts(self) -> int:
        return len(next(iter(self.prompts.values())))


class Pairs:
    """Batches of B pairs with N prompts each. Raises InputError naming every dataset with fewer than N prompts."""

    def __init__(self, datasets: Sequence[PairedDataset], batch_size: int, num_prompts: int, seed: int):
        self.datasets, self.batch_size, self.num_prompts, self.seed = tuple(datasets), batch_size, num_prompts, seed
        few = [f"{d.name} has {d.num_prompts} prompts" for d in self.datasets if d.num_prompts < num_prompts]
        if few:
            raise listed(f"condition.num_prompts = {num_prompts} prompts a pair are needed", few)

    def draw(self, step: int) -> list[tuple[int, int, np.ndarray]]:
        """(dataset, checkpoint, N prompts) of each of the step's B pairs: a function of (seed, step)."""
        rng = np.random.default_rng([self.seed, step])
        drawn = []
        for _ in range(self.batch_size):
            d = int(rng.integers(len(self.datasets)))
            dataset = self.datasets[d]
            checkpoint = int(rng.integers(len(dataset.targets)))
            drawn.append((d, checkpoint, rng.choice(dataset.num_prompts, self.num_prompts, replace=False)))
        return drawn

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """{"condition" (B, N, L, C) or "ids", "valid" (B, N, L); "target" (B, T, h, w); "dataset" (B,)}."""
        drawn = self.draw(step)
        keys = self.datasets[0].prompts
        batch = {key: np.stack([self.datasets[d].prompts[key][np.sort(prompts)] for d, _, prompts in drawn]) for key in keys}
        batch["target"] = np.stack([self.datasets[d].targets[checkpoint] for d, checkpoint, _ in drawn])
        batch["dataset"] = np.array([d for d, _, _ in drawn], np.int32)
        return batch

    def names(self, step: int) -> str:
        """The datasets of a step's pairs, for messages."""
        return ", ".join(sorted({self.datasets[d].name for d, _, _ in self.draw(step)}))
