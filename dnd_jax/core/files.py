"""Files that are whole or absent, whatever happens: outputs are written under a temporary name,
brought to the disk and renamed; JSON is read with clear errors.

What a program writes inside `replacing` survives SIGKILL and a power cut: at every instant the path
leads to the old content or the new, whole. The cost is waiting for the disk, once a file and twice
a folder: a few milliseconds on an SSD.
"""

import codecs
import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from safetensors import SafetensorError

from dnd_jax.core.errors import InputError, first_line
from dnd_jax.core.exchange import exchange

CACHE = "DND_JAX_CACHE"
_staged: set[pathlib.Path] = set()  # this process's temporary folders
_OLD = ".old"  # behind the name of what was there, inside a temporary folder


@contextlib.contextmanager
def replacing(path: str | os.PathLike, directory: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path` and puts it in the place of `path` when the block ends
    well; else leaves nothing.

    With directory=True the temporary path is a new folder, and a folder in its place is exchanged
    for it in one step where the system can. Permissions follow the umask, whatever wrote the files.
    Raises InputError when the disk refuses or is full.
    """
    path, staging = pathlib.Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path)
        staging = path.parent / f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}"
        _staged.add(staging)
        staging.mkdir()
        target = staging / path.name
        if directory:
            target.mkdir()
        yield target
        _settle(target, stat.S_IMODE(staging.stat().st_mode))
        put = _put_folder if directory else os.replace
        put(target, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own class
        raise _refused(error, path, staging) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
            _staged.discard(staging)


def recover(path: str | os.PathLike) -> bool:
    """Whether a folder is there again that a writer, killed between the two renames of a system
    without an exchange, had taken away: the new one, which was whole."""
    path = pathlib.Path(path)
    for staging in _abandoned(path) if not os.path.lexists(path) else ():
        target = staging / path.name
        if target.is_dir() and (staging / f"{path.name}{_OLD}").is_dir():
            with contextlib.suppress(OSError):
                target.rename(path)
                return True
    return False


def _clean(path: pathlib.Path) -> None:
    """Removes what killed writers of this path left, after `recover`."""
    recover(path)
    for staging in _abandoned(path):
        shutil.rmtree(staging, ignore_errors=True)


def _prefix(path: pathlib.Path) -> str:
    return f".{path.name}.{socket.gethostname()}-"


def _abandoned(path: pathlib.Path) -> list[pathlib.Path]:
    """The temporary folders of this path that `replacing` made in processes of this host that are
    gone: by their names, and by what is in them."""
    mine, found = _prefix(path), []
    for folder in path.parent.glob(f"{glob.escape(mine)}*"):
        name = re.fullmatch(r"(\d+)-[a-z0-9_]{8}", folder.name.removeprefix(mine))
        if name and folder not in _staged and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):
                ours = set(os.listdir(folder)) <= {path.name, f"{path.name}{_OLD}"}
                if ours and not _alive(int(name[1])):
                    found.append(folder)
    return found


def _alive(pid: int) -> bool:
    """Whether this machine has such a process beside this one, or may have."""
    if pid == os.getpid():
        return False  # what is this process's own is in _staged
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _put_folder(target: pathlib.Path, path: pathlib.Path) -> None:
    """Puts a folder at `path`; another there, which came perhaps this instant from another process,
    is then in the temporary folder. Without an exchange by the system there is an instant without
    either, which `recover` mends."""
    try:
        target.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        if not exchange(target, path):
            path.rename(target.with_name(f"{path.name}{_OLD}"))
            target.rename(path)


def _settle(target: pathlib.Path, mode: int) -> None:
    """Brings a file, or all of a folder, to the disk, with the permissions `mode` of a new folder,
    which are the umask's. What a link leads to is another's."""
    if target.is_symlink():
        return
    if target.is_dir():
        for entry in target.iterdir():
            _settle(entry, mode)
    wanted = mode if target.is_dir() else mode & 0o666
    if stat.S_IMODE(target.stat().st_mode) & 0o777 != wanted & 0o777:
        with contextlib.suppress(PermissionError):  # a file system without permissions
            target.chmod(wanted)
    sync(target)


def sync(path: pathlib.Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk. Raises OSError as the
    system does."""
    file = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "FFULLFSYNC"):  # macOS, whose fsync leaves it in the drive's cache
            fcntl.fcntl(file, fcntl.FFULLFSYNC)
        else:
            os.fsync(file)
    except OSError as error:  # some network file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(file)


# Of a disk that takes no more, whatever was being done.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def _refused(error: Exception, path: pathlib.Path, staging: pathlib.Path | None) -> InputError:
    """The user's line for an error while `path` was written: of the disk, or of another file that
    was read for it."""
    name = getattr(error, "filename", None)
    if staging is not None and isinstance(name, str | bytes) and error.errno not in FULL:
        of = pathlib.Path(os.fsdecode(name))
        if of not in (path, path.parent) and not of.is_relative_to(staging):
            return unreadable(error)
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"{path}: cannot write here ({reason}); choose another folder or free some space"
    )


def unreadable(error: OSError, otherwise: str = "a file") -> InputError:
    """The user's line for an error while something was read: the file, and why. otherwise: what it
    was, where the system does not say."""
    name = otherwise if error.filename is None else os.fsdecode(error.filename)
    return InputError(f"{name}: cannot be read ({error.strerror or error})")


def holds_only(folder: pathlib.Path, names: Collection[str]) -> bool:
    """Whether this is a folder, no link to one, with files of these names, and of systems, and
    nothing else: what may be removed by whoever writes such."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return all(
            (entry.name in names or is_of_system(entry.name)) and not entry.is_dir()
            for entry in entries
        )


def is_of_system(name: str) -> bool:
    """Whether a file has a name by which macOS, or a network file system, leaves its own in any
    folder."""
    return name == ".DS_Store" or name.startswith(("._", ".nfs"))


def check_free(folder: str | os.PathLike, flag: str) -> None:
    """Raises InputError unless the folder that --flag asks to write is absent or empty, but for
    files of systems."""
    folder = pathlib.Path(folder)
    if os.path.lexists(folder) and (
        not folder.is_dir() or not all(is_of_system(path.name) for path in folder.iterdir())
    ):
        raise InputError(f"--{flag}={folder}: exists already; choose another --{flag}")


def check_unused(folder: pathlib.Path, what: str, instead: str) -> None:
    """Raises InputError unless the folder that `what` is to be written to is absent or empty: what
    is there was made by somebody else."""
    if os.path.lexists(folder) and not holds_only(folder, ()):
        raise InputError(
            f"{folder}: {what} would be written here, in the place of what is there; move that "
            f"away, or {instead}"
        )


def cache_folder() -> pathlib.Path:
    """Where what can be made again is kept: $DND_JAX_CACHE, else ~/.cache/dnd_jax. Of a user
    without a home, a path below which nothing can be written."""
    folder = pathlib.Path(os.path.expanduser(os.environ.get(CACHE) or "~/.cache/dnd_jax"))
    return folder if not folder.parts[0].startswith("~") else pathlib.Path(os.devnull, "cache")


def need_space(
    folder: pathlib.Path, size: int, what: str, instead: str = "use another --workdir"
) -> None:
    """Makes a folder to write `size` bytes to. Raises InputError naming `what` needs them when the
    disk has fewer."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{folder}: {what} need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; {instead}"
        )


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(as_json(value), encoding="utf-8")


def as_json(value: Any) -> str:
    """`value` as indented JSON, the content of a file."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises InputError naming the file (and line)
    that cannot be read."""
    path = pathlib.Path(path)
    try:
        return text_of(path.read_bytes(), path)
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def text_of(raw: bytes, path: str | os.PathLike) -> str:
    """The text of a file's UTF-8 bytes. Raises InputError naming the file and line that are not."""
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise InputError(f"{path}: is UTF-16; save the file as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, at = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1)
        raise InputError(
            f"{path}:{line}: not UTF-8 at byte {at} of the line; save the file as UTF-8"
        ) from None


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value of a file. Raises InputError naming the file when it is absent, not UTF-8 or
    not JSON."""
    try:
        text = read_text(path)
        value = json_of(text, path)
        if "\\ud" in text or "\\uD" in text:
            check_whole(value, path)
        return value
    except InputError:
        if os.path.lexists(path):
            raise
    if recover(pathlib.Path(path).parent):
        return read_json(path)
    raise InputError(f"{path}: no such file")


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object of a file of ours. Raises InputError as `read_json`, or for another value."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object; remove it, or copy it again")
    return raw


def json_of(text: str, where: str | os.PathLike, once: bool = False) -> Any:
    """The JSON value of a file's text. once: no object may have a key twice. Raises InputError
    naming the file and line of what is no JSON, or no text."""
    try:
        return json.loads(text, object_pairs_hook=once_each if once else None)
    except json.JSONDecodeError as error:
        empty = "" if text.strip() else ": it is empty"
        raise InputError(f"{where}:{error.lineno}: not JSON ({error.msg}{empty})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON that can be read ({why_no_json(error)})") from None


def check_whole(value: Any, where: str | os.PathLike) -> None:
    """Raises InputError, naming the file, for a JSON value with half of a character in it, which no
    file of ours could hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.end]
        raise InputError(
            f"{where}: {near!r} ends in half of a character (a surrogate, as left by cutting "
            "through an emoji); remove it"
        ) from None


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values. Raises ValueError for a key that is there twice: which one
    counts would be a guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key, count in times.items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def why_no_json(error: Exception) -> str:
    """What json says of a text that it does not take: no JSON, a number of 5,000 digits, lists in
    lists 50,000 deep."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else first_line(error)
