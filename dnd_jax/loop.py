"""The loop that all training shares: dispatch, delayed metric reads, progress, checkpoints, exact resume, clean stops.

A stage gives a jitted `step(state, batch) -> (state, metrics)`, a pure `batch_at(step)` and a state; the loop does the rest.
Position in the data is the step itself: a batch is a function of (seed, step), so a resumed run sees what it would have seen.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from dnd_jax import multihost
from dnd_jax.errors import InputError, first_line, listed
from dnd_jax.metrics import Metrics, Profiler
from dnd_jax.stopping import Stopped, stop

CHECKPOINTS = "checkpoints"
AHEAD = 1  # batches made before they are needed, while the next step, dispatched already, has its own
SHOWN = ("loss", "accuracy", "gradient_norm")  # beside the progress bar


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Every leaf in which two JSON-like values differ, as "key: then -> now"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = sorted(then.keys() | now.keys())
        return [d for k in keys for d in differences(then.get(k), now.get(k), f"{path}.{k}" if path else k)]
    return [] if then == now else [f"{path}: {then!r} -> {now!r}"]


def check_same_run(where: os.PathLike, then: Any, now: Any, allowed: Collection[str] | None = None) -> bool:
    """Whether a run's stored settings are the present ones. allowed: names ("train.steps", "train") that may differ; None where
    the user cannot give any.

    Raises InputError listing everything else that does.
    """
    changed = differences(json.loads(json.dumps(then)), json.loads(json.dumps(now)))
    keys = {line: line.split(": ", 1)[0] for line in changed}
    refused = [line for line, key in keys.items() if not any(key == name or key.startswith(f"{name}.") for name in allowed or ())]
    if refused:
        names = ",".join(keys[line] for line in refused)
        ways = "or use another --workdir" if allowed is None else f"use another --workdir, or allow them by --allow={names}"
        raise listed(f"{where} was made with other settings; restore them, {ways} (then -> now)", refused)
    return not changed


def _excepthook(args: threading.ExceptHookArgs) -> None:
    """No traceback of the thread that writes checkpoints for a full disk: `run` says it in a line."""
    if "No space left" not in str(args.exc_value):
        threading.__excepthook__(args)


def open_checkpoints(directory: os.PathLike, keep_last: int = 2, keep_every: int = 0) -> ocp.CheckpointManager:
    """The Orbax manager of a run's checkpoints (a folder or gs:// address): asynchronous, each step whole or absent."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = _excepthook
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep_last, keep_period=keep_every or None, create=True, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(epath.Path(directory), options=options)


def _reader(manager: ocp.CheckpointManager) -> ocp.CheckpointManager:
    """What this process reads checkpoints with by itself: in a restore by all, one that fails leaves the others waiting."""
    if not multihost.several():
        return manager
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}")
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(manager.directory, options=options)


def _address(folder: str | os.PathLike) -> str:
    """A gs:// address as it is, a folder as an absolute path."""
    return str(folder) if "://" in str(folder) else str(pathlib.Path(folder).absolute())


@jax.jit
def _sums_on_device(state: Any) -> jax.Array:
    def of(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([of(x) for x in jax.tree.leaves(state)])


def sums(state: Any) -> list[int]:
    """The sum of each array's bits, read as unsigned numbers, modulo 2^32: the same on any mesh, and another one when bytes of a
    checkpoint have changed on the disk, which its format does not notice."""
    return np.asarray(_sums_on_device(state)).tolist()


def check_newest(directory: pathlib.Path, checkpoint_dir: str, record: Mapping, allowed: Collection[str] | None = None) -> None:
    """For before long preparations: raises InputError where the newest checkpoint of a `run` in `directory` was made with other
    settings, of those that `record` has. What cannot be read is left to `restore`."""
    folder = epath.Path(_address(checkpoint_dir or directory / CHECKPOINTS))
    try:
        newest = max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
        then = json.loads((newest / "record" / "metadata").read_text())["settings"]
        then = {key: then.get(key) for key in record}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    check_same_run(newest, then, record, allowed)


def restore(
    manager: ocp.CheckpointManager, shapes: Any, record: Mapping, allowed: Collection[str] | None = None
) -> tuple[int, Any]:
    """(step, state) of the newest readable checkpoint, on the shardings of `shapes` (arrays or shapes that have one); (0, None)
    when there is none.

    A newer one that cannot be read, or whose numbers have changed since, is moved aside to "STEP.damaged". Several processes agree
    on the step. Raises InputError when its record (settings) differs from `record` in what is not allowed to, or when checkpoints
    exist and none can be read.
    """
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shapes)
    faults, reader = [], _reader(manager)
    for step in sorted(manager.all_steps(), reverse=True):
        stored = state = error = None
        try:
            stored = reader.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        except Exception as fault:  # whatever a damaged file makes of itself
            error = fault
        if multihost.all_of(error is None):
            if not isinstance(stored, Mapping) or "settings" not in stored:
                raise InputError(f"{manager.directory}/{step}: its record has no settings: not made by dnd; use another folder")
            check_same_run(manager.directory / str(step), stored["settings"], record, allowed)
            try:
                state = reader.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
            except Exception as fault:
                error = fault
                if "RESOURCE_EXHAUSTED" in str(fault):
                    raise
        readable = multihost.all_of(error is None)
        if readable and stored.get("sums", now := sums(state)) != now:
            readable, error = False, ValueError("its numbers are not those that were saved")
        if not readable:
            faults.append((step, error or OSError("another process cannot read it")))
            continue
        if faults:
            with multihost.lead_first():
                if multihost.lead():
                    for broken, fault in faults:
                        aside = manager.directory / f"{broken}.damaged"
                        aside.rmtree(missing_ok=True)
                        (manager.directory / str(broken)).rename(aside)
                        found = f"{manager.directory}/{broken} is damaged ({_reason(fault)}), moved to {aside.name}"
                        tqdm.write(f"{found}; going on from step {step}")
            manager.reload()
        return step, state
    if faults:
        steps = ", ".join(str(step) for step, _ in faults)
        raise InputError(
            f"{manager.directory}: no checkpoint can be read (steps {steps}: {_reason(faults[0][1])}); mend its storage, or "
            "delete the folder to start over"
        )
    return 0, None


