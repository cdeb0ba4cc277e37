"""The loop that all training shares: dispatch, delayed metric reads, progress, checkpoints, exact
resume, clean stops.

A training gives a jitted `step(state, batch) -> (state, metrics)`, a pure `batch_at(step)` and its
first state; the loop does the rest. Position in the data is the step itself: a batch is a function
of (seed, step), so a resumed run sees what it would have seen.
"""

import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tqdm import tqdm

from dnd_jax.config.records import Older
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import FULL, unreadable
from dnd_jax.core.stopping import Stopped, stop
from dnd_jax.loop.checkpoints import CHECKPOINTS, FORMAT, address, open_checkpoints, restore, sums
from dnd_jax.loop.metrics import Metrics
from dnd_jax.loop.prefetch import ahead
from dnd_jax.loop.profiler import Profiler
from dnd_jax.parallel import hosts, programs

SHOWN = ("loss", "accuracy", "gradient_norm", "held_in_exact")  # beside the progress bar


class Diverged(InputError):
    """A loss or gradient that is no number any more."""


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
    trackers: tuple[str, ...] = ()
    allowed: tuple[str, ...] | None = ()
    older: Older = dataclasses.field(default_factory=dict)
    profile: tuple[int, int] | None = None
    notes: Mapping = dataclasses.field(default_factory=dict)


def run_loop(training: Training, options: Options = Options()) -> Any:
    """Trains from the newest checkpoint, or from the first state, to `training.steps` or until it
    has ended, and returns the state.

    With several processes, all run this; process 0 writes and shows. Raises Stopped after saving
    when a stop was asked for, Lost without where another run has the folder, InputError when
    checkpoints do not fit or are past the steps, the loss is not finite or the disk refuses.
    """
    training.directory.mkdir(parents=True, exist_ok=True)
    saves = _Saves(training, options)
    first, state = saves.resume()
    last = first if training.ended(first, state) else training.steps
    reports = _Reports(training, options, first)
    profiler = Profiler(training.directory, options.profile)
    try:
        profiler.at(first, state)
        for i, batch, waited in ahead(training.batch_at, first, last):
            state, values = training.step(state, batch)  # dispatched, not waited for
            reports.read(saves.last)  # of the step before
            reports.pending = i + 1, values, waited
            if (score := training.score_at(i + 1)) is not None:
                reports.score(score, state)
            profiler.at(i + 1, state)
            stop.check_lost()
            training.after_step(i + 1, state)
            stopping = _stopping(i + 1)
            saving = stopping or (i + 1) % training.save_every == 0 or i + 1 == training.steps
            saving = saves.late(i + 1) or saving  # asked in every step: all processes look together
            if saving:
                reports.read(saves.last)  # only a state whose loss was seen to be finite is saved
                reports.besides(functools.partial(saves.save, i + 1, state))
            if stopping:
                raise Stopped(stop.signum or signal.SIGTERM, stop.notice, agreed=True)
            if saving and training.ended(i + 1, state):
                break
        reports.read(saves.last)
    except (OSError, ValueError) as error:
        raise _disk_error(error, training.directory, saves.directory) from error
    finally:
        profiler.close()
        reports.close()
        saves.close()
    return state


def _stopping(done: int) -> bool:
    """Whether to stop after so many steps. A process by itself stops where it is; joined ones agree
    on a step, and JAX has their SIGTERM."""
    if stop.shared:
        return multihost_utils.reached_preemption_sync_point(done)
    return stop.signum is not None


class _Saves:
    """The checkpoints of a run."""

    def __init__(self, training: Training, options: Options):
        self._training, self._options = training, options
        self._record = json.loads(json.dumps(training.record))
        self._manager = open_checkpoints(
            address(options.checkpoint_dir or training.directory / CHECKPOINTS),
            options.keep_last,
            options.keep_every,
        )
        self._saved = 0
        self._look, self._since = 0, time.perf_counter()  # a step, and the time of the last save
        self._pace = 0, self._since  # a step, and the time after it

    @property
    def last(self) -> str:
        """Where the newest one lies."""
        return f"{self._manager.directory}/{self._saved}" if self._saved else "none"

    def resume(self) -> tuple[int, Any]:
        """(steps done, state): of the newest checkpoint, or a first state."""
        t, options = self._training, self._options
        same = self._record, options.allowed, options.older
        done, state = restore(self._manager, t.shapes, *same)
        if done > t.steps:
            raise InputError(
                f"{t.title}: {self._manager.directory} holds {done} steps, {t.steps} are asked "
                f"for; ask for {done} or more, or train fewer in another --workdir"
            )
        self._saved, self._look, self._pace = done, done + 1, (done, time.perf_counter())
        return (done, state) if done else (0, t.init())

    def late(self, done: int) -> bool:
        """Whether process 0 has saved nothing for `save_every_seconds`. It is asked for its clock
        after 1 step, and then where half of what was left would be over."""
        if not self._training.save_every_seconds or done < self._look:
            return False
        now, (step, then) = time.perf_counter(), self._pace
        left = self._training.save_every_seconds - (now - self._since)
        more = int(left / 2 * (done - step) / (now - then))
        more = hosts.of_lead(max(1, more) if left > 0 else 0)
        self._look, self._pace = done + max(1, more), (done, now)
        return not more

    def save(self, done: int, state: Any) -> None:
        """Begins to write the state after so many steps, unless it is there already."""
        if done == self._saved:
            return
        record = {"format": FORMAT, "settings": self._record, "step": done, "data_position": done}
        record |= {"sums": sums(state), **self._options.notes}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        self._manager.save(done, args=args)
        self._saved, self._since = done, time.perf_counter()

    @property
    def directory(self) -> os.PathLike:
        """Where the checkpoints are: a folder or gs:// address."""
        return self._manager.directory

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _disk_error(error, self._training.directory, self.directory) from error
        finally:
            self._manager.close()


