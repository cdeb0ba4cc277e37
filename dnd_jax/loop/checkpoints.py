"""Checkpoints of a run by Orbax: each whole or absent, restored exactly, damaged ones set aside."""

import contextlib
import itertools
import json
import logging
import os
import pathlib
import threading
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from dnd_jax.config.records import Older, check_same_run
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.core.formats import check_format
from dnd_jax.parallel import hosts
from dnd_jax.parallel.rules import finest

ocp = packages.deferred("orbax.checkpoint")

CHECKPOINTS = "checkpoints"
FORMAT = 1  # of a checkpoint's record
MEND = "mend its storage, or delete the folder to start over"
RESTORE = (
    "settings that --allow lets differ change what a state holds (train.optimizer, "
    "train.average_decay): give these as they were"
)


def _excepthook(args: threading.ExceptHookArgs) -> None:
    """No traceback of the thread that writes checkpoints for a full disk: `run` says it in a
    line."""
    if "No space left" not in str(args.exc_value):
        threading.__excepthook__(args)


def open_checkpoints(
    directory: os.PathLike, keep_last: int = 2, keep_every: int = 0
) -> "ocp.CheckpointManager":
    """The Orbax manager of a run's checkpoints (a folder or gs:// address): asynchronous, each step
    whole or absent. Raises InputError for a folder with steps that are not ours, or that Orbax
    cannot list."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = _excepthook
    _check_ours(epath.Path(directory))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep_last,
        keep_period=keep_every or None,
        create=True,
        cleanup_tmp_directories=True,
    )
    try:
        return ocp.CheckpointManager(epath.Path(directory), options=options)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of what it reads of each
        raise InputError(
            f"{directory}: Orbax cannot list its checkpoints ({_reason(error)}), most likely for a "
            "damaged _CHECKPOINT_METADATA; move the newest checkpoint away"
        ) from None


def _check_ours(folder: epath.Path) -> None:
    """Raises InputError where a folder whose name is a number holds something else than a
    checkpoint: Orbax would take it for an old step, and remove it."""
    for step in folder.iterdir() if folder.exists() else ():
        names = {path.name for path in step.iterdir()} if step.name.isdecimal() else set()
        if names and not names & {"state", "record"}:
            raise InputError(
                f"{step}: is no checkpoint of a run, and would be removed as an old one; move it, "
                "or use another folder"
            )


def _reader(manager: "ocp.CheckpointManager") -> "ocp.CheckpointManager":
    """What this process reads checkpoints with by itself: in a restore by all, one that fails
    leaves the others waiting."""
    if not hosts.several():
        return manager
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
    )
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, multiprocessing_options=alone
    )
    return ocp.CheckpointManager(manager.directory, options=options)


def address(folder: str | os.PathLike) -> str:
    """A gs:// address as it is, a folder as an absolute path."""
    return str(folder) if "://" in str(folder) else str(pathlib.Path(folder).absolute())


@jax.jit
def _sums_on_device(state: Any) -> jax.Array:
    def of(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(
            jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32), dtype=jnp.uint32
        )

    return jnp.stack([of(x) for x in jax.tree.leaves(state)])


def sums(state: Any) -> list[int]:
    """The sum of each array's bits, read as unsigned numbers, modulo 2^32: the same on any mesh,
    and another one when bytes of a checkpoint have changed on the disk, which its format does not
    notice."""
    return np.asarray(_sums_on_device(state)).tolist()


def newest_record(directory: pathlib.Path, checkpoint_dir: str = "") -> tuple[str, Mapping]:
    """(checkpoint, what is kept beside it) of the newest one of a run in `directory` whose record
    can be read; ("", {}) where there is none. What is damaged is left to `restore`."""
    folder = epath.Path(address(checkpoint_dir or directory / CHECKPOINTS))
    try:
        steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), reverse=True)
    except OSError:
        steps = []
    for step in steps:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            record = json.loads((folder / str(step) / "record" / "metadata").read_text())
            if isinstance(record, Mapping):
                return os.fspath(folder / str(step)), record
    return "", {}