def _reason(error: Exception) -> str:
    """An error's kind and first line, not too long."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def ahead(batch_at: Callable[[int], Any], first: int, steps: int) -> Iterator[tuple[int, Any, float]]:
    """(i, batch_at(i), seconds that were waited for it) for i in first..steps - 1, made by a thread AHEAD of their use."""
    pool = ThreadPoolExecutor(1, "input")
    queue = collections.deque(pool.submit(batch_at, i) for i in range(first, min(first + AHEAD, steps)))
    try:
        for i in range(first, steps):
            started = time.perf_counter()
            batch = queue.popleft().result()
            if i + AHEAD < steps:
                queue.append(pool.submit(batch_at, i + AHEAD))
            yield i, batch, time.perf_counter() - started
    finally:
        pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run may do differently without training differently.

    checkpoint_dir: a folder or gs:// address (empty: in the run's directory). allowed: names of settings that may have changed,
    None where the user cannot give any. profile: traces the steps between these two. notes: JSON beside the record, not compared.
    """

    keep_last: int = 2
    keep_every: int = 0
    checkpoint_dir: str = ""
    trackers: tuple[str, ...] = ()
    allowed: tuple[str, ...] | None = None
    profile: tuple[int, int] | None = None
    notes: Mapping = dataclasses.field(default_factory=dict)


def run(
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
    """Trains from the newest checkpoint in `directory`, or from `state`, to `steps` and returns the state.

    state may be shapes with shardings; then init makes the first one, if there is no checkpoint: never two are held.

    batch_at(i) is the batch of the i-th step, counted from 0; a thread calls it AHEAD of its use. metrics must hold "loss"; they
    are read one step late. after_step(i + 1, state) runs after each step. record (JSON) is kept with every checkpoint and must not
    change between runs. blame(i) names the data of a step for the message when its loss is not finite. row_of(i, metrics, seconds)
    makes them the numbers that are written. With several processes, all run this; process 0 writes and shows. Raises Stopped after
    saving when a stop was asked for, InputError when checkpoints do not fit or are past `steps`, the loss is not finite or the
    disk refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manager = open_checkpoints(_address(options.checkpoint_dir or directory / CHECKPOINTS), options.keep_last, options.keep_every)
    record, lead = json.loads(json.dumps(record)), multihost.lead()
    first, restored = restore(manager, state, record, options.allowed)
    if first > steps:
        raise InputError(
            f"{title}: {manager.directory} holds {first} steps, {steps} are asked for; ask for {first} or more, or train fewer in "
            "another --workdir"
        )
    state = restored if first else init() if init else state
    del restored
    metrics = Metrics(directory, first, options.trackers, title) if lead else None
    profiler = Profiler(directory, options.profile)
    bar = tqdm(
        total=steps, initial=first, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0.1, disable=not lead
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
                    {"settings": record, "step": step, "data_position": step, "sums": sums(state), **options.notes}
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
                f"{f'{manager.directory}/{last_saved}' if last_saved else 'none'}; lower the learning rate or mend the data"
            )
        now = time.perf_counter()
        seconds, started = now - started, now
        row = row_of(step, row, seconds)
        if metrics is not None:
            metrics.write({"step": step, **row, "seconds": round(seconds, 4), "input_seconds": round(waited, 4)})
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
            # A process by itself stops where it is; joined ones agree on a step, and JAX has their SIGTERM.
            stopping = multihost_utils.reached_preemption_sync_point(i + 1) if stop.shared else stop.signum is not None
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
    """The user's line for a disk that refuses; any other error as it is. Orbax reports a full disk as ValueError."""
    full = isinstance(error, ValueError) and "No space left" in str(error)
    if isinstance(error, OSError) or full:
        reason = "No space left on device" if full else getattr(error, "strerror", None) or error
        return InputError(f"{directory}: cannot write ({reason}); free some space and run the same command")
    return error
