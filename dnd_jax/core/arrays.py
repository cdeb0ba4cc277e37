"""Arrays larger than memory as .npy files, and whether one still is what was written.

Behind the array stands a record, written last: the size and a checksum of SAMPLES blocks spread
over the file. A reader pays one pass over those blocks (0.5 MB), not over the file. What it
catches for certain: a file that is truncated, empty or zeroed at its end, and any run of wrong
bytes longer than 1/SAMPLES of the file; shorter ones by chance.
"""

import os
import pathlib
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from dnd_jax.core.errors import first_line

SAMPLES = 128
_BLOCK = 4096  # bytes
_MAGIC = b"dnd_jax\x01"
_RECORD = struct.Struct("<8sQI")  # _MAGIC, bytes before the record, checksum


def write_array(
    path: str | os.PathLike, shape: tuple[int, ...], dtype: DTypeLike, parts: Iterable[np.ndarray]
) -> None:
    """A .npy file of this shape from its parts along axis 0, held one at a time, with its record;
    NumPy reads it as any other; of a type that it lacks, such as bfloat16, raw bytes."""
    dtype = np.dtype(dtype).newbyteorder("<")
    with open(path, "w+b") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": shape}
        )
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).view(np.uint8).data)
        size = file.tell()
        file.flush()
        record = _RECORD.pack(_MAGIC, size, _checksum(file.fileno(), size))
        file.seek(size)
        file.write(record)


def open_array(path: str | os.PathLike) -> np.ndarray | None:
    """The array of a file by `write_array`, mapped into memory; None where there is no file, or,
    after one line on the terminal, where it is not what was written."""
    path = pathlib.Path(path)
    if not path.is_file():
        return None
    try:
        _check(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        tqdm.write(f"{path}: {first_line(error)}; it is made again")
        return None


def _check(path: pathlib.Path) -> None:
    """Raises ValueError unless the record is there and true."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - _RECORD.size
        record = os.pread(file.fileno(), _RECORD.size, size) if size > 0 else b""
        if len(record) < _RECORD.size or not record.startswith(_MAGIC):
            raise ValueError("its end, a record of its content, is not there")
        _, written, checksum = _RECORD.unpack(record)
        if written != size or _checksum(file.fileno(), size) != checksum:
            raise ValueError("its content is not what was written")


def _checksum(file: int, size: int) -> int:
    """The CRC-32 of SAMPLES blocks of an open file, the first and the last among them; of all of a
    small one."""
    last = max(size - _BLOCK, 0)
    found = 0
    for at in dict.fromkeys(last * i // (SAMPLES - 1) for i in range(SAMPLES)):
        found = zlib.crc32(os.pread(file, min(_BLOCK, size), at), found)
    return found
