"""The loop that all training shares: dispatch, delayed metric reads, progress, checkpoints, exact
resume, clean stops.

A training gives a jitted `step(state, batch) -> (state, metrics)`, a pure `batch_at(step)` and its
first state; the loop does the rest. Position in the data is the step itself: a batch is a function
of (seed, step), so a resumed run sees what it would have seen.
"""

import functools
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dnd_jax.core.errors import InputError
from dnd_jax.core.stopping import Stopped, stop
from dnd_jax.loop.metrics import Metrics
from dnd_jax.loop.prefetch import ahead
from dnd_jax.loop.profiler import Profiler
from dnd_jax.loop.saves import Saves, disk_error
from dnd_jax.loop.training import USUAL, Options, Training
from dnd_jax.parallel import hosts, programs

SHOWN = ("loss", "accuracy", "gradient_norm", "held_in_exact")  # beside the progress bar


class Diverged(InputError):
    """A loss or gradient that is no number any more."""


def run_loop(training: Training, options: Options = USUAL) -> Any:
    """Trains from the newest checkpoint, or from the first state, to `training.steps` or until it
    has ended, and returns the state.

    With several processes, all run this; process 0 writes and shows. Raises Stopped after saving
    when a stop was asked for, Lost without where another run has the folder, InputError when
    checkpoints do not fit or are past the steps, the loss is not finite or the disk refuses.
    """
    training.directory.mkdir(parents=True, exist_ok=True)
    saves = Saves(training, options)
    first, state = saves.resume()
    last = first if training.ended(first, state) else training.steps
    reports = _Reports(training, options, first)
    profiler, ended = Profiler(training.directory, options.profile), False
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
            # Asked in every step: all processes look at the clock together.
            saving, copying = saves.late(i + 1) or saving, saves.late_to_copy(i + 1)
            if saving or copying:
                reports.read(saves.last)  # only a state whose loss was seen to be finite is saved
                keep = saves.save if saving else saves.copy
                reports.besides(functools.partial(keep, i + 1, state))
            if stopping:
                raise Stopped(stop.signum or signal.SIGTERM, stop.notice, agreed=True)
            if saving and training.ended(i + 1, state):
                break
        reports.read(saves.last)
        ended = True
    except (OSError, ValueError) as error:
        raise disk_error(error, training.directory, saves.directory) from error
    finally:
        profiler.close()
        reports.close()
        saves.close(ended)
    return state


def _stopping(done: int) -> bool:
    """Whether to stop after so many steps. A process by itself stops where it is; joined ones agree
    on a step, and JAX has their SIGTERM."""
    if stop.shared:
        return multihost_utils.reached_preemption_sync_point(done)
    return stop.signum is not None


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
