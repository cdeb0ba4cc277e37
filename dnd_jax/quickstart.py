"""Stage `quickstart`: the whole pipeline on a suite, one folder a seed, a table and a report at the end.

    dnd quickstart --workdir=runs/mini [--suite=DIR] [--seeds=0,1,2]

Every stage keeps what it has finished, so the same command goes on after any interruption and ends with the same numbers.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence

from dnd_jax import hygiene, report
from dnd_jax.adapters import checkpoint_folders
from dnd_jax.collect import collect, score_table
from dnd_jax.config import Config
from dnd_jax.errors import InputError
from dnd_jax.evaluate import evaluate
from dnd_jax.files import read_json, write_json
from dnd_jax.forms import condition_texts
from dnd_jax.pretrain import pretrain
from dnd_jax.results import combine
from dnd_jax.scoring import labels_of
from dnd_jax.stopping import stop
from dnd_jax.suite import Suite, load_suite
from dnd_jax.train import train
from dnd_jax.world import write_world

RESULTS, SECONDS = "results.json", "seconds.json"


@contextlib.contextmanager
def timed(workdir: pathlib.Path, stage: str) -> Iterator[None]:
    """Adds the block's wall time to the stage's seconds, over interruptions too."""
    started = time.perf_counter()
    try:
        yield
    finally:
        path = workdir / SECONDS
        seconds = read_json(path) if path.is_file() else {}
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - started, 2)
        write_json(path, seconds)


def open_suite(config: Config, workdir: pathlib.Path, strict: bool = False, scored: bool = False) -> Suite:
    """The configured suite, or the embedded one drawn by the seed and written to WORKDIR/suite; its faults are warned of.

    Raises InputError for a suite that cannot be read, one that lacks answers or labels which the configuration wants, with
    strict for faults in its data, and with scored for one without an unseen dataset.
    """
    if not config.suite and not (workdir / "suite" / "suite.json").is_file():
        write_world(workdir / "suite", config.seed)
    suite = load_suite(config.suite or workdir / "suite", config.condition.num_prompts)
    if scored and not suite.unseen:
        raise InputError(f"{config.suite or workdir / 'suite'}: names no unseen dataset, so there is nothing to score; add one")
    hygiene.check(suite, strict)
    for dataset in suite.train + suite.unseen:  # now, not after hours of training
        condition_texts(dataset.train, config.condition.form)
    if config.evaluate.answers == "likelihood":
        for dataset in suite.unseen:
            labels_of(dataset)
    return suite


def make_base(config: Config, suite: Suite, workdir: pathlib.Path) -> str:
    """The given base, or the one pretrained in the workdir."""
    return config.base.path or str(pretrain(config, suite, workdir))


def run_seed(config: Config, workdir: pathlib.Path, strict: bool = False) -> dict:
    """All stages of one seed; returns its evaluation with "suite", "train" and "seconds"."""
    workdir.mkdir(parents=True, exist_ok=True)
    with timed(workdir, "suite"):
        suite = open_suite(config, workdir, strict, scored=True)
    with timed(workdir, "pretrain"):
        base = make_base(config, suite, workdir)
    if not config.train.checkpoints:
        with timed(workdir, "collect"):
            loras = collect(config, suite, base, workdir)
        print(f"exact match of each LoRA on its own test questions:\n{score_table(loras)}", flush=True)
    with timed(workdir, "train"):
        train(config, suite, workdir)
    with timed(workdir, "evaluate"):
        evaluation = evaluate(config, suite, base, workdir)
    return {"suite": suite.name, "fingerprint": suite.fingerprint, **evaluation, "seconds": read_json(workdir / SECONDS)}


def finish(runs: dict[int, dict], config: Config, workdir: pathlib.Path) -> dict:
    """Writes results.json and report.html of the seeds' evaluations and prints the tables, the report's path last."""
    results = combine(runs, config)
    write_json(workdir / RESULTS, results)
    root = pathlib.Path(config.train.checkpoints or workdir / "loras")
    training = {name: folders[-1] for name, folders in checkpoint_folders(root, next(iter(runs.values()))["train"]).items()}
    page = report.write_report(workdir, results, training)
    for measure in ("content", "format"):
        print(f"\nright {measure}\n{report.table({**results, 'unseen': {}}, measure)}")
    print(f"\nexact match\n{report.table(results)}\n\n{results['rule']}\n{results['intervals']}\n{results['overhead']['note']}")
    print(f"seconds: {', '.join(f'{stage} {value:.0f}' for stage, value in results['seconds'].items())}")
    print(f"report: {page.absolute()}", flush=True)
    return results


def quickstart(config: Config, workdir: pathlib.Path, seeds: Sequence[int], strict: bool = False) -> dict:
    """Runs every seed, the first in WORKDIR itself and the others in WORKDIR/seed_N, and returns results.json's content."""
    runs = {}
    for seed in seeds:
        folder = workdir if seed == seeds[0] else workdir / f"seed_{seed}"
        if len(seeds) > 1:
            print(f"seed {seed} in {folder}", flush=True)
        runs[seed] = run_seed(dataclasses.replace(config, seed=seed), folder, strict)
        stop.check()
    return finish(runs, config, workdir)
