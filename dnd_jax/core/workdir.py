"""A run's folder: every path in it, by name; and who has it."""

import contextlib
import functools
import pathlib
import tempfile
import time
from collections.abc import Iterator

from dnd_jax.core import files
from dnd_jax.core.errors import InputError, is_passing
from dnd_jax.core.lock import locked
from dnd_jax.core.stopping import stop

CONFIG = "config.json"  # the settings that the run goes on with
REVISIONS = "revisions.json"  # {hub id: the commit that the run took}
SUITE = "suite"  # the embedded suite, where none is given
SUITE_FAULTS = "suite_faults.json"  # of the suite that was checked last
PROMPTS_CUT = "prompts_cut.json"  # of the suite that was trained on last
PRETRAIN = "pretrain"  # metrics and checkpoints of the base's training
BASE = "base"  # the base as a Hugging Face folder
COLLECT = "collect"  # metrics and checkpoints of the LoRAs' training
CONTROLS = "controls"  # METHOD, METHOD/DATASET: LoRAs that are scored beside the generated ones
LORAS = "loras"  # DATASET/step_NNNNNN, PEFT folders
TARGETS = "targets"  # DATASET/KEY: checkpoints as tokens, made once
EMBEDDINGS = "embeddings"  # the text encoder's output, by content
GENERATOR = "generator"  # the generator, its metrics and checkpoints
ADAPTERS = "adapters"  # NAME: the first generated adapter of each unseen dataset
COMPETITORS = "competitors"  # METHOD/NAME: the other adapters that are scored
EVALUATION = "evaluation.json"  # scores question by question
RESULTS = "results.json"  # tables
REPORT = "report.html"
SECONDS = "seconds.json"  # of each stage
HARNESS = "lm_eval.json"  # what `dnd lm-eval` found
PROGRAMS = "programs"  # compiled ones, of a run of several processes
METRICS = "metrics.jsonl"  # of a training, in its folder: written anew when it begins
# The folders of trainings, groups of LoRAs and controls among them.
TRAININGS = (PRETRAIN, COLLECT, f"{COLLECT}/group_*", GENERATOR)
TRAININGS += (f"{CONTROLS}/training/*", f"{CONTROLS}/training/*/group_*")
# What stages write as soon as they have made something with the run's settings.
MADE = (*[f"{folder}/{METRICS}" for folder in TRAININGS], EVALUATION, "lm_eval/*.json")
# The folders among them: nothing else in a workdir may have such a name.
NAMES = (SUITE, PRETRAIN, BASE, COLLECT, LORAS, CONTROLS, TARGETS, EMBEDDINGS, GENERATOR)
NAMES += (ADAPTERS, COMPETITORS, PROGRAMS, "lm_eval", "plans", "profile")


@contextlib.contextmanager
def held(workdir: pathlib.Path, stage: str) -> Iterator[None]:
    """The folder of a run, made if it is not there, for this process alone while the block lasts;
    a stage may hold it again inside. Readers need not.

    Raises InputError that says who has it: stage, process, host and since when; and as
    `check_renames`.
    """
    with locked(workdir, stage):
        check_renames(workdir)
        yield


@functools.cache
def check_renames(folder: pathlib.Path) -> None:
    """Raises InputError where the file system does not rename folders with something in them: each
    that a run writes gets its name when it is whole. Asked once."""
    with tempfile.TemporaryDirectory(prefix=".renames_", dir=folder) as inside:
        before = pathlib.Path(inside, "before")
        before.mkdir()
        (before / "file").touch()
        try:
            before.rename(pathlib.Path(inside, "after"))
        except OSError as error:
            if is_passing(error) or error.errno in files.FULL:
                raise
            raise InputError(
                f"{folder}: folders cannot be renamed there ({error.strerror}), as each that is "
                "written must be; mount GCS FUSE with rename-dir-limit=200000, or take a bucket "
                "with a hierarchical namespace, or another file system"
            ) from None


@contextlib.contextmanager
def timed(workdir: pathlib.Path, stage: str) -> Iterator[None]:
    """Adds the block's wall time to the stage's seconds, over interruptions too."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if not stop.lost:  # the folder is still this run's
            path = workdir / SECONDS
            seconds: dict = {}
            with contextlib.suppress(InputError):  # absent, or damaged: it is only told
                seconds = files.read_object(path)
            before = seconds.get(stage)
            before = before if isinstance(before, int | float) else 0.0
            seconds[stage] = round(before + time.perf_counter() - started, 2)
            files.write_json(path, seconds)
