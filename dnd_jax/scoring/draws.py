"""What `evaluate` draws by its seed, before any score is known: prompts, and tasks for controls."""

from collections.abc import Sequence

import numpy as np

from dnd_jax.core import digests
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.generator.trained import draw_prompts


def seeds_of_draws(name: str, seed: int, samples: int) -> range:
    """The seeds of the S draws of a dataset's prompts in a run of this seed. Each dataset has its
    own: a draw that by chance tells little of one task is not one that tells little of all."""
    first = int(digests.of_texts([str(seed), name])[:5], 16)
    return range(first, first + samples)


def wrong_task(suite: Suite, name: str) -> Dataset:
    """The dataset whose prompts serve as the wrong ones for `name`: the one that the suite names,
    or the next unseen one of its kind, or else the next of all."""
    if name in suite.wrong:
        return next(d for d in suite.every if d.name == suite.wrong[name])
    same = [d for d in suite.unseen if suite.kinds[d.name] == suite.kinds[name]]
    pool = (
        same
        if len(same) > 1
        else suite.unseen
        if len(suite.unseen) > 1
        else [*suite.unseen, *suite.train]
    )
    at = [d.name for d in pool].index(name)
    return pool[(at + 1) % len(pool)]


def draw_training(names: Sequence[str], count: int, seed: int) -> tuple[str, ...] | None:
    """`count` of the names, drawn by the seed, in their order; none of them for -1. None: all."""
    if count == 0 or count >= len(names):
        return None
    rng = np.random.default_rng([seed, len(names)])
    chosen = set(rng.permutation(len(names))[: max(count, 0)].tolist())
    return tuple(name for i, name in enumerate(names) if i in chosen)


def repeat_few(prompts: Sequence[str], different: int, count: int, seed: int) -> Sequence[str]:
    """`different` of the prompts, drawn by the seed and repeated side by side to `count`; all
    prompts as they are for 0."""
    if not different:
        return prompts
    few = draw_prompts(prompts, different, seed)
    return [few[i * different // count] for i in range(count)]
