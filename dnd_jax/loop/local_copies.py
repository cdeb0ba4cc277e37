"""Copies of a run's state on the hosts' own disks or memory, between its checkpoints: each process
writes what its devices hold, so that a run which is killed loses a minute, and no shared storage is
asked for it."""

import json
import os
import pathlib
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import need_space, sync
from dnd_jax.core.tensors import file_notes, read_safetensors, write_safetensors
from dnd_jax.parallel import hosts
from dnd_jax.parallel.rules import held_bytes

TOKEN = "local_copies"  # the file beside a run's checkpoints that says which copies are its own
SLOTS = ("a", "b")  # the newest copy that all processes have stays while the next one is written


class LocalCopies:
    """The two newest copies that this process has in `folder`, of the run whose checkpoints are in
    `checkpoints`.

    They are of one run, mesh and number of processes; of another mesh they are passed over. Without
    the checkpoints' folder, or with that of another run, they are not found. Raises InputError when
    the folder has no room for them.
    """

    def __init__(self, folder: pathlib.Path, checkpoints: os.PathLike, shapes: Any):
        self._shapes = shapes
        self._writing: threading.Thread | None = None
        self._warned = False
        run, count = _token(epath.Path(checkpoints)), jax.process_count()
        name = f"{run}.{jax.process_index()}_of_{count}"
        self._files = {slot: folder / f"{name}.{slot}.safetensors" for slot in SLOTS}
        self._partial = folder / f"{name}.partial"
        self._partial.unlink(missing_ok=True)  # of a process that was killed
        for path in folder.glob(f"{run}.*_of_*"):
            if f"_of_{count}." not in path.name:  # there were more processes then, or fewer
                path.unlink(missing_ok=True)
        there = sum(path.stat().st_size for path in self._files.values() if path.is_file())
        leaves = jax.tree.leaves(shapes)
        size = sum(held_bytes(leaves[i]) for _, i, _ in _parts(leaves)) * len(SLOTS)
        instead = "give another --config.train.local_dir"
        size = (size - there) * _processes_here()
        need_space(folder, size, "two copies of the state", instead)

    def steps(self) -> list[int]:
        """The steps of which every process has a whole copy, the newest first."""
        mine = sorted({self._step(path) for path in self._files.values()} | {0})[-2:]
        every = np.asarray([*mine, 0][:2])[None]
        if hosts.several():
            every = multihost_utils.process_allgather(every[0])
        common = set.intersection(*(set(row.tolist()) for row in every)) - {0}
        return sorted(common, reverse=True)

    def record(self, step: int) -> Mapping:
        """What stands beside the copy of a step."""
        return json.loads(file_notes(self._path(step))["record"])

    def read(self, step: int) -> Any | None:
        """The state of a step that all processes have, None where one of them has kept other parts
        of it than its devices have now, or cannot read them."""
        leaves, tree = jax.tree.flatten(self._shapes)
        names: list[dict[str, str]] = [{} for _ in leaves]
        for name, i, index in _parts(leaves):
            names[i][index] = name
        try:
            stored, fault = read_safetensors(self._path(step)), None
            if {name for of_one in names for name in of_one.values()} != stored.keys():
                raise InputError("other parts")
        except InputError as error:
            fault = error
        if not hosts.all_of(fault is None):
            return None
        state = []
        for x, of_one in zip(leaves, names, strict=True):
            part = x.sharding.shard_shape(x.shape)
            arrays = [
                jax.device_put(stored[of_one[str(index)]].view(x.dtype).reshape(part), device)
                for device, index in x.sharding.addressable_devices_indices_map(x.shape).items()
            ]
            state.append(
                jax.make_array_from_single_device_arrays(x.shape, x.sharding, arrays, dtype=x.dtype)
            )
        return jax.tree.unflatten(tree, state)

    def save(self, step: int, state: Any, record: Mapping) -> None:
        """Copies the state to the host's memory and begins to write it, unless a process still
        writes the copy before. All processes call it together."""
        if not hosts.all_of(self._writing is None or not self._writing.is_alive()):
            return
        common = self.steps()[:1]
        leaves = jax.tree.leaves(state)
        found = [{str(s.index): s.data for s in x.addressable_shards} for x in leaves]
        for parts in found:
            for data in parts.values():
                data.copy_to_host_async()
        # A CPU's array would be looked at, not copied, and the next step writes to it.
        copy = True if jax.local_devices()[0].platform == "cpu" else None
        tensors = {name: np.array(found[i][index], copy=copy) for name, i, index in _parts(leaves)}
        old = {path: self._step(path) for path in self._files.values()}
        place = min((path for path in old if old[path] not in common), key=old.__getitem__)
        notes = {"step": str(step), "record": json.dumps(record)}

        def write() -> None:
            try:
                for path in (self._partial, place):  # first, so that there is room
                    path.unlink(missing_ok=True)
                of_bytes = {name: _bytes(x) for name, x in tensors.items()}
                write_safetensors(self._partial, of_bytes, notes)
                sync(self._partial)
                os.replace(self._partial, place)
            except Exception as error:  # the run goes on: it has its checkpoints
                self._warn(f"no local copy of step {step}: {error}")

        self._writing = threading.Thread(target=write, daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Waits for the copy that is being written."""
        if self._writing is not None:
            self._writing.join()

    def keep_until(self, done: int) -> None:
        """Removes the copies of later steps, which the run does not go on from."""
        self._remove(path for path in self._files.values() if self._step(path) > done)

    def clear(self) -> None:
        """Removes the copies."""
        self.wait()
        self._remove((self._partial, *self._files.values()))

    def _remove(self, paths: Iterator[pathlib.Path] | tuple[pathlib.Path, ...]) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"a local copy stays: {error}")

    def _warn(self, line: str) -> None:
        """Once: a disk that is full now is so in a minute."""
        if not self._warned:
            print(f"dnd: warning: {line}", file=sys.stderr, flush=True)
        self._warned = True

    def _path(self, step: int) -> pathlib.Path:
        return next(path for path in self._files.values() if self._step(path) == step)

    @staticmethod
    def _step(path: pathlib.Path) -> int:
        """Of a copy; 0 when there is none that can be read."""
        try:
            return int(file_notes(path).get("step", 0)) if path.is_file() else 0
        except InputError:
            return 0


def _token(checkpoints: epath.Path) -> str:
    """What a run's copies are called by: a number that lies beside its checkpoints, and their
    address, as a folder may have been copied."""
    path = checkpoints / TOKEN
    with hosts.lead_first():
        if hosts.lead() and not path.exists():
            path.write_text(secrets.token_hex(8))
    return digests.of_text(f"{path.read_text()} {checkpoints}")[:16]


def _processes_here() -> int:
    """How many of the run's processes are on this host, by its name."""
    if not hosts.several():
        return 1
    mine = np.frombuffer(bytes.fromhex(digests.of_text(socket.gethostname())), np.uint8)
    return int((multihost_utils.process_allgather(mine) == mine).all(axis=1).sum())


def _parts(leaves: list) -> Iterator[tuple[str, int, str]]:
    """(name in the file, number of the array, index) of each different part that this process'
    devices have."""
    for i, x in enumerate(leaves):
        every = x.sharding.addressable_devices_indices_map(x.shape).values()
        for index in dict.fromkeys(map(str, every)):
            yield f"{i} {index} {x.dtype.name}{list(x.shape)}", i, index


def _bytes(x: np.ndarray) -> np.ndarray:
    """An array of any type as bytes."""
    return np.atleast_1d(np.ascontiguousarray(x)).reshape(-1).view(np.uint8)