def check_newest(
    directory: pathlib.Path,
    checkpoint_dir: str,
    record: Mapping,
    allowed: Collection[str] | None = (),
    older: Older | None = None,
) -> None:
    """For before long preparations: raises InputError where the newest checkpoint of a run in
    `directory` was made with other settings, of those that `record` has."""
    newest, found = newest_record(directory, checkpoint_dir)
    then = found.get("settings")
    if isinstance(then, Mapping):
        check_same_run(newest, {key: then.get(key) for key in record}, record, allowed, older)


def restore(
    manager: "ocp.CheckpointManager",
    shapes: Any,
    record: Mapping,
    allowed: Collection[str] | None = (),
    older: Older | None = None,
) -> tuple[int, Any]:
    """(step, state) of the newest readable checkpoint, on the shardings of `shapes` (arrays or
    shapes that have one); (0, None) when there is none.

    A newer one that cannot be read, or whose numbers have changed since, is moved aside to
    "STEP.damaged". Several processes agree on the step. Each reads its devices' shares, also of
    what all have, which the devices then exchange. Raises InputError when its record
    (settings) differs from `record` in what is not allowed to, or when checkpoints exist and none
    can be read.
    """
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=finest(x.sharding, x.shape)),
        shapes,
    )
    faults, reader, same = [], _reader(manager), True
    for step in sorted(manager.all_steps(), reverse=True):
        stored = state = error = None
        try:
            stored = reader.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
                "record"
            ]
        except Exception as fault:  # whatever a damaged file makes of itself
            error = fault
        if hosts.all_of(error is None):
            if not isinstance(stored, Mapping) or "settings" not in stored:
                raise InputError(
                    f"{manager.directory}/{step}: its record has no settings: not made by dnd; "
                    "use another folder"
                )
            where = manager.directory / str(step)
            check_format(where, stored.get("format", 0), FORMAT)
            same = check_same_run(where, stored["settings"], record, allowed, older)
            try:
                state = reader.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
                )["state"]
            except Exception as fault:
                error = fault
                if "RESOURCE_EXHAUSTED" in str(fault):
                    raise
        readable = hosts.all_of(error is None)
        state = _exchanged(state, shapes) if readable else None
        if readable and stored.get("sums", now := sums(state)) != now:
            readable, error = False, ValueError("its numbers are not those that were saved")
        if not readable:
            faults.append((step, error or OSError("another process cannot read it")))
            continue
        if faults:
            with hosts.lead_first():
                if hosts.lead():
                    for broken, fault in faults:
                        aside = _free(manager.directory / f"{broken}.damaged")
                        (manager.directory / str(broken)).rename(aside)
                        where = f"{manager.directory}/{broken}"
                        found = f"{where} is damaged ({_reason(fault)}), moved to {aside.name}"
                        tqdm.write(f"{found}; going on from step {step}")
            manager.reload()
        return step, state
    if faults:
        steps = ", ".join(str(step) for step, _ in faults)
        raise InputError(
            f"{manager.directory}: no checkpoint can be read (steps {steps}: "
            f"{_reason(faults[0][1])}); {MEND if same else RESTORE}"
        )
    return 0, None


def _exchanged(state: Any, wanted: Any) -> Any:
    """The state, on the shardings of `wanted`."""
    leaves, tree = jax.tree.flatten(state)
    where = [x.sharding for x in jax.tree.leaves(wanted)]
    moved = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and x.sharding != where[i]]
    if moved:
        program = hosts.copied_to(tuple(where[i] for i in moved))
        for i, x in zip(moved, program(tuple(leaves[i] for i in moved)), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(tree, leaves)


def _free(path: epath.Path) -> epath.Path:
    """The path, or the first with a number behind it that nothing has."""
    names = (path.with_name(f"{path.name}{i or ''}") for i in itertools.count())
    return next(name for name in names if not name.exists())


def _reason(error: Exception) -> str:
    """An error's kind and first line, not too long."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"
