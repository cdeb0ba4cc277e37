"""safetensors: the weights of a model's folder, whole or in shards; files larger than memory,
written one tensor after another, and changed in place.

The format: the header's length (8 bytes, little-endian), a JSON header {name: {"dtype", "shape",
"data_offsets"}}, then the bytes. Reading goes through the safetensors package; only what
it cannot do is done here.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import operator
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json, recover
from dnd_jax.core.whereabouts import flaw, no_weights


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of one .safetensors file as NumPy arrays (bfloat16 included). Raises InputError
    on a damaged file."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[safe_open]:
    """An open .safetensors file. Raises InputError when it is absent or damaged."""
    path = pathlib.Path(path)
    if not path.is_file() and not (recover(path.parent) and path.is_file()):
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if line := flaw(path):
            raise InputError(line) from None
        raise InputError(
            f"{path}: not a readable safetensors file ({error}); it may be truncated, copy it again"
        ) from None


INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what its file's header says of it; dtype: as safetensors names
    it."""

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weights of a model's folder: model.safetensors, else the shards that its index names.

    Raises InputError when they are not there, naming what is.
    """
    index, whole = folder / INDEX, folder / WHOLE
    if whole.is_file() or not index.is_file():  # in this order, as transformers reads
        if not whole.is_file() and not recover(folder):
            raise InputError(f"{whole}: no such file; {no_weights(folder)}")
        return [whole]
    if line := flaw(index):
        raise InputError(line)
    places = read_json(index)
    shards = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and name == os.path.basename(name) for name in shards.values()
    ):
        raise InputError(f"{index}: no weight_map of files beside it; copy the file again")
    return [folder / name for name in sorted(set(shards.values()))]


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a model's folder, by its name, from the files' headers alone. Raises
    InputError as `weight_files`, naming a file that is absent or damaged, and for a tensor that two
    files hold."""
    found = {}
    for path in weight_files(folder):
        for name, tensor in file_tensors(path).items():
            if name in found:
                other = found[name].path.name
                raise InputError(f"{path}: {name} is in {other} too; copy the folder again")
            found[name] = tensor
    return found


def file_tensors(path: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of one .safetensors file, by its name, from its header alone. Raises InputError
    when the file is absent or damaged."""
    with opened(path) as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, not a dict
        return {
            key: Stored(path, tuple(part.get_shape()), part.get_dtype())
            for key, part in parts.items()
        }


def file_notes(path: pathlib.Path) -> dict[str, str]:
    """The texts that a .safetensors file's header has beside its tensors. Raises InputError when
    the file is absent or damaged."""
    with opened(path) as file:
        return file.metadata() or {}


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors that are in memory, with the permissions that the umask gives a new file:
    safetensors' own function gives them to the owner alone."""
    path = pathlib.Path(path)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    path.chmod(mode)


DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8


def write_tensors(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file from a stream of (name, tensor); shapes: {name: (shape, dtype)} of
    all of them, in the same order. A tensor may come in several parts, one behind the other: blocks
    of its rows.

    Raises ValueError when the stream is not what `shapes` announced.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH)  # the data begin on a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        streamed = itertools.groupby(tensors, key=operator.itemgetter(0))
        for (name, (shape, dtype)), (found, parts) in zip(shapes.items(), streamed, strict=True):
            wanted = name, tuple(shape[1:]), np.dtype(dtype)
            left = math.prod(shape)
            for _, part in parts:
                left -= part.size
                if (found, part.shape[1:], part.dtype) != wanted or left < 0:
                    raise ValueError(
                        f"announced {name} {shape} {dtype}, got {found} {part.shape} {part.dtype}"
                    )
                file.write(np.ascontiguousarray(part).view(np.uint8).data if part.size else b"")
            if left:
                raise ValueError(f"announced {name} {shape} {dtype}, got {left} values fewer")


def open_tensors(path: str | os.PathLike, mode: str = "r") -> dict[str, np.memmap]:
    """The floating-point tensors of a safetensors file, mapped into memory and none of them read
    yet; with mode "r+" what is assigned to them is written through to the file.

    Raises InputError as `opened`.
    """
    with opened(path):  # which checks the header: types, shapes, and that they fill the file
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    first = _LENGTH + length
    return {
        name: np.memmap(
            path,
            DTYPES[entry["dtype"]],
            mode,
            first + entry["data_offsets"][0],
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if entry["dtype"] in DTYPES and 0 not in entry["shape"]
    }
