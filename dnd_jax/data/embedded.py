"""Stage `suite`: the suites that come with dnd_jax, drawn by a seed.

    dnd suite --out=DIR [--name=world] [--config.seed=0] [--config.embedded_tasks=0]

world: a little world of facts, for a base that is pretrained on it in minutes. skills: tasks in
plain English, for a real base. skills_large: the same on more kinds of lists, hundreds of tasks.
"""

import os
import pathlib
from collections.abc import Callable, Mapping

from dnd_jax.config.schema import EMBEDDED
from dnd_jax.core.errors import InputError, nearest
from dnd_jax.core.files import check_free
from dnd_jax.core.stage import Given
from dnd_jax.data.skills import write_skills
from dnd_jax.data.skills_large import write_skills_large
from dnd_jax.data.world import write_world

# Name -> what writes it: (folder, seed, unseen tasks a kind).
SUITES: Mapping[str, Callable[[str | os.PathLike, int, int], None]] = dict(
    zip(EMBEDDED, (write_world, write_skills, write_skills_large), strict=True)
)


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("out")
    name = given["name"] or given.config.embedded
    if name not in SUITES:
        raise InputError(f"--name={name}: none of {', '.join(SUITES)}{nearest(name, SUITES)}")
    check_free(given["out"], "out")
    SUITES[name](given["out"], given.config.seed, given.config.embedded_tasks)
    print(f"suite: {pathlib.Path(given['out']).absolute()}")