class _Reports:
    """The numbers of a run: read one step late, checked, written and shown."""

    def __init__(self, training: Training, options: Options, first: int):
        self._training = training
        self.pending: tuple[int, Mapping, float] | None = None  # steps done, metrics, input seconds
        self._metrics = None
        if hosts.lead():
            self._metrics = Metrics(training.directory, first, options.trackers, training.title)
        self._bar = tqdm(
            total=training.steps,
            initial=first,
            desc=training.title,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            smoothing=0.1,
            disable=not hosts.lead(),
        )
        self._started = time.perf_counter()
        self._compiled = programs.compiling()
        self._begun = False

    def read(self, last_saved: str) -> None:
        """Waits for the pending metrics and writes them; raises InputError where they are not
        finite. last_saved: the last good checkpoint, for its message."""
        if self.pending is None:
            return
        (done, values, waited), self.pending = self.pending, None
        row = {key: np.asarray(value).tolist() for key, value in values.items()}
        self._check(done, row, last_saved)

        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        row = self._training.row_of(done, row, seconds)
        if self._metrics is not None:
            times = {"seconds": round(seconds, 4), "input_seconds": round(waited, 4)}
            before, self._compiled = self._compiled, programs.compiling()
            lost = waited + self._compiled - before
            self._metrics.write({"step": done, **row, **times}, max(0.0, seconds - lost))
            if not self._begun and (line := programs.from_cache()):
                self._bar.write(line)
        self._begun = True
        self._bar.update(1)
        shown = {key: f"{row[key]:.3g}" for key in SHOWN if key in row}
        self._bar.set_postfix(shown, refresh=False)

    def score(self, score: Callable[[Any], Mapping], state: Any) -> None:
        """Adds what takes a while to the pending numbers; its time is no step's."""
        done, values, waited = self.pending
        values = jax.device_get(dict(values))
        more = self.besides(lambda: score(state))
        self.pending = done, {**values, **more}, waited

    def besides(self, work: Callable[[], Any]) -> Any:
        """Does what is no step's: its time does not count as one's."""
        started = time.perf_counter()
        found = work()
        self._started += time.perf_counter() - started
        return found

    def _check(self, done: int, row: Mapping, last_saved: str) -> None:
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(row.get(name, 0)):
                raise Diverged(
                    f"{self._training.title}: the {name.replace('_', ' ')} is {row[name]} at step "
                    f"{done}{self._training.blame(done - 1)}; last good checkpoint: {last_saved}; "
                    "lower the learning rate or mend the data"
                )

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.close()
        if self._metrics is not None:
            self._metrics.close()


def _disk_error(error: Exception, *ours: os.PathLike) -> Exception:
    """The user's line for a disk that refuses, for a file that cannot be read or for another fault
    of the system; any other error as it is. ours: the folders that the run writes to.

    Orbax reports a full disk as ValueError.
    """
    if isinstance(error, InputError):
        return error
    if isinstance(error, ValueError) and "No space left" in str(error):
        error = OSError(errno.ENOSPC, "No space left on device")
    if not isinstance(error, OSError):
        return error
    file = None if error.filename is None else pathlib.Path(os.fsdecode(error.filename)).absolute()
    roots = [pathlib.Path(folder).absolute() for folder in ours]
    inside = file is not None and any(file.is_relative_to(root) for root in roots)
    if inside or error.errno in FULL:
        return InputError(
            f"{file if inside else ours[0]}: cannot write ({error.strerror or error}); free some "
            "space and run the same command"
        )
    if file is not None:
        return unreadable(error)
    return InputError(f"{ours[0]}: {type(error).__name__} ({error}); run the same command again")
