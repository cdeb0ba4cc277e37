"""Stage `collect`: one LoRA a dataset, all trained at once, as PEFT checkpoints
WORKDIR/loras/DATASET/step_NNNNNN.

    dnd collect --config=configs/mini.py --workdir=runs/mini

All tasks run in one jitted step (vmap over tasks, the base shared), start from the same A and read
their examples in the same order: checkpoints of different tasks then differ by their task alone,
without which a generator cannot compose them. Datasets of `train` keep each of the last M steps
(docs/METHOD.md section 1); unseen ones only the last, as the tuned reference of the report.
"""

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Collection

from dnd_jax.base.identity import base_digest, means_base
from dnd_jax.base.reading import check_reading
from dnd_jax.base.sequences import how_taught
from dnd_jax.config import schema
from dnd_jax.config.records import check_same_run
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import holds_only, read_json
from dnd_jax.core.formats import read_numbered, write_numbered
from dnd_jax.core.stage import Given
from dnd_jax.core.workdir import COLLECT, LORAS
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.data.suite_file import SPLITS
from dnd_jax.loop.training import Options
from dnd_jax.lora.adapter import check_called, is_ours
from dnd_jax.lora.listing import dataset_checkpoints
from dnd_jax.lora.peft_settings import CARD, CONFIG, WEIGHTS
from dnd_jax.lora.tuning import Task, Tuning, run_stage
from dnd_jax.parallel import hosts

DONE, FORMAT = "collect.json", 1  # what is written last, and the form that it has


def collect(
    config: Config,
    suite: Suite,
    base_path: str,
    workdir: pathlib.Path,
    allowed: Collection[str] = (),
    name: str = "",
) -> pathlib.Path:
    """Trains the LoRAs of all datasets of a suite and returns WORKDIR/loras; one made with the same
    settings is kept.

    allowed: names of settings that may differ from those of the run that is resumed. name: what the
    adapters call the base; empty: its hub id or absolute path. Writes loras/collect.json with each
    task's exact match on its test file. Several processes share the work; process 0 writes. Raises
    InputError as the loop does.
    """
    folder, c = workdir / LORAS, config.lora
    record = {
        "seed": config.seed,
        "base": base_digest(base_path),
        "lora": dataclasses.asdict(c),
        "max_length": config.base.max_length,
        "suite": suite.fingerprint,
    }
    older = {"base": lambda then: means_base(then, base_path)}
    hosts.check_alike({"the suite's files": suite.fingerprint, "the base's files": record["base"]})
    if hosts.agreed(_is_done(folder, suite, (record, allowed, older), name)):
        return folder
    _check_own(folder, suite)

    # The base, its LoRA and the tasks.
    with hosts.lead_first():
        check_reading(config, base_path)
    tuning = Tuning.of(config, base_path, name)
    # LoRAs half of whose steps an earlier version made may have been taught other tokens.
    taught, as_before = how_taught(tuning.tokenizer)
    older["answer"] = lambda then: then is None and as_before
    trained_on = len(suite.train)
    tasks = [_task(tuning, dataset, i < trained_on) for i, dataset in enumerate(suite.datasets)]

    # Training, a group of tasks after the other.
    with hosts.lead_first():
        ours = _kept(c, 0 if c.flat_window else c.steps)  # where a task flattens is not known yet
        for dataset in suite.datasets if hosts.lead() else ():
            _stale(folder / dataset.name, ours)  # now, not after hours of training
        (folder / DONE).unlink(missing_ok=True)  # while LoRAs are replaced, the folder is not whole
    options = Options(allowed=tuple(allowed), older=older)
    how = record | {"answer": taught}, options
    tuned = tuning.train_in_groups("collect", workdir / COLLECT, tasks, folder, *how)
    with hosts.lead_first():
        for task, (end, _) in tuned.items() if hosts.lead() else ():
            for stale in _stale(folder / task, _kept(c, end)):
                shutil.rmtree(stale)
        if hosts.lead():
            done = {"exact_match": {task: exact for task, (_, exact) in tuned.items()}}
            done |= {"steps": {task: end for task, (end, _) in tuned.items()}}
            write_numbered(folder / DONE, FORMAT, {"settings": record, **done})
    return folder


def _is_done(folder: pathlib.Path, suite: Suite, how: tuple, name: str) -> bool:
    """Whether the LoRAs are there, made with these settings. how, name: as of `check_same_run` and
    `check_called`, which raise InputError for others."""
    if not (folder / DONE).is_file():
        return False
    then = read_numbered(folder / DONE, FORMAT)["settings"]
    if not check_same_run(folder / DONE, then, *how):
        return False
    for dataset in suite.datasets:
        check_called(dataset_checkpoints(folder / dataset.name), name)
    return True


def _task(tuning: Tuning, dataset: Dataset, trained_on: bool) -> Task:
    """What is collected of a dataset: the last M checkpoints, of an unseen one the very last."""
    c = tuning.config.lora
    train, test = (
        tuning.encoded(getattr(dataset, split), f"{dataset.name}'s {split}") for split in SPLITS
    )
    return Task(dataset.name, train, c.checkpoints if trained_on else 1, test)


def _kept(c: schema.Lora, end: int) -> range:
    """The steps whose LoRAs may lie in the folder of a dataset that ended with this one."""
    return range(end - c.checkpoints + 1, end + 1)


def _stale(folder: pathlib.Path, kept: range) -> list[pathlib.Path]:
    """The checkpoints of a dataset that an interrupted run of other `steps` left. Raises InputError
    for one that holds more than `save_adapter` writes, so may not be removed."""
    found = []
    for path in folder.glob("step_*"):
        step = re.fullmatch(r"step_(\d{6})", path.name)
        if step and int(step[1]) not in kept:
            if not holds_only(path, (WEIGHTS, CONFIG, CARD)):
                raise InputError(
                    f"{path}: would count as a LoRA of this run, of other lora.steps, and holds "
                    "files that are not ours; move it away"
                )
            found.append(path)
    return found


def _check_own(folder: pathlib.Path, suite: Suite) -> None:
    """Raises InputError for LoRAs that lie where this stage writes its own, and are none of its:
    they would be replaced, or trained on with them."""
    faults = []
    for dataset in suite.datasets:
        there = dataset_checkpoints(folder / dataset.name)
        faults += [str(path) for path in there if path.is_file() or not is_ours(path)]
    if faults:
        raise listed(
            f"{folder}: holds LoRAs that `dnd collect` did not make; use another --workdir, or "
            f"train on them by `dnd train --config.train.checkpoints={folder}`",
            faults,
            most=3,
        )


def score_table(folder: pathlib.Path) -> str:
    """Each task's exact match on its test file, as text, with its steps where they differ."""
    done = read_json(folder / DONE)
    exact, steps = done["exact_match"], done.get("steps", {})
    width = max(map(len, exact))
    said = {name: f"  {steps[name]} steps" for name in steps if len(set(steps.values())) > 1}
    return "\n".join(
        f"  {name:<{width}}  {score:.3f}{said.get(name, '')}" for name, score in exact.items()
    )


def run(given: Given) -> None:
    """Runs the stage."""
    run_stage("collect", collect, _said, given)


def _said(folder: pathlib.Path) -> str:
    """What is printed of a folder of LoRAs."""
    return f"{score_table(folder)}\nLoRA checkpoints: {folder}"
