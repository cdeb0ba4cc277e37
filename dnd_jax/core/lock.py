"""A folder for one writer: a file in it says who has it, and is touched as a sign of life.

A holder of this machine is gone when its process is; one of another machine when it has not
touched the file for LIMIT seconds, by the clock of the file system. Whoever finds it gone takes
over: exactly one does, however many try, and a process that is killed at any point leaves nothing
that keeps the next one out.

    FOLDER/.lock             {"token", "stage", "host", "system", "pid", "started", "since"}
    FOLDER/.lock.TOKEN       who is about to take over from the holder of this token
    FOLDER/.lock.TOKEN.new   what the holder of this token is about to link to one of these names
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from tqdm import tqdm

from dnd_jax.core import processes
from dnd_jax.core.errors import InputError
from dnd_jax.core.stopping import stop

NAME = ".lock"
BEAT = 10.0  # seconds between signs of life
LIMIT = 120.0  # seconds without one after which a holder on another machine counts as gone
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

_held: set[str] = set()  # tokens of what this process holds


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has a folder. started: as `processes.started`. since: local time."""

    token: str
    stage: str = ""
    host: str = ""
    system: str = ""
    pid: int = 0
    started: str | None = None
    since: str = ""

    def __str__(self) -> str:
        if not self.host:
            return f"somebody whose {NAME} cannot be read"
        return f"`dnd {self.stage}` (process {self.pid} on {self.host}, since {self.since})"

    def is_gone(self, age: float) -> bool | None:
        """Whether the process is, None where this machine cannot know. age: seconds since its last
        sign of life."""
        if self.system == processes.system() and self.host == socket.gethostname():
            now = processes.started(self.pid)
            return None if now is None or self.started is None else now != self.started
        if self.host in ("", socket.gethostname()) and age > processes.uptime():
            return True  # this machine has started since
        return True if age > LIMIT else None


class Seen(NamedTuple):
    """A lock as it was read. touched: the last sign of life, by the file system's clock."""

    holder: Holder
    touched: float


@contextlib.contextmanager
def locked(folder: pathlib.Path, stage: str) -> Iterator[None]:
    """The folder for this process alone, and all that runs in it, while the block lasts.

    Raises InputError that says who has it, and where it cannot be written.
    """
    path = folder / NAME
    me = Holder(
        secrets.token_hex(8),
        stage,
        socket.gethostname(),
        processes.system(),
        os.getpid(),
        processes.started(os.getpid()),
        time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        seen = _read(path)
        inside = seen is not None and seen.holder.token in _held  # a stage inside a stage
        other = None if inside else _take(path, me)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write here ({error.strerror or error}); choose another --workdir"
        ) from None
    if other is not None:
        raise InputError(
            f"{folder}: in use by {other}; wait until it ends, or use another --workdir"
        )
    with contextlib.nullcontext() if inside else _living(path, me):
        yield


@contextlib.contextmanager
def _living(path: pathlib.Path, me: Holder) -> Iterator[None]:
    """Signs of life while the block lasts; then gives the lock back."""
    _held.add(me.token)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, me, ended), daemon=True, name="lock")
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        _held.discard(me.token)
        with contextlib.suppress(OSError):
            if _is(path, me):
                path.unlink()


def _take(path: pathlib.Path, me: Holder) -> Holder | None:
    """Makes this process the holder, unless the one who is returned is it.

    To take over from one that is gone, a contender must first hold the lock named after that one's
    token, in the same way; only then may it replace the file, if it is still that one's.
    """
    while True:
        stop.check()
        if _create(path, me):
            _sweep(path)
            return None
        seen = _read(path)
        if seen is None:
            continue  # given back just now
        gone = seen.holder.is_gone(age := max(_now(path.parent) - seen.touched, 0.0))
        if gone is None:
            gone = _watch(path, seen, age)
        if not gone:
            return seen.holder
        claim = path.with_name(f"{NAME}.{seen.holder.token}")
        if _take(claim, me) is not None:
            time.sleep(0.02)  # another one is about to
            continue
        try:
            if _is(path, seen.holder):
                _written(path, me).replace(path)
                _sweep(path)
                return None
        finally:
            claim.unlink(missing_ok=True)


def _watch(path: pathlib.Path, seen: Seen, age: float) -> bool:
    """Whether a holder that this machine cannot look up gives no sign of life until LIMIT, or lets
    go of the lock. age: seconds since the last one."""
    tqdm.write(
        f"{path.parent}: held by {seen.holder}; waiting for its next sign of life, "
        f"{LIMIT - age:.0f} s at most"
    )
    end = time.monotonic() + LIMIT - age
    while time.monotonic() < end:
        now = _read(path)
        if now is None or now.holder != seen.holder:
            return True
        if now.touched != seen.touched:
            return False
        stop.check()
        time.sleep(BEAT / 20)
    return True


def _written(path: pathlib.Path, me: Holder) -> pathlib.Path:
    """What says who this is, in a file of its own beside the lock."""
    new = path.with_name(f"{NAME}.{me.token}.new")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(me), file)
        file.flush()
        os.fsync(file.fileno())
    return new


def _create(path: pathlib.Path, me: Holder) -> bool:
    """Whether there was no lock, and now is this one."""
    new = _written(path, me)
    try:
        os.link(new, path)
        return True
    except FileExistsError:
        return new.stat().st_nlink == 2  # NFS: it was done, but the answer was lost
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(me), file)
            return True
        return False
    finally:
        new.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> Seen | None:
    """The lock, None where there is none. Where the content is no holder's, as a power cut leaves
    it, only the signs of life count."""
    try:
        with open(path, "rb") as file:
            content, stat = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError):
        holder = Holder(f"{stat.st_ino:016x}")
    return Seen(holder, stat.st_mtime)


def _is(path: pathlib.Path, holder: Holder) -> bool:
    """Whether the lock is this holder's."""
    seen = _read(path)
    return seen is not None and seen.holder.token == holder.token


def _now(folder: pathlib.Path) -> float:
    """The time by the clock that the folder's file system stamps files with."""
    probe = folder / f"{NAME}.{secrets.token_hex(8)}.new"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _sweep(path: pathlib.Path) -> None:
    """Removes what killed contenders left beside a lock that is ours now."""
    for left in path.parent.glob(f"{NAME}.*"):
        with contextlib.suppress(OSError):
            old = path.stat().st_mtime - left.stat().st_mtime > LIMIT
            if old and re.fullmatch(r"\.[0-9a-f]{16}(\.new)?", left.name.removeprefix(NAME)):
                left.unlink()


def _beat(path: pathlib.Path, me: Holder, ended: threading.Event) -> None:
    """Touches the lock until the end, and makes it anew where somebody has removed it; ends the run
    when the lock has become another's, as after a long sleep of this machine."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            seen = _read(path)
            if seen is None and _create(path, me):
                continue
            if not _is(path, me):
                stop.lose(f"{path.parent}: another run has taken this one's lock")
                return
            os.utime(path)
