"""Which training tasks a set of prompts is close to, by the cosine of mean embeddings after
centring on the training tasks', and whether it is far from all of them, by their distance."""

import dataclasses
import math
import os
from collections.abc import Mapping

import numpy as np

from dnd_jax.config.schema import Config
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.suite import Suite
from dnd_jax.encoders.cache import PromptEncoder

DRAWS = 16  # of a training task's prompts, by which sets are judged to be far
FAR = 0.95  # so many of those are nearer to another task than what is far from all
LISTED = 3  # tasks that are named
DISTANCES = ("far_from", "within", "drawn")  # of `TrainedTasks`, as they are stored
READ = 256  # prompts of a task, at most, where none are encoded for training


@dataclasses.dataclass(frozen=True)
class TrainedTasks:
    """The training tasks of a generator: names, mean embeddings (D, C), and the distance from all
    of them beyond which N prompts are far, None where there are too few tasks to tell; the mean
    squared distance of a task's prompts from their mean, and N."""

    names: tuple[str, ...]
    means: np.ndarray
    far_from: float | None = None
    within: float = 0.0
    drawn: int = 1

    @classmethod
    def of(cls, pooled: Mapping[str, np.ndarray], num_prompts: int, seed: int) -> "TrainedTasks":
        """Of mean-pooled embeddings (n_d, C) of each training task's prompts.

        A new task is far when it is farther from all than the training tasks are from each other:
        N prompts of each, drawn DRAWS times, have a distance from the nearest other task, of which
        FAR are below that.
        """
        tasks = cls(tuple(pooled), np.stack([x.mean(axis=0) for x in pooled.values()]))
        if len(tasks.names) < 3:
            return tasks
        rng, nearest_other = np.random.default_rng(seed), []
        for own, x in enumerate(pooled.values()):
            for _ in range(DRAWS):
                drawn = x[rng.choice(len(x), min(num_prompts, len(x)), replace=False)]
                nearest_other.append(np.delete(tasks.distances(drawn), own).min())
        far_from = float(np.quantile(nearest_other, FAR))  # 0: of tasks that cannot be told apart
        each = [np.square(x - x.mean(axis=0)).sum(axis=1).mean() for x in pooled.values()]
        within = float(np.mean(each))
        return dataclasses.replace(
            tasks, far_from=far_from or None, within=within, drawn=num_prompts
        )

    def to_json(self) -> dict:
        """All but the means."""
        rest = {key: getattr(self, key) for key in DISTANCES}
        return {"names": list(self.names), **rest}

    def distances(self, prompts: np.ndarray) -> np.ndarray:
        """Embeddings (n, C) of a set of prompts -> the distance of its mean from each task's
        (D,)."""
        return np.linalg.norm(self.means - prompts.mean(axis=0), axis=1)

    def how_far(self, prompts: np.ndarray) -> float:
        """The distance of a set of prompts (n, C) from the nearest task in units of what is far: 1
        or more is; 0 where it is not known. The mean of fewer different prompts than `drawn` lies
        farther from its task's by chance: n prompts of shares s by within * (sum s^2 - 1 / drawn),
        squared."""
        if not self.far_from:
            return 0.0
        _, times = np.unique(prompts, axis=0, return_counts=True)
        fewer = np.square(times / times.sum()).sum() - 1 / self.drawn
        far = np.sqrt(self.far_from**2 + self.within * max(fewer, 0.0))
        return float(self.distances(prompts).min() / far)

    def cosines(self, prompts: np.ndarray) -> np.ndarray:
        """Embeddings (n, C) of a set of prompts -> its cosine with each task (D,)."""
        centre = self.means.mean(axis=0)
        query, tasks = prompts.mean(axis=0) - centre, self.means - centre
        norms = np.linalg.norm(query) * np.linalg.norm(tasks, axis=1) + 1e-12
        return tasks @ query / norms

    def closest(self, prompts: np.ndarray) -> tuple[tuple[str, float], ...]:
        """(name, cosine) of the LISTED tasks closest to a set of prompts (n, C), the closest
        first."""
        cosines = self.cosines(prompts)
        order = np.argsort(-cosines, kind="stable")[:LISTED]
        return tuple((self.names[i], float(cosines[i])) for i in order)


def tasks_of(raw: object) -> dict:
    """What a description says of the training tasks, {"task_names", "task_distances"}; nothing of
    an imported or older one. Raises KeyError, TypeError or ValueError for what cannot be."""
    if raw is None:
        return {}
    names, given = raw["names"], {"far_from": raw["far_from"]}  # the first had no other distance
    given |= {key: raw[key] for key in DISTANCES if key in raw}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("tasks.names are no names")
    for key, value in given.items():
        number = type(value) in (int, float) and 0 <= value < math.inf
        if not (number and (value or key == "within")) and (value, key) != (None, "far_from"):
            raise ValueError(f"tasks.{key} {value!r} is no distance")
    return {"task_names": tuple(names), "task_distances": given}


def trained_tasks(
    config: Config, suite: Suite, encoder: PromptEncoder, cache: str | os.PathLike
) -> TrainedTasks:
    """Of a suite's training tasks, by their condition texts; `cache`: where those are that were
    encoded before. With condition.in_graph by READ of each task."""
    pooled = {}
    for dataset in suite.train:
        texts = condition_texts(dataset.train, config.condition.form, config.seed)
        some = texts[:READ] if config.condition.in_graph else texts
        pooled[dataset.name] = encoder.cached_means(some, cache)
    return TrainedTasks.of(pooled, config.condition.num_prompts, config.seed)


def nearest(prompts: np.ndarray, tasks: Mapping[str, np.ndarray]) -> str:
    """The task, of those with mean-pooled embeddings (n_d, C), closest to prompts (n, C)."""
    means = np.stack([pooled.mean(axis=0) for pooled in tasks.values()])
    return TrainedTasks(tuple(tasks), means).closest(prompts)[0][0]
