"""The one place that hashes: sha256 of files, texts, JSON and arrays, as hexadecimal text.

The sha256 of a large file is kept under $DND_JAX_CACHE (default: ~/.cache/dnd_jax) with the file's
size, inode and both times of change. These only decide whether to hash it again: a 7B base is not
read at every start, and a file that was replaced under the same name is. `touch -r` and `rsync -t`
set back the time of the contents, but not that of the inode. What is kept is a cache: each entry is
written whole, by any number of processes, and one that is lost or damaged is made again.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import cache_folder

LARGE = 1 << 20  # bytes; a smaller file is hashed as fast as its digest is looked up
# A file that changed less than this before it was hashed may change again under the same time.
SETTLED = 2_000_000_000  # nanoseconds
BLOCK = 1 << 23  # bytes read at a time
THREADS = 4  # files read at once
PATIENCE = 3.0  # seconds until the progress is shown

# {(path, size, times of change, inode): digest} of what this process could not keep in the cache
_unwritten: dict[tuple, str] = {}


def of_text(*parts: str | bytes) -> str:
    """sha256 of texts (as UTF-8) and bytes, one behind the other."""
    return of_parts(parts)


def of_parts(parts: Iterable[str | bytes]) -> str:
    """`of_text` of parts that are made one at a time, and never all in memory."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def of_texts(texts: Iterable[str]) -> str:
    """sha256 of a list of texts: it tells ["a", "b"] from ["ab"]."""
    return of_text("\0".join(texts))


def of_json(value: Any) -> str:
    """sha256 of a JSON value; the order of an object's keys does not count."""
    return of_text(json.dumps(value, sort_keys=True))


def of_array(array: np.ndarray) -> str:
    """sha256 of an array's type, shape and values."""
    return of_text(f"{array.dtype.str} {array.shape}", np.ascontiguousarray(array).tobytes())


def of_file(path: str | os.PathLike) -> str:
    """sha256 of a file's contents. Raises InputError when it cannot be read."""
    return contents([path])[pathlib.Path(path)]


def of_files(files: Mapping[str, pathlib.Path]) -> str:
    """sha256 of files under their names; where they lie does not count. Raises InputError."""
    found = contents(files.values())
    return of_json({name: found[pathlib.Path(path)] for name, path in files.items()})


def of_description(description: pathlib.Path, weights: pathlib.Path) -> str:
    """sha256 of a folder's JSON description and its safetensors file, as they are stored."""
    return of_text(description.read_bytes(), bytes.fromhex(of_file(weights)))


@functools.cache
def of_program() -> str:
    """sha256 of this program's own code."""
    sources = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    return of_text(*(path.read_bytes() for path in sources))


def contents(paths: Iterable[str | os.PathLike]) -> dict[pathlib.Path, str]:
    """{path: sha256 of the file's contents}; several are read at once, and only those whose digest
    is not kept. Raises InputError naming the first that cannot be read."""
    known = {path: _kept(path) for path in map(pathlib.Path, paths)}
    new = [path for path, digest in known.items() if digest is None]
    bar = tqdm(
        desc="sha256",
        total=sum(path.stat().st_size for path in new),
        unit="B",
        unit_scale=True,
        delay=PATIENCE,
        dynamic_ncols=True,
        leave=False,
    )
    with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as readers:
        found = readers.map(lambda path: _read(path, bar), new)
        return known | dict(zip(new, found, strict=True))


def _read(path: pathlib.Path, bar: tqdm) -> str:
    """sha256 of a file, from the disk."""
    digest, block = hashlib.sha256(), bytearray(min(BLOCK, path.stat().st_size + 1))
    try:
        with open(path, "rb", buffering=0) as file:
            before = _state(os.fstat(file.fileno()))
            while size := file.readinto(block):
                digest.update(memoryview(block)[:size])
                bar.update(size)
            unchanged = before == _state(os.fstat(file.fileno()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    size, *changed, _ = before
    if unchanged and size >= LARGE and time.time_ns() - max(changed) > SETTLED:
        _keep(path, [*before, digest.hexdigest()])
    return digest.hexdigest()


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _entry(path: pathlib.Path) -> pathlib.Path:
    """The file that keeps the digest of this one."""
    name = of_text(os.fsencode(path.resolve()))
    return cache_folder() / "sha256" / name[:2] / f"{name[2:]}.json"


def _kept(path: pathlib.Path) -> str | None:
    """The digest that is kept of a file, if it is still the one that was hashed."""
    try:
        state = _state(path.stat())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if state[0] < LARGE:
        return None
    if (digest := _unwritten.get((path.resolve(), *state))) is not None:
        return digest
    try:
        *then, digest = json.loads(_entry(path).read_bytes())
        return digest if then == state and len(bytes.fromhex(digest)) == 32 else None
    except (OSError, ValueError, TypeError):  # none, or one that a power cut left
        return None


def _keep(path: pathlib.Path, entry: list) -> None:
    """Writes what `_kept` reads, whole or not at all. Where the cache cannot be written, this
    process alone knows it."""
    file = _entry(path)
    part = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(entry))
        part.replace(file)
    except OSError:
        *state, digest = entry
        _unwritten[path.resolve(), *state] = digest
