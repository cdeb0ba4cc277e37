"""Stage `controls`: LoRAs that generated adapters have to stand beside, WORKDIR/controls.

    dnd controls --config=configs/mini.py --workdir=runs/mini

multi_task: ONE LoRA for everything, tuned on the rows of all training datasets together, for
lora.steps times their number, and for a tenth of that. Each of
`controls.learning_rates` is tried, and the one kept whose held-in rows have the lowest loss: rows
of the training datasets that it is not tuned on, never a test's. few_shot: LoRAs tuned on a few
labelled examples of each unseen dataset, for lora.steps. Neither ends early by lora.flat_window.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dnd_jax.base.identity import base_digest
from dnd_jax.base.reading import check_reading
from dnd_jax.base.sequences import how_taught
from dnd_jax.config import schema
from dnd_jax.config.records import SAME_NUMBERS, check_same_run
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.core.formats import read_numbered, write_numbered
from dnd_jax.core.stage import Given
from dnd_jax.core.workdir import CONTROLS
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.loop.run import Diverged
from dnd_jax.loop.training import Options
from dnd_jax.lora.adapter import check_called
from dnd_jax.lora.found import CONFIG as ADAPTER
from dnd_jax.lora.tuning import Task, Tuning, run_stage
from dnd_jax.parallel import hosts

DONE = "controls.json"
FORMAT = 1  # of it
HELD_IN = 0.05  # share of a training dataset's rows that choose the learning rate
TENTH = 0.1
FEW_SHOT = (8, 64)  # labelled examples
PARTS = ("multi_task", "few_shot")  # of its description


def make_controls(
    config: Config,
    suite: Suite,
    base_path: str,
    workdir: pathlib.Path,
    allowed: Collection[str] = (),
    name: str = "",
) -> pathlib.Path:
    """Tunes the controls that the configuration asks for and returns WORKDIR/controls; what was
    made with the same settings is kept.

    allowed, name: as of `collect`. Several processes share the work; process 0 writes. Raises
    InputError as the loop does.
    """
    folder, c = workdir / CONTROLS, config.controls
    suite = suite.with_training(config.train.datasets, config.seed)
    record = _settings(config, suite, base_path)
    hosts.check_alike({"the suite's files": suite.fingerprint, "the base's files": record["base"]})
    made = _made(folder, record, allowed)
    wanted = {"multi_task": _multi_task} if c.multi_task else {}
    wanted |= {"few_shot": _few_shot} if c.few_shot else {}
    if hosts.agreed(wanted.keys() <= made.keys()):
        check_called((path.parent for path in folder.rglob(ADAPTER)), name)
        return folder
    with hosts.lead_first():
        check_reading(config, base_path)
    all_steps = dataclasses.replace(config, lora=_to_the_end(config.lora))
    tuning = Tuning.of(all_steps, base_path, name)
    taught = record | {"answer": how_taught(tuning.tokenizer)[0]}
    how = taught, Options(allowed=tuple(allowed))
    for part in (part for part in wanted if part not in made):
        made[part] = wanted[part](tuning, suite, folder, how)
        with hosts.lead_first():
            if hosts.lead():
                write_numbered(folder / DONE, FORMAT, {"settings": record, **made})
    return folder


def _made(folder: pathlib.Path, record: Mapping, allowed: Collection[str]) -> dict:
    """What of the controls is there, made with these settings; nothing where what differs is
    allowed to. Raises InputError for other settings."""
    if not (folder / DONE).is_file():
        return {}
    stored = read_numbered(folder / DONE, FORMAT)
    same = check_same_run(folder / DONE, stored["settings"], record, allowed)
    return {part: stored[part] for part in PARTS if part in stored} if same else {}


def _settings(config: Config, suite: Suite, base_path: str) -> dict:
    """What the controls depend on."""
    return {
        "seed": config.seed,
        "base": base_digest(base_path),
        "lora": dataclasses.asdict(_to_the_end(config.lora)),
        "controls": {"learning_rates": config.controls.learning_rates},
        "max_length": config.base.max_length,
        "suite": suite.fingerprint,
        "train": {"datasets": config.train.datasets},
    }


def _to_the_end(c: schema.Lora) -> schema.Lora:
    """How controls are tuned: they take all steps, and keep the last."""
    return dataclasses.replace(c, checkpoints=1, flat_window=0)


def find_controls(
    config: Config, suite: Suite, base_path: str, workdir: pathlib.Path
) -> dict[str, dict[str, pathlib.Path]]:
    """{method: {unseen dataset: adapter folder}} of what `make_controls` made, in WORKDIR or
    config.controls.folder, as far as the configuration asks for it; says what of that is not there.
    Raises InputError where it was made with other settings, and for a given folder that holds
    none."""
    given, c = config.controls.folder, config.controls
    if not c.multi_task and not c.few_shot:
        return {}
    folder = pathlib.Path(given) if given else workdir / CONTROLS
    there = (folder / DONE).is_file()
    if given and not there:
        raise InputError(f"{folder / DONE}: no such file; config.controls.folder holds one")
    stored = read_numbered(folder / DONE, FORMAT) if there else {}
    for part in (part for part in PARTS if getattr(c, part) and part not in stored):
        print(
            f"{folder}: no {part} LoRAs, so the table lacks their columns; `dnd controls` makes "
            f"them (config.controls.{part}=False asks for none)",
            flush=True,
        )
    if not there:
        return {}
    suite = suite.with_training(config.train.datasets, config.seed)
    # The seed of other LoRAs may be another, that of a draw of training datasets may not.
    other_seed = bool(given) and not config.train.datasets
    free = (*SAME_NUMBERS, *["seed"] * other_seed)
    now = _settings(config, suite, base_path)
    check_same_run(folder / DONE, stored["settings"], now, None, free=free)
    found = {}
    if c.multi_task and (one := stored.get("multi_task")):
        for method, steps in zip(("multi_task_tenth", "multi_task"), one["steps"], strict=True):
            path = folder / one["folder"] / f"step_{steps:06d}"
            found[method] = {d.name: path for d in suite.unseen}
    if c.few_shot and (few := stored.get("few_shot")):
        for count in few["counts"]:
            found[f"few_shot_{count}"] = {
                d.name: folder / f"few_shot_{count}" / d.name / f"step_{few['steps']:06d}"
                for d in suite.unseen
                if d.labeled and len(d.pool) >= count
            }
    return found


def _multi_task(tuning: Tuning, suite: Suite, folder: pathlib.Path, how: tuple) -> dict:
    """{"folder", "steps": (a tenth, all), "losses": {learning rate: of the held-in rows}} of ONE
    LoRA. A rate at which its loss is no number any more is none of them. Raises Diverged where all
    are so."""
    config, losses = tuning.config, {}
    rows, held = _split(suite.train, config.seed)
    train, held_in = (tuning.encoded(r, "the training datasets") for r in (rows, held))
    steps = config.lora.steps * len(suite.train)
    tenth = max(1, round(steps * TENTH))
    for rate in config.controls.learning_rates or (config.lora.learning_rate,):
        title = f"multi_task_{rate:g}"
        c = dataclasses.replace(config.lora, learning_rate=rate, steps=steps)
        task = Task(title, train, 1, also=(tenth,))
        try:
            lora, _ = tuning.train(title, folder / "training" / title, [task], folder, *how, lora=c)
        except Diverged as error:
            failed = error
            continue
        [score] = tuning.scores(lora, [held_in])
        losses[rate] = score.loss
    if not losses:
        raise failed
    best = min(losses, key=losses.get)
    return {
        "folder": f"multi_task_{best:g}",
        "steps": [tenth, steps],
        "losses": {f"{rate:g}": loss for rate, loss in losses.items()},
    }


def _split(datasets: Sequence[Dataset], seed: int) -> tuple[list[Example], list[Example]]:
    """The rows of all training datasets: (to tune on, held in)."""
    rng, rows, held = np.random.default_rng([seed, 3]), [], []
    for dataset in datasets:
        order = rng.permutation(len(dataset.train))
        count = min(max(1, round(HELD_IN * len(order))), len(order) - 1)
        held += [dataset.train[i] for i in order[:count]]
        rows += [dataset.train[i] for i in order[count:]]
    return rows, held


def _few_shot(tuning: Tuning, suite: Suite, folder: pathlib.Path, how: tuple) -> dict:
    """{"counts", "steps"} of the LoRAs FOLDER/few_shot_COUNT/DATASET, one for each count of
    labelled examples that an unseen dataset has."""
    steps, tasks = tuning.config.lora.steps, []
    for dataset in (d for d in suite.unseen if d.labeled):
        order = np.random.default_rng([tuning.config.seed, 5]).permutation(len(dataset.pool))
        for count in (n for n in FEW_SHOT if n <= len(order)):
            rows = [dataset.pool[i] for i in order[:count]]
            train = tuning.encoded(rows, f"{dataset.name}'s train")
            tasks.append(Task(f"few_shot_{count}/{dataset.name}", train, 1))
    if tasks:
        where = folder / "training" / "few_shot"
        tuning.train_in_groups("few shots", where, tasks, folder, *how)
    return {"counts": list(FEW_SHOT), "steps": steps}


def run(given: Given) -> None:
    """Runs the stage."""
    run_stage("controls", make_controls, "controls: {}".format, given)
