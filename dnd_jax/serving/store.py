"""A folder of generated adapters with a limit of its size: what was not used for longest goes, what
is in use stays.

FOLDER/adapters/ID/adapter       a PEFT folder
FOLDER/adapters/ID/entry.json    what it was made from; ID is whole or not there
FOLDER/names/NAME.json           the order that a name stands for, kept when its adapter goes
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_object, replacing, write_json
from dnd_jax.core.names import name_fault

ADAPTER, ENTRY = "adapter", "entry.json"


class NoRoom(Exception):
    """The adapters in use, and this one, are more than the limit."""


class InUse(Exception):
    """What was to be deleted is in use."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kept adapter. prompts: their number; made: seconds since 1970; bytes: of its files;
    closest: (training task, cosine); warnings: what is to be said of its prompts."""

    id: str
    path: str
    base: str
    rank: int
    seed: int
    strength: float
    prompts: int
    seconds: float
    made: float
    bytes: int
    closest: tuple[tuple[str, float], ...] = ()
    warnings: tuple[str, ...] = ()


class AdapterStore:
    """The adapters of a folder that this process has for itself. Any thread may call.

    limit: bytes of all adapters. Raises InputError where the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, limit: int):
        self.folder, self.limit = pathlib.Path(folder), limit
        self._adapters, self._names = self.folder / "adapters", self.folder / "names"
        self._lock = threading.RLock()
        self._holds: collections.Counter[str] = collections.Counter()
        self._coming = 0  # bytes of what is being written, at most
        # The one that was not used for longest is the first.
        self._entries: collections.OrderedDict[str, Entry] = collections.OrderedDict()
        for path in (self._adapters, self._names):
            path.mkdir(parents=True, exist_ok=True)
        self._load()

    @property
    def bytes(self) -> int:
        """Of all adapters."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    def entries(self) -> list[Entry]:
        """All, the last used first."""
        with self._lock:
            return list(self._entries.values())[::-1]

    def get(self, id: str) -> Entry | None:
        """The adapter, now the last used one; None where there is none."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is not None:
                self._used(id)
            return entry

    def put(self, id: str, size: int, write: Callable[[pathlib.Path], None], **of: object) -> Entry:
        """Keeps what `write` writes to the folder that it is given, about `size` bytes; `of`: the
        entry's fields that only the maker knows. One that is there stays.

        Raises NoRoom, and InputError when the disk refuses.
        """
        if (entry := self.get(id)) is not None:
            return entry
        with self._lock:
            self._make_room(size)
            self._coming += size
        path = self._adapters / id
        try:
            with replacing(path, directory=True) as temporary:
                write(temporary / ADAPTER)
                files = [file.stat().st_size for file in (temporary / ADAPTER).iterdir()]
                entry = Entry(id=id, path=str(path.absolute() / ADAPTER), bytes=sum(files), **of)
                fields = dataclasses.asdict(entry)
                del fields["path"]  # the folder may be moved
                write_json(temporary / ENTRY, fields)
            with self._lock:
                self._entries[id] = entry
        finally:
            with self._lock:
                self._coming -= size
        return entry

    @contextlib.contextmanager
    def hold(self, id: str) -> Iterator[Entry | None]:
        """The adapter, which stays while the block lasts; None where there is none."""
        with self._lock:
            entry = self.get(id)
            if entry is not None:
                self._holds[id] += 1
        try:
            yield entry
        finally:
            if entry is not None:
                with self._lock:
                    self._holds[id] -= 1

    def delete(self, id: str) -> None:
        """Raises InUse."""
        with self._lock:
            if self._holds[id]:
                raise InUse(id)
            if id in self._entries:
                self._remove(id)

    def call(self, name: str, order: dict) -> None:
        """Keeps an order under a name. Raises InputError for what is no name and one that stands
        for another order."""
        with self._lock:
            if fault := name_fault(name):
                raise InputError(f"name: {fault}")
            known = self.order_of(name)
            if known and known != order:
                raise InputError(
                    f"name: {name!r} stands for another order; delete its adapter or take another "
                    "name"
                )
            if not known:
                write_json(self._names / f"{name}.json", order)

    def forget(self, name: str) -> None:
        """The order of a name."""
        (self._names / f"{name}.json").unlink(missing_ok=True)

    def names(self) -> list[str]:
        """All, in alphabetical order."""
        return sorted(path.stem for path in self._names.glob("[!.]*.json"))

    def order_of(self, name: str) -> dict:
        """What a name stands for; empty where it is none."""
        path = self._names / f"{name}.json"
        if name_fault(name) or not path.is_file():
            return {}
        with contextlib.suppress(InputError):
            return read_object(path)
        return {}

    def _load(self) -> None:
        """What is there, in the order of its last use; what is not whole is removed."""
        found = []
        for path in self._adapters.iterdir():
            entry = _read(path)
            if entry is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            found.append((path.stat().st_mtime, entry))
        self._entries.update((entry.id, entry) for _, entry in sorted(found, key=lambda x: x[0]))
        with contextlib.suppress(NoRoom):
            self._make_room(0)

    def _used(self, id: str) -> None:
        self._entries.move_to_end(id)
        with contextlib.suppress(OSError):
            os.utime(self._adapters / id)  # known to the next process too

    def _make_room(self, size: int) -> None:
        """Removes adapters until so many bytes have room beside the others. Raises NoRoom."""
        free = self.limit - self.bytes - self._coming
        going = []
        for id, entry in self._entries.items():
            if size <= free:
                break
            if not self._holds[id]:
                going.append(id)
                free += entry.bytes
        if size > free:
            raise NoRoom
        for id in going:
            self._remove(id)

    def _remove(self, id: str) -> None:
        """First under another name, so that a half-removed one is no adapter."""
        path = self._adapters / id
        gone = path.with_name(f".{id}.{time.monotonic_ns()}")
        path.rename(gone)
        del self._entries[id]
        shutil.rmtree(gone, ignore_errors=True)


def _read(path: pathlib.Path) -> Entry | None:
    """The entry of a kept adapter; None of what is none."""
    if path.name.startswith(".") or not (path / ADAPTER).is_dir():
        return None
    try:
        fields = read_object(path / ENTRY)
        closest = tuple((str(name), float(cosine)) for name, cosine in fields.pop("closest"))
        warnings = tuple(fields.pop("warnings"))
        where = str(path.absolute() / ADAPTER)
        entry = Entry(path=where, closest=closest, warnings=warnings, **fields)
    except (InputError, TypeError, ValueError, KeyError, AttributeError):
        return None
    return entry if entry.id == path.name else None
