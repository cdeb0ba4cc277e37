"""When a run's state is saved, and where: checkpoints that all hosts read, and copies on each host
between them."""

import errno
import json
import os
import pathlib
import time
from typing import Any

from tqdm import tqdm

from dnd_jax.config.records import check_same_run
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import FULL, unreadable
from dnd_jax.loop.checkpoints import CHECKPOINTS, FORMAT, address, open_checkpoints, restore, sums
from dnd_jax.loop.local_copies import LocalCopies
from dnd_jax.loop.training import Options, Training
from dnd_jax.parallel import hosts

ocp = packages.deferred("orbax.checkpoint")


class Saves:
    """The checkpoints and copies of a run."""

    def __init__(self, training: Training, options: Options):
        self._training, self._options = training, options
        self._record = json.loads(json.dumps(training.record))
        self._manager = open_checkpoints(
            address(options.checkpoint_dir or training.directory / CHECKPOINTS),
            options.keep_last,
            options.keep_every,
        )
        self._saved = 0
        self._clock = _Clock(training.save_every_seconds)
        self._copies, self._copy_clock = None, _Clock(0)
        if options.local_dir:
            folder = pathlib.Path(options.local_dir)
            self._copies = LocalCopies(folder, self._manager.directory, training.shapes)
            self._copy_clock = _Clock(options.local_every_seconds)

    @property
    def last(self) -> str:
        """Where the newest checkpoint lies."""
        return f"{self._manager.directory}/{self._saved}" if self._saved else "none"

    @property
    def directory(self) -> os.PathLike:
        """Where the checkpoints are: a folder or gs:// address."""
        return self._manager.directory

    def resume(self) -> tuple[int, Any]:
        """(steps done, state): of the newest checkpoint or copy, or a first state."""
        t, newest = self._training, hosts.of_lead(self._manager.latest_step() or 0)
        found = self._copied(newest)
        if found is None:
            found = self._restored()
            if found[0] < newest:  # which could not be read
                found = self._copied(found[0]) or found
        done, state = found
        if self._copies is not None:
            self._copies.keep_until(done)
        if done > t.steps:
            raise InputError(
                f"{t.title}: {self._manager.directory} holds {done} steps, {t.steps} are asked "
                f"for; ask for {done} or more, or train fewer in another --workdir"
            )
        self._clock.start(done)
        self._copy_clock.start(done)
        return (done, state) if done else (0, t.init())

    def _restored(self) -> tuple[int, Any]:
        o = self._options
        done, state = restore(
            self._manager, self._training.shapes, self._record, o.allowed, o.older
        )
        self._saved = done
        return done, state

    def _copied(self, saved: int) -> tuple[int, Any] | None:
        """What all hosts have a copy of, where it is newer than a checkpoint and has steps before
        it still."""
        o, last = self._options, self._training.steps
        steps = self._copies.steps() if self._copies is not None else ()
        for done in [step for step in steps if saved < step < last]:
            stored, where = self._copies.record(done), f"the copy of step {done} in local_dir"
            check_same_run(where, stored["settings"], self._record, o.allowed, o.older)
            state = self._copies.read(done)
            sound = state is not None and hosts.all_of(stored["sums"] == sums(state))
            if hosts.lead():
                found = "is of another mesh" if state is None else "is damaged"
                tqdm.write(f"going on from {where}" if sound else f"{where} {found}")
            if sound:
                self._saved = saved
                return done, state
        return None

    def late(self, done: int) -> bool:
        """Whether nothing was saved for `save_every_seconds`, in all processes alike."""
        return self._clock.late(done)

    def late_to_copy(self, done: int) -> bool:
        """Whether nothing was copied for `local_every_seconds`, in all processes alike."""
        return self._copy_clock.late(done)

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
        self._saved = done
        self._clock.reset()
        self._copy_clock.reset()

    def copy(self, done: int, state: Any) -> None:
        """Begins to write each host's copy of the state after so many steps."""
        self._copies.save(done, state, {"settings": self._record, "sums": sums(state)})
        self._copy_clock.reset()

    def close(self, ended: bool) -> None:
        """Waits for what is being written. ended: nothing is left to train, so that the copies can
        go."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise disk_error(error, self._training.directory, self.directory) from error
        finally:
            self._manager.close()
            if self._copies is not None:
                self._copies.clear() if ended else self._copies.wait()


class _Clock:
    """Says when so many seconds have passed on process 0's clock, in all processes at the same
    step; 0: never."""

    def __init__(self, seconds: int):
        self._seconds = seconds
        self.start(0)

    def start(self, done: int) -> None:
        """After so many steps the clock is asked for the first time one step later."""
        self._since = time.perf_counter()
        self._look, self._pace = done + 1, (done, self._since)

    def reset(self) -> None:
        self._since = time.perf_counter()

    def late(self, done: int) -> bool:
        """Whether the seconds are over. Process 0 is asked for its clock after 1 step, and then
        where half of what was left would be over."""
        if not self._seconds or done < self._look:
            return False
        now, (step, then) = time.perf_counter(), self._pace
        left = self._seconds - (now - self._since)
        more = int(left / 2 * (done - step) / (now - then))
        more = hosts.of_lead(max(1, more) if left > 0 else 0)
        self._look, self._pace = done + max(1, more), (done, now)
        return not more


def disk_error(error: Exception, *ours: os.PathLike) -> Exception:
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
