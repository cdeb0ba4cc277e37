"""Files that are whole or absent: outputs are written under a temporary name and renamed; JSON is
read with clear errors."""

import contextlib
import glob
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError

from dnd_jax.core.errors import InputError


@contextlib.contextmanager
def replacing(path: str | os.PathLike, directory: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path` and renames it onto `path` when the block ends well;
    else leaves nothing.

    With directory=True the temporary path is a new folder. Raises InputError when the disk refuses
    or is full.
    """
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = f".{path.name}.{socket.gethostname()}-"
        for abandoned in path.parent.glob(f"{glob.escape(mine)}*"):  # by a process that was killed
            if not _alive(abandoned.name.removeprefix(mine).split("-")[0]):
                shutil.rmtree(abandoned, ignore_errors=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=path.parent))
        target = temporary / path.name
        if directory:
            target.mkdir()
        yield target
        if directory and path.is_dir():
            path.rename(temporary / "old")
        target.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own class
        raise InputError(
            f"{path}: cannot write here ({getattr(error, 'strerror', None) or error}); choose "
            "another folder or free some space"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _alive(pid: str) -> bool:
    """Whether this machine has such a process, or may have."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def check_free(folder: str | os.PathLike, flag: str) -> None:
    """Raises InputError unless the folder that --flag asks to write is absent or empty."""
    folder = pathlib.Path(folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--{flag}={folder}: exists already; choose another --{flag}")


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


def write_array(
    path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> None:
    """A .npy file of this shape from its parts along axis 0, held one at a time."""
    dtype = np.dtype(dtype).newbyteorder("<")
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": shape}
        )
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value of a file. Raises InputError naming the file when it is absent, not UTF-8 or
    not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
