"""The loop that all training shares: dispatch, delayed metric reads, progress, checkpoints, exact resume, clean stops.

A stage gives a jitted `step(state, batch) -> (state, metrics)`, a pure `batch_at(step)` and a state; the loop does the rest.
Position in the data is the step itself: a batch is a function of (seed, step), so a resumed run sees what it would have seen.
"""

import json
import logging
import math
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from dnd_jax.errors import InputError, listed

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


class Stopped(Exception):
    """A stop was asked for (SIGTERM, Ctrl-C) and everything up to now is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request that long work honours at its next safe point."""

    def __init__(self):
        self.signum: int | None = None

    def install(self) -> None:
        """Takes over both signals (main thread only). A second Ctrl-C interrupts at once."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int, frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

    def check(self) -> None:
        """Raises Stopped if a stop was asked for: call it where nothing is half done."""
        if self.signum is not None:
            raise Stopped(self.signum)


stop = StopRequest()


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Every leaf in which two JSON-like values differ, as "key: then -> now"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = sorted(then.keys() | now.keys())
        return [d for k in keys for d in differences(then.get(k), now.get(k), f"{path}.{k}" if path else k)]
    return [] if then == now else [f"{path}: {then!r} -> {now!r}"]


def check_same_run(where: pathlib.Path, then: Any, now: Any) -> None:
    """Raises InputError listing what changed when a run's stored settings are not the present ones."""
    changed = differences(json.loads(json.dumps(then)), json.loads(json.dumps(now)))
    if changed:
        raise listed(f"{where} was made with other settings; restore them or use another --workdir (then -> now)", changed)


def open_checkpoints(directory: pathlib.Path, keep: int = 2) -> ocp.CheckpointManager:
    """The Orbax manager of a run's checkpoints: asynchronous, each step whole or absent."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def restore(manager: ocp.CheckpointManager, state: Any, record: Mapping) -> tuple[int, Any]:
    """(step, state) of the newest readable checkpoint, on the shardings of `state`; (0, state) when there is none.

    Raises InputError when its record (settings) differs from `record`, or when checkpoints exist and none can be read.
    """
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    faults = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            stored = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        except Exception as error:  # whatever a damaged file makes of itself
            faults.append((step, error))
            continue
        check_same_run(manager.directory / str(step), stored["settings"], record)
        try:
            state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        except Exception as error:
            faults.append((step, error))
            continue
        for broken, error in faults:
            tqdm.write(f"{manager.directory}/{broken} is damaged ({type(error).__name__}); going on from step {step}")
            shutil.rmtree(manager.directory / str(broken), ignore_errors=True)
        if faults:
            manager.reload()
        return step, state
    if faults:
        steps = ", ".join(str(step) for step, _ in faults)
        reason = str(faults[0][1]).strip().splitlines()[0][:200]
        raise InputError(
            f"{manager.directory}: no checkpoint can be read (steps {steps}: {reason}); delete the folder to start over"
        )
    return 0, state


class Metrics:
    """metrics.jsonl of a run: one object a line; a resumed run first drops the lines that it will write again."""

    def __init__(self, directory: pathlib.Path, step: int):
        path = directory / METRICS_FILE
        lines = path.read_text().splitlines() if path.exists() and step else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = pathlib.Path(directory, METRICS_FILE)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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
) -> Any:
    """Trains `state` from its newest checkpoint in `directory` to `steps` and returns it.

    batch_at(i) is the batch of the i-th step, counted from 0. metrics must hold "loss"; they are read one step late.
    after_step(i + 1, state) runs after each step. record (JSON) is kept with every checkpoint and must not change between runs.
    blame(i) names the data of a step for the message when its loss is not finite. Raises Stopped after saving when a stop was
    asked for, InputError when checkpoints do not fit, the loss is not finite or the disk refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manager = open_checkpoints(directory / CHECKPOINTS)
    record = json.loads(json.dumps(record))
    first, state = restore(manager, state, record)
    metrics = Metrics(directory, first)
    bar = tqdm(total=steps, initial=first, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0.1)
    pending: tuple[int, Mapping] | None = None
    last_saved = first
    started = time.perf_counter()

    def save(step: int) -> None:
        nonlocal last_saved
        if step != last_saved:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                record=ocp.args.JsonSave({"settings": record, "step": step, "data_position": step}),
            )
            manager.save(step, args=args)
            last_saved = step

    def read_pending() -> None:
        """Reads the metrics of the step before the one in flight."""
        nonlocal pending, started
        if pending is None:
            return
        step, values = pending
        pending = None
        row = {key: np.asarray(value).tolist() for key, value in values.items()}
        if not math.isfinite(row["loss"]):
            raise InputError(
                f"{title}: the loss is {row['loss']} at step {step}{blame(step - 1)}; last good checkpoint: "
                f"{f'{manager.directory}/{last_saved}' if last_saved else 'none'}; lower the learning rate or mend the data"
            )
        now = time.perf_counter()
        metrics.write({"step": step, **row, "seconds": round(now - started, 4)})
        started = now
        bar.update(1)
        bar.set_postfix({key: f"{value:.3g}" for key, value in row.items() if isinstance(value, float)}, refresh=False)

    try:
        for i in range(first, steps):
            state, values = step_fn(state, batch_at(i))
            read_pending()
            pending = (i + 1, values)
            if after_step is not None:
                after_step(i + 1, state)
            if stop.signum is not None or (i + 1) % save_every == 0 or i + 1 == steps:
                read_pending()  # never save a state whose loss has not been seen to be finite
                save(i + 1)
                stop.check()
        read_pending()
    except OSError as error:
        raise InputError(
            f"{directory}: cannot write ({error.strerror or error}); free some space and run the same command"
        ) from error
    finally:
        bar.close()
        metrics.close()
        try:
            manager.wait_until_finished()
        finally:
            manager.close()
    return state
