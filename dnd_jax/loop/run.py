"""The loop that all training shares: dispatch, delayed metric reads, progress, checkpoints, exact
resume, clean stops.

A stage gives a jitted `step(state, batch) -> (state, metrics)`, a pure `batch_at(step)` and a
state; the loop does the rest. Position in the data is the step itself: a batch is a function of
(seed, step), so a resumed run sees what it would have seen.
"""

import dataclasses
import json
import math
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
from dnd_jax.core.stopping import Stopped, stop
from dnd_jax.loop.checkpoints import CHECKPOINTS, FORMAT, address, open_checkpoints, restore, sums
from dnd_jax.loop.metrics import Metrics
from dnd_jax.loop.prefetch import ahead
from dnd_jax.loop.profiler import Profiler
from dnd_jax.parallel import hosts

SHOWN = ("loss", "accuracy", "gradient_norm")  # beside the progress bar


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run may do differently without training differently.

    checkpoint_dir: a folder or gs:// address (empty: in the run's directory). allowed: names of
    settings that may have changed, None where the user cannot give any. older: as of
    `check_same_run`. profile: traces the steps
    between these two. notes: JSON beside the record, not compared.
    """

    keep_last: int = 2
    keep_every: int = 0
    checkpoint_dir: str = ""
    trackers: tuple[str, ...] = ()
    allowed: tuple[str, ...] | None = ()
    older: Older = dataclasses.field(default_factory=dict)
    profile: tuple[int, int] | None = None
    notes: Mapping = dataclasses.field(default_factory=dict)


def run_loop(
    title: str,
    directory: pathlib.Path,
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
    batch_at: Callable[[int], Any],
    steps: int,
    save_every: int,
    record: Mapping,
    after_step: Callable[[int, Any], None] | None = None,
    blame: Callable[[int], str] = lambda step: "",
    row_of: Callable[[int, Mapping, float], Mapping] = lambda step, values, seconds: values,
    options: Options = Options(),
    init: Callable[[], Any] | None = None,
) -> Any:
    """Trains from the newest checkpoint in `directory`, or from `state`, to `steps` and returns the
    state.

    state may be shapes with shardings; then init makes the first one, if there is no checkpoint:
    never two are held.

    batch_at(i) is the batch of the i-th step, counted from 0; a thread calls it AHEAD of its use.
    metrics must hold "loss"; they are read one step late. after_step(i + 1, state) runs after each
    step. record (JSON) is kept with every checkpoint and must not change between runs. blame(i)
    names the data of a step for the message when its loss is not finite. row_of(i, metrics,
    seconds) makes them the numbers that are written. With several processes, all run this; process
    0 writes and shows. Raises Stopped after saving when a stop was asked for, InputError when
    checkpoints do not fit or are past `steps`, the loss is not finite or the disk refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manager = open_checkpoints(
        address(options.checkpoint_dir or directory / CHECKPOINTS),
        options.keep_last,
        options.keep_every,
    )
    record, lead = json.loads(json.dumps(record)), hosts.lead()
    first, restored = restore(manager, state, record, options.allowed, options.older)
    if first > steps:
        raise InputError(
            f"{title}: {manager.directory} holds {first} steps, {steps} are asked for; ask for "
            f"{first} or more, or train fewer in "
            "another --workdir"
        )
    state = restored if first else init() if init else state
    del restored
    metrics = Metrics(directory, first, options.trackers, title) if lead else None
    profiler = Profiler(directory, options.profile)
    bar = tqdm(
        total=steps,
        initial=first,
        desc=title,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        smoothing=0.1,
        disable=not lead,
    )
    pending: tuple[int, Mapping, float] | None = None
    last_saved = first
    started = time.perf_counter()

    def save(step: int) -> None:
        nonlocal last_saved
        if step != last_saved:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                record=ocp.args.JsonSave(
                    {
                        "format": FORMAT,
                        "settings": record,
                        "step": step,
                        "data_position": step,
                        "sums": sums(state),
                        **options.notes,
                    }
                ),
            )
            manager.save(step, args=args)
            last_saved = step

    def read_pending() -> None:
        """Reads the metrics of the step before the one in flight."""
        nonlocal pending, started
        if pending is None:
            return
        step, values, waited = pending
        pending = None
        row = {key: np.asarray(value).tolist() for key, value in values.items()}
        bad = [
            f"the {name.replace('_', ' ')} is {row[name]}"
            for name in ("loss", "gradient_norm")
            if not math.isfinite(row.get(name, 0))
        ]
        if bad:
            raise InputError(
                f"{title}: {bad[0]} at step {step}{blame(step - 1)}; last good checkpoint: "
                f"{f'{manager.directory}/{last_saved}' if last_saved else 'none'}; lower the "
                "learning rate or mend the data"
            )
        now = time.perf_counter()
        seconds, started = now - started, now
        row = row_of(step, row, seconds)
        if metrics is not None:
            metrics.write(
                {
                    "step": step,
                    **row,
                    "seconds": round(seconds, 4),
                    "input_seconds": round(waited, 4),
                }
            )
        bar.update(1)
        bar.set_postfix({key: f"{row[key]:.3g}" for key in SHOWN if key in row}, refresh=False)

    try:
        profiler.at(first, state)
        for i, batch, waited in ahead(batch_at, first, steps):
            state, values = step_fn(state, batch)
            read_pending()
            pending = (i + 1, values, waited)
            profiler.at(i + 1, state)
            if after_step is not None:
                after_step(i + 1, state)
            # A process by itself stops where it is; joined ones agree on a step, and JAX has their
            # SIGTERM.
            stopping = (
                multihost_utils.reached_preemption_sync_point(i + 1)
                if stop.shared
                else stop.signum is not None
            )
            if stopping or (i + 1) % save_every == 0 or i + 1 == steps:
                read_pending()  # never save a state whose loss has not been seen to be finite
                save(i + 1)
            if stopping:
                raise Stopped(stop.signum or signal.SIGTERM, stop.notice, agreed=True)
        read_pending()
    except (OSError, ValueError) as error:
        raise _disk_error(error, directory) from error
    finally:
        profiler.close()
        bar.close()
        if metrics is not None:
            metrics.close()
        _finish(manager, directory)
    return state


def _finish(manager: ocp.CheckpointManager, directory: pathlib.Path) -> None:
    """Waits for the checkpoint that is being written."""
    try:
        manager.wait_until_finished()
    except (OSError, ValueError) as error:
        raise _disk_error(error, directory) from error
    finally:
        manager.close()


def _disk_error(error: Exception, directory: pathlib.Path) -> Exception:
    """The user's line for a disk that refuses; any other error as it is. Orbax reports a full disk
    as ValueError."""
    full = isinstance(error, ValueError) and "No space left" in str(error)
    if isinstance(error, OSError) or full:
        reason = "No space left on device" if full else getattr(error, "strerror", None) or error
        return InputError(
            f"{directory}: cannot write ({reason}); free some space and run the same command"
        )
    return error
