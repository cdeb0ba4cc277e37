"""Stage `quickstart`: the whole pipeline on a suite, one folder a seed, a table and a report at the end.

    dnd quickstart --workdir=runs/mini [--suite=DIR] [--seeds=0,1,2]

Every stage keeps what it has finished, so the same command goes on after any interruption and ends with the same numbers.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence

from dnd_jax import loop, report
from dnd_jax.adapters import checkpoint_folders
from dnd_jax.collect import collect, score_table
from dnd_jax.config import Config
from dnd_jax.errors import InputError
from dnd_jax.evaluate import evaluate
from dnd_jax.files import read_json, write_json
from dnd_jax.pretrain import pretrain
from dnd_jax.suite import Suite, load_suite
from dnd_jax.train import train
from dnd_jax.world import write_world

RESULTS, SECONDS = "results.json", "seconds.json"
RULE = (
    "Selection: none. {samples} adapters a dataset from {samples} seeded draws of {n} prompts, mean and spread over them; the generator is "
    "the one after its last step."
)


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


def open_suite(config: Config, workdir: pathlib.Path) -> Suite:
    """The configured suite, or the embedded one drawn by the seed and written to WORKDIR/suite."""
    if not config.suite and not (workdir / "suite" / "suite.json").is_file():
        write_world(workdir / "suite", config.seed)
    return load_suite(config.suite or workdir / "suite", config.condition.num_prompts)


def base_path(config: Config, suite: Suite, workdir: pathlib.Path) -> str:
    """The given base, or the one pretrained here."""
    return config.base.path or str(pretrain(config, suite, workdir))


def run_seed(config: Config, workdir: pathlib.Path) -> dict:
    """All stages of one seed; returns its evaluation with "suite" and "seconds"."""
    with timed(workdir, "suite"):
        suite = open_suite(config, workdir)
    if not suite.unseen:
        raise InputError(f"{suite.root}/suite.json: unseen names no dataset, so there is nothing to generate for")
    with timed(workdir, "pretrain"):
        base = base_path(config, suite, workdir)
    with timed(workdir, "collect"):
        loras = collect(config, suite, base, workdir)
    print(f"exact match of each LoRA on its own test questions:\n{score_table(loras)}", flush=True)
    with timed(workdir, "train"):
        train(config, suite, workdir)
    with timed(workdir, "evaluate"):
        evaluation = evaluate(config, suite, base, workdir)
    return {"suite": suite.name, "train": [d.name for d in suite.train], **evaluation, "seconds": read_json(workdir / SECONDS)}


def combine(runs: dict[int, dict], config: Config) -> dict:
    """results.json from each seed's evaluation: datasets averaged over the seeds that have them, and the spread over seeds."""
    seeds = list(runs)
    first = runs[seeds[0]]
    names = list(dict.fromkeys(name for run in runs.values() for name in run["unseen"]))
    unseen = {}
    for name in names:
        entries = [run["unseen"][name] for run in runs.values() if name in run["unseen"]]
        unseen[name] = entries[0] if len(entries) == 1 else {"kind": entries[0]["kind"], **report.mean_scores(entries)}
    mean = report.summarise(unseen)
    if len(runs) > 1:
        # A seed counts once, however many datasets of a kind it has.
        by_seed = {seed: report.summarise(run["unseen"]) for seed, run in runs.items()}
        mean = report.mean_scores(list(by_seed.values()))
        kinds = list(dict.fromkeys(kind for s in by_seed.values() for kind in s["by_kind"]))
        mean["by_kind"] = {kind: report.mean_scores([s["by_kind"][kind] for s in by_seed.values() if kind in s["by_kind"]]) for kind in kinds}
        for kind, entry in (("", mean), *mean["by_kind"].items()):
            values = [(s["by_kind"].get(kind) if kind else s) for s in by_seed.values()]
            scores = [v["generated"]["mean"] for v in values if v]
            entry["generated"] |= {"std_over_seeds": statistics.pstdev(scores), "by_seed": scores}
    results = {
        "suite": first["suite"],
        "seeds": seeds,
        "rule": RULE.format(samples=config.evaluate.samples, n=config.condition.num_prompts),
        "unseen": unseen,
        "mean": mean,
        "overhead": first["overhead"],
        "agreement": {
            "answers": sum(r["agreement"]["answers"] for r in runs.values()),
            "same_answers": sum(r["agreement"]["same_answers"] for r in runs.values()),
            "largest_logit_difference": max(r["agreement"]["largest_logit_difference"] for r in runs.values()),
        },
        "seconds": {stage: statistics.fmean(r["seconds"].get(stage, 0.0) for r in runs.values()) for stage in first["seconds"]},
    }
    if len(runs) > 1:
        results["runs"] = {str(seed): {"unseen": run["unseen"], "seconds": run["seconds"]} for seed, run in runs.items()}
    return results


def quickstart(config: Config, workdir: pathlib.Path, seeds: Sequence[int]) -> dict:
    """Runs every seed (the first in WORKDIR itself, the others in WORKDIR/seed_N), writes results.json and report.html, prints the table."""
    workdir.mkdir(parents=True, exist_ok=True)
    runs = {}
    for seed in seeds:
        folder = workdir if seed == seeds[0] else workdir / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if len(seeds) > 1:
            print(f"seed {seed} in {folder}", flush=True)
        runs[seed] = run_seed(dataclasses.replace(config, seed=seed), folder)
        loop.stop.check()
    results = combine(runs, config)
    write_json(workdir / RESULTS, results)
    root = pathlib.Path(config.train.checkpoints or workdir / "loras")
    training = {name: folders[-1] for name, folders in checkpoint_folders(root, runs[seeds[0]]["train"]).items()}
    page = report.write_report(workdir, results, training)
    print(f"\n{results['rule']}\n\nExact match\n{report.table(results)}\n")
    for measure in ("content", "format"):
        print(f"Right {measure}\n{report.table({**results, 'unseen': {}}, measure)}\n")
    print(results["overhead"]["note"])
    print(f"seconds: {', '.join(f'{stage} {value:.0f}' for stage, value in results['seconds'].items())}")
    print(f"report: {page.absolute()}")
    return results
