"""A folder of generated adapters with a limit of its size: what was not used for longest goes, what
is in use stays.

FOLDER/served/ID/adapter       a PEFT folder
FOLDER/served/ID/entry.json    what it was made from; ID is whole or not there
FOLDER/names/NAME.json         the order that a name stands for, kept when its adapter goes
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import as_json, read_object, replacing, write_json
from dnd_jax.core.names import name_fault

SERVED, NAMES, ADAPTER, ENTRY = "served", "names", "adapter", "entry.json"
ID = re.compile(r"[0-9a-f]{32}")  # of an adapter


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

    limit: bytes of all adapters and names. Raises InputError where the folder cannot be written, or
    has what is none of ours among the adapters.
    """

    def __init__(self, folder: str | os.PathLike, limit: int):
        self.folder, self.limit = pathlib.Path(folder), limit
        self._adapters, self._names = self.folder / SERVED, self.folder / NAMES
        self._lock = threading.RLock()
        self._holds: collections.Counter[str] = collections.Counter()
        self._coming = 0  # bytes of what is being written, at most
        # The one that was not used for longest is the first.
        self._entries: collections.OrderedDict[str, Entry] = collections.OrderedDict()
        self._called: dict[str, tuple[str, int]] = {}  # name -> (id, bytes of its file)
        for path in (self._adapters, self._names):
            path.mkdir(parents=True, exist_ok=True)
        self._load()

    @property
    def bytes(self) -> int:
        """Of all adapters and names."""
        with self._lock:
            of_names = sum(size for _, size in self._called.values())
            return sum(entry.bytes for entry in self._entries.values()) + of_names

    def entries(self) -> list[Entry]:
        """All, the last used first."""
        with self._lock:
            return list(self._entries.values())[::-1]

    def get(self, id: str) -> Entry | None:
        """The adapter, now the last used one; None where there is none."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is None:
                return None
            try:
                os.utime(self._adapters / id)  # known to the next process too
            except FileNotFoundError:  # somebody has removed it
                del self._entries[id]
                return None
            self._entries.move_to_end(id)
            return entry

    def put(self, id: str, size: int, write: Callable[[pathlib.Path], None], **of: object) -> Entry:
        """Keeps what `write` writes to the folder that it is given, about `size` bytes; `of`: the
        entry's fields that only the maker knows. One that is there stays.

        Raises NoRoom, and InputError when the disk refuses.
        """
        if (entry := self.get(id)) is not None:
            return entry
        path = self._adapters / id
        with self._room(size):
            with replacing(path, directory=True) as temporary:
                write(temporary / ADAPTER)
                files = [file.stat().st_size for file in (temporary / ADAPTER).iterdir()]
                entry = Entry(id=id, path=str(path.absolute() / ADAPTER), bytes=sum(files), **of)
                fields = dataclasses.asdict(entry)
                del fields["path"]  # the folder may be moved
                write_json(temporary / ENTRY, fields)
            with self._lock:
                self._entries[id] = entry
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
        """The adapter, and the names that stand for it. Raises InUse."""
        with self._lock:
            if self._holds[id]:
                raise InUse(id)
            gone = self._take_out(id) if id in self._entries else None
            for name in [name for name, (of, _) in self._called.items() if of == id]:
                self.forget(name)
        if gone is not None:
            shutil.rmtree(gone, ignore_errors=True)

    def check_name(self, name: str, order: dict) -> None:
        """Raises InputError for what is no name, and one that stands for another order."""
        if fault := name_fault(name) or ("looks like an id" if ID.fullmatch(name) else ""):
            raise InputError(f"name: {fault}")
        known = self.order_of(name)
        if known and known != order:
            raise InputError(
                f"name: {name!r} stands for another order; delete it or take another name"
            )

    def call(self, name: str, id: str, order: dict) -> None:
        """Keeps the order of an adapter under a name. Raises as `check_name`, NoRoom, and
        InputError when the disk refuses."""
        content = {"id": id, "order": order}
        size = len(as_json(content).encode())
        with self._room(size), self._lock:  # two may come with one name
            self.check_name(name, order)
            write_json(self._names / f"{name}.json", content)
            self._called[name] = id, size

    def forget(self, name: str) -> None:
        """A name, if it is one."""
        with self._lock:
            if self._called.pop(name, None):
                (self._names / f"{name}.json").unlink(missing_ok=True)

    def names(self) -> list[str]:
        """All, in alphabetical order."""
        with self._lock:
            return sorted(self._called)

    def id_of(self, name: str) -> str:
        """Of the adapter that a name was given to; empty where it is none."""
        with self._lock:
            return self._called.get(name, ("", 0))[0]

    def order_of(self, name: str) -> dict:
        """What a name stands for; empty where it is none."""
        if not self.id_of(name):
            return {}
        with contextlib.suppress(InputError, TypeError, KeyError):  # of a file that was changed
            return read_object(self._names / f"{name}.json")["order"]
        return {}

    def _load(self) -> None:
        """What is there, in the order of its last use; what is half written is removed."""
        found = []
        for path in self._adapters.iterdir():
            if not ID.fullmatch(path.name.lstrip(".").split(".")[0]) or not path.is_dir():
                raise InputError(
                    f"{path}: is none of `dnd serve`'s; give it a folder of its own by --cache"
                )
            entry = _read(path)
            if entry is None:
                shutil.rmtree(path)
            else:
                found.append((path.stat().st_mtime, entry))
        self._entries.update((entry.id, entry) for _, entry in sorted(found, key=lambda x: x[0]))
        for path in self._names.glob("[!.]*.json"):
            with contextlib.suppress(InputError, TypeError, KeyError):
                self._called[path.stem] = str(read_object(path)["id"]), path.stat().st_size
        with contextlib.suppress(NoRoom), self._room(0):
            pass

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """So many bytes beside the others while the block lasts; adapters go for them. Raises
        NoRoom."""
        with self._lock:
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
            gone = [self._take_out(id) for id in going]
            self._coming += size
        try:
            for path in gone:
                shutil.rmtree(path, ignore_errors=True)
            yield
        finally:
            with self._lock:
                self._coming -= size

    def _take_out(self, id: str) -> pathlib.Path:
        """Where an adapter lies that is none any more, to be removed: under another name, so that
        a half-removed one is no adapter."""
        del self._entries[id]
        gone = self._adapters / f".{id}.{time.monotonic_ns()}"
        with contextlib.suppress(FileNotFoundError):  # somebody has removed it
            (self._adapters / id).rename(gone)
        return gone


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
