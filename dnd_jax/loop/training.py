"""What a training gives to the loop, and what a run of it may do differently."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dnd_jax.config.records import Older


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, on which data, for how long.

    A state is made by `init` only where there is no checkpoint: never two are held. The record
    (JSON) is kept with every checkpoint and must not change between runs.
    """

    title: str
    directory: pathlib.Path  # of metrics, checkpoints and profiles
    record: Mapping
    shapes: Any  # of the state, with shardings
    init: Callable[[], Any]  # -> the first state
    # (state, batch) -> (state, metrics); these hold "loss" and are read one step late
    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]]
    batch_at: Callable[[int], Any]  # i from 0 -> the batch of that step; a thread calls it
    steps: int
    save_every: int
    save_every_seconds: int = 0  # besides, after so many seconds without; 0: not by time
    # (steps done, state) -> whether nothing is left to train; asked where a state is saved
    ended: Callable[[int, Any], bool] = lambda done, state: False
    # (steps done, state), after each of them
    after_step: Callable[[int, Any], None] = lambda done, state: None
    # steps done -> state -> numbers to write with that step's, None where there are none
    score_at: Callable[[int], Callable[[Any], Mapping] | None] = lambda done: None
    # i -> the data of that step, for the message when its loss is not finite
    blame: Callable[[int], str] = lambda i: ""
    # (steps done, metrics, seconds) -> the numbers that are written
    row_of: Callable[[int, Mapping, float], Mapping] = lambda done, values, seconds: values


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run may do differently without training differently.

    checkpoint_dir: a folder or gs:// address (empty: in the run's directory). allowed: names of
    settings that may have changed, None where the user cannot give any. older: as of
    `check_same_run`. profile: traces the steps between these two. notes: JSON beside the record,
    not compared.
    """

    keep_last: int = 2
    keep_every: int = 0
    checkpoint_dir: str = ""
    local_dir: str = ""
    local_every_seconds: int = 60
    trackers: tuple[str, ...] = ()
    allowed: tuple[str, ...] | None = ()
    older: Older = dataclasses.field(default_factory=dict)
    profile: tuple[int, int] | None = None
    notes: Mapping = dataclasses.field(default_factory=dict)


USUAL = Options()
ALSO_SETTINGS = (  # of config.train, under these names
    "keep_last",
    "keep_every",
    "checkpoint_dir",
    "local_dir",
    "local_every_seconds",
    "trackers",
)
