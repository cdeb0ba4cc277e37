"""Copies of a run's state on the hosts' own disks or memory, between its checkpoints: each process
writes what its devices hold, so that a run which is killed loses a minute, and no shared storage is
asked for it."""

import json
import pathlib
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import need_space, read_text, replacing
from dnd_jax.core.tensors import file_notes, read_safetensors, write_safetensors
from dnd_jax.parallel import hosts
from dnd_jax.parallel.rules import held_bytes

TOKEN = "local_copies"  # the file in a run's folder by which copies are known to be its own
SLOTS = ("a", "b")  # the newest copy stays while the next one is written


class LocalCopies:
    """The two newest copies that this process has in `folder`, of the run in `directory`.

    They are of one run, mesh and number of processes: of another one they are passed over. Raises
    InputError when the folder has no room for them.
    """

    def __init__(self, folder: pathlib.Path, directory: pathlib.Path, shapes: Any):
        self._shapes = shapes
        self._writing: threading.Thread | None = None
        token = directory / TOKEN
        with hosts.lead_first():
            if hosts.lead() and not token.is_file():
                with replacing(token) as temporary:
                    temporary.write_text(secrets.token_hex(8))
        name = f"{read_text(token)}.{jax.process_index()}_of_{jax.process_count()}"
        self._files = {slot: folder / f"{name}.{slot}.safetensors" for slot in SLOTS}
        there = sum(path.stat().st_size for path in self._files.values() if path.is_file())
        leaves = jax.tree.leaves(shapes)
        size = sum(held_bytes(leaves[i]) for _, i, _ in _parts(leaves)) * len(SLOTS)
        instead = "give another --config.train.local_dir"
        need_space(folder, size - there, "two copies of the state", instead)

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
        try:
            stored, fault = read_safetensors(self._path(step)), None
            leaves, tree = jax.tree.flatten(self._shapes)
            wanted = {name: None for name, _, _ in _parts(leaves)}
            if wanted.keys() != stored.keys():
                raise InputError("other parts")
        except InputError as error:
            fault = error
        if not hosts.all_of(fault is None):
            return None
        state = []
        for i, x in enumerate(leaves):
            parts = {
                index: stored[name].view(x.dtype).reshape(x.sharding.shard_shape(x.shape))
                for name, of, index in _parts(leaves)
                if of == i
            }
            where = x.sharding.addressable_devices_indices_map(x.shape)
            arrays = [jax.device_put(parts[str(index)], device) for device, index in where.items()]
            state.append(
                jax.make_array_from_single_device_arrays(x.shape, x.sharding, arrays, dtype=x.dtype)
            )
        return jax.tree.unflatten(tree, state)

    def save(self, step: int, state: Any, record: Mapping) -> None:
        """Copies the state to the host's memory and begins to write it. Where the copy before is
        still being written, waits for it."""
        self.wait()
        leaves = jax.tree.leaves(state)
        found = [{str(s.index): s.data for s in x.addressable_shards} for x in leaves]
        for parts in found:
            for data in parts.values():
                data.copy_to_host_async()
        # A CPU's array would be looked at, not copied, and the next step writes to it.
        copy = True if jax.local_devices()[0].platform == "cpu" else None
        tensors = {name: np.array(found[i][index], copy=copy) for name, i, index in _parts(leaves)}
        oldest = min(self._files.values(), key=self._step)
        notes = {"step": str(step), "record": json.dumps(record)}

        def write() -> None:
            try:
                oldest.unlink(missing_ok=True)  # first, so that there is room
                with replacing(oldest) as temporary:
                    write_safetensors(temporary, {k: _bytes(x) for k, x in tensors.items()}, notes)
            except (InputError, OSError) as error:  # the run goes on: it has its checkpoints
                print(f"dnd: warning: no local copy of step {step}: {error}", file=sys.stderr)

        self._writing = threading.Thread(target=write, daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Waits for the copy that is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def clear(self) -> None:
        """Removes the copies."""
        self.wait()
        for path in self._files.values():
            path.unlink(missing_ok=True)

    def _path(self, step: int) -> pathlib.Path:
        return next(path for path in self._files.values() if self._step(path) == step)

    @staticmethod
    def _step(path: pathlib.Path) -> int:
        """Of a copy; 0 when there is none that can be read."""
        try:
            return int(file_notes(path).get("step", 0)) if path.is_file() else 0
        except InputError:
            return 0


def _parts(leaves: list) -> Iterator[tuple[str, int, str]]:
    """(name in the file, number of the array, index) of each different part that this process'
    devices have."""
    for i, x in enumerate(leaves):
        every = x.sharding.addressable_devices_indices_map(x.shape).values()
        for index in dict.fromkeys(map(str, every)):
            yield f"{i} {index} {x.dtype.name}", i, index


def _bytes(x: np.ndarray) -> np.ndarray:
    """An array of any type as bytes."""
    return np.atleast_1d(np.ascontiguousarray(x)).reshape(-1).view(np.uint8)
