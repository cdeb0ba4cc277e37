"""Stage `quickstart`: the whole pipeline on a suite, one folder a seed, a table and a report at the
end.

    dnd quickstart --workdir=runs/mini [--suite=DIR] [--seeds=0,1,2 [--share]]

With --share the seeds after the first draw the generator and its prompts alone, on the suite, base,
LoRAs and controls of the first. Every stage keeps what it has finished, so the same command goes on
after any interruption and ends with the same numbers.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Sequence

from dnd_jax.base.pretrain import make_base
from dnd_jax.base.torch_base import device_of
from dnd_jax.config.remembered import remembering
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.core.stage import Given
from dnd_jax.core.stopping import stop
from dnd_jax.core.workdir import BASE, CONTROLS, LORAS, RESULTS, SUITE, held, timed
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import Suite
from dnd_jax.generator.train import train
from dnd_jax.lora.collect import collect, score_table
from dnd_jax.lora.controls import make_controls
from dnd_jax.scoring.candidates import has_checkpoints
from dnd_jax.scoring.evaluate import evaluate, run_of
from dnd_jax.scoring.measured import measure
from dnd_jax.scoring.report import publish, publish_measured
from dnd_jax.studies.outlook import outlook

NO_LORAS = (
    "train.objective needs no LoRAs: no LoRA is collected, and the table lacks the columns "
    "made of them (nearest, ridge, mean adapter, train mean and best, tuned); `dnd collect` with "
    "the same settings and --workdir, before, gives it these"
)


def run_seed(
    config: Config,
    workdir: pathlib.Path,
    strict: bool = False,
    allowed: Collection[str] = (),
    base_name: str = "",
    begin: Callable[[Config, Suite], None] = lambda config, suite: None,
) -> tuple[dict, Callable[..., dict]]:
    """All stages of one seed: (what a report says of it, `measure` of it). begin: is called before
    any that takes long."""
    with held(workdir, "quickstart"):
        return _stages(config, workdir, strict, allowed, base_name, begin)


def _stages(
    config: Config,
    workdir: pathlib.Path,
    strict: bool,
    allowed: Collection[str],
    base_name: str,
    begin: Callable[[Config, Suite], None],
) -> tuple[dict, Callable[..., dict]]:
    if not config.evaluate.engine:
        device_of(config.evaluate.device)  # before the hours until it is asked
    with timed(workdir, "suite"):
        suite = open_suite(config, workdir, strict, scored=True)
    begin(config, suite)
    with timed(workdir, "pretrain"):
        base = make_base(config, suite, workdir, allowed)
    if not config.train.from_loras:
        if not has_checkpoints(config, suite, workdir):
            print(NO_LORAS, flush=True)
    elif not config.train.checkpoints:
        with timed(workdir, "collect"):
            loras = collect(config, suite, base, workdir, allowed, base_name)
        print(
            f"exact match of each LoRA on its own test questions:\n{score_table(loras)}", flush=True
        )
    if (config.controls.multi_task or config.controls.few_shot) and not config.controls.folder:
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
    share: bool = False,
) -> dict:
    """Runs every seed, the first in WORKDIR itself and the others in WORKDIR/seed_N, and returns
    results.json's content. What is measured beside the scores comes when all are reported: the
    agreement of every seed, the overhead of the first. again: as of `measure`. share: what the
    first seed made serves the others. Raises InputError for share with a draw of datasets."""
    runs, measures = {}, {}

    def begin(config: Config, suite: Suite) -> None:
        whole = config.seed == seeds[0] and not config.train.checkpoints
        if whole and not (workdir / RESULTS).is_file():
            print(outlook(config, suite, len(seeds), share), flush=True)

    if share and config.train.datasets:
        raise InputError(
            f"--share: with config.train.datasets = {config.train.datasets} each seed draws other "
            "training datasets, of which it needs the controls; leave one of the two out"
        )
    for seed in seeds:
        folder = workdir if seed == seeds[0] else workdir / f"seed_{seed}"
        if len(seeds) > 1:
            print(f"seed {seed} in {folder}", flush=True)
        own = dataclasses.replace(config, seed=seed)
        if seed != seeds[0]:
            own = apart(own, folder.name)
        if share and seed != seeds[0]:
            own = _sharing(own, workdir)
        with held(folder, "quickstart"), remembering(folder, own):
            runs[seed], measures[seed] = run_seed(own, folder, strict, allowed, base_name, begin)
        stop.check()
    publish(runs, config, workdir)
    for seed in seeds:
        names = ("agreement", "overhead")[: 2 if seed == seeds[0] else 1]
        runs[seed] |= measures[seed](names, again)
    return publish_measured(runs, config, workdir)


def apart(config: Config, name: str) -> Config:
    """The settings with the generator's checkpoints in a folder of this name, in the one that is
    given for several runs, if one is."""
    if not config.train.checkpoint_dir:
        return config
    folder = f"{config.train.checkpoint_dir.rstrip('/')}/{name}"
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, checkpoint_dir=folder)
    )


def _sharing(config: Config, first: pathlib.Path) -> Config:
    """The settings with what the run in folder `first` made in place of what a seed makes."""
    loras = first / LORAS
    base = dataclasses.replace(config.base, path=config.base.path or str(first / BASE))
    train = dataclasses.replace(
        config.train,
        checkpoints=config.train.checkpoints or (str(loras) if loras.is_dir() else ""),
    )
    made = str(first / CONTROLS) if (first / CONTROLS).is_dir() else ""
    controls = dataclasses.replace(config.controls, folder=config.controls.folder or made)
    suite = config.suite or str(first / SUITE)
    return dataclasses.replace(config, suite=suite, base=base, train=train, controls=controls)


def run(given: Given) -> None:
    """Runs the stage."""
    how = [given[name] for name in ("strict", "allow", "base-name", "remeasure", "share")]
    quickstart(given.config, given.workdir, given.seeds(), *how)
