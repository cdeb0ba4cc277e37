"""What `evaluate` draws by its seed."""

import numpy as np

from dnd_jax.generator.trained import draw_prompts
from dnd_jax.scoring.draws import seeds_of_draws

NAMES = [f"task_{i}" for i in range(40)]


def test_each_task_and_each_run_has_its_own_draws():
    of_runs = [[seeds_of_draws(name, seed, 5) for name in NAMES] for seed in (0, 1)]
    seeds = [s for run in of_runs for one in run for s in one]
    assert len(set(seeds)) == len(seeds) == 2 * 40 * 5
    assert of_runs[0] == [seeds_of_draws(name, 0, 5) for name in NAMES]
    assert seeds_of_draws("task_0", 0, 3) == seeds_of_draws("task_0", 0, 5)[:3]


def test_what_a_draw_shows_is_chance_for_every_task_anew():
    """Pools whose prompts show one half of a task or the other in turn, as those of `halves`: the
    tasks of one draw do not all see the same of each."""
    pool = [("first", "second")[i % 2] + f" {i}" for i in range(200)]
    shown = [
        sum(prompt.startswith("first") for prompt in draw_prompts(pool, 8, seeds[0]))
        for seeds in (seeds_of_draws(name, 0, 5) for name in NAMES)
    ]
    assert 3 < np.mean(shown) < 5 and len(set(shown)) > 3
