"""Stage `quickstart`: the whole pipeline on a suite, one folder a seed, a table and a report at the
end.

    dnd quickstart --workdir=runs/mini [--suite=DIR] [--seeds=0,1,2]

Every stage keeps what it has finished, so the same command goes on after any interruption and ends
with the same numbers.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Sequence

from dnd_jax.base.pretrain import make_base
from dnd_jax.config.remembered import remembering
from dnd_jax.config.schema import Config
from dnd_jax.core.stage import ALLOW, BASE_NAME, ON_SUITE, SEEDS, Given, Stage
from dnd_jax.core.stopping import stop
from dnd_jax.core.workdir import held, timed
from dnd_jax.data.opened import open_suite
from dnd_jax.generator.train import needs as training_needs
from dnd_jax.generator.train import train
from dnd_jax.lora.collect import collect, score_table
from dnd_jax.lora.controls import make_controls
from dnd_jax.scoring.evaluate import REMEASURE, evaluate, run_of
from dnd_jax.scoring.evaluate import needs as evaluation_needs
from dnd_jax.scoring.measured import measure
from dnd_jax.scoring.report import publish, publish_measured


def run_seed(
    config: Config,
    workdir: pathlib.Path,
    strict: bool = False,
    allowed: Collection[str] = (),
    base_name: str = "",
) -> tuple[dict, Callable[..., dict]]:
    """All stages of one seed: (what a report says of it, `measure` of it)."""
    with held(workdir, "quickstart"):
        return _stages(config, workdir, strict, allowed, base_name)


def _stages(
    config: Config, workdir: pathlib.Path, strict: bool, allowed: Collection[str], base_name: str
) -> tuple[dict, Callable[..., dict]]:
    with timed(workdir, "suite"):
        suite = open_suite(config, workdir, strict, scored=True)
    with timed(workdir, "pretrain"):
        base = make_base(config, suite, workdir, allowed)
    if not config.train.checkpoints:
        with timed(workdir, "collect"):
            loras = collect(config, suite, base, workdir, allowed, base_name)
        print(
            f"exact match of each LoRA on its own test questions:\n{score_table(loras)}", flush=True
        )
    if config.controls.multi_task or config.controls.few_shot:
        with timed(workdir, "controls"):
            make_controls(config, suite, base, workdir, allowed, base_name)
    with timed(workdir, "train"):
        train(config, suite, workdir, allowed, base_name=base_name)
    with timed(workdir, "evaluate"):
        evaluation = evaluate(config, suite, base, workdir, allowed)
    measured = functools.partial(measure, config, suite, base, workdir)
    return run_of(suite, evaluation, workdir), measured


def quickstart(
    config: Config,
    workdir: pathlib.Path,
    seeds: Sequence[int],
    strict: bool = False,
    allowed: Collection[str] = (),
    base_name: str = "",
    again: bool = False,
) -> dict:
    """Runs every seed, the first in WORKDIR itself and the others in WORKDIR/seed_N, and returns
    results.json's content. What is measured beside the scores comes when all are reported: the
    agreement of every seed, the overhead of the first. again: as of `measure`."""
    runs, measures = {}, {}
    for seed in seeds:
        folder = workdir if seed == seeds[0] else workdir / f"seed_{seed}"
        if len(seeds) > 1:
            print(f"seed {seed} in {folder}", flush=True)
        own = dataclasses.replace(config, seed=seed)
        with held(folder, "quickstart"), remembering(folder, own):
            runs[seed], measures[seed] = run_seed(own, folder, strict, allowed, base_name)
        stop.check()
    publish(runs, config, workdir)
    for seed in seeds:
        names = ("agreement", "overhead")[: 2 if seed == seeds[0] else 1]
        runs[seed] |= measures[seed](names, again)
    return publish_measured(runs, config, workdir)


def _run(given: Given) -> None:
    how = given["strict"], given["allow"], given["base-name"], given["remeasure"]
    quickstart(given.config, given.workdir, given.seeds(), *how)


def needs(config: Config) -> tuple[str, ...]:
    """The modules beyond a plain install that any of the stages needs."""
    return (*evaluation_needs(config), *training_needs(config))


STAGE = Stage(
    _run,
    (*ON_SUITE, SEEDS, ALLOW, BASE_NAME, REMEASURE),
    lambda given: needs(given.config),
    fallback="mini",
    writes=True,
)
