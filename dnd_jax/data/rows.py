"""Rows of a file or of a Hugging Face dataset, each with the place that messages name it by.

JSONL, JSON (one list), parquet, a `datasets` folder, a hub id; and plain text, line by line.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line

datasets = packages.deferred("datasets")
pyarrow, parquet = packages.deferred("pyarrow"), packages.deferred("pyarrow.parquet")

FILES = (".jsonl", ".json", ".parquet")
Row = tuple[str, object]  # where it stands ("FILE:LINE"), and its value


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file. Raises InputError naming the file (and line) that cannot be read."""
    path = pathlib.Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, at = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1)
        raise InputError(
            f"{path}:{line}: not UTF-8 at byte {at} of the line; save the file as UTF-8"
        ) from None


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """(line number, text) of a UTF-8 file's non-blank lines. Raises InputError as `read_text`
    does."""
    return list(_lines(read_text(path)))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(line number, stripped line) of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if stripped := line.strip():
            yield number, stripped


def json_rows(path: str | os.PathLike, faults: list[str]) -> Iterator[Row]:
    """The rows of a JSONL file, or of a JSON file that holds one list; lines that are no JSON are
    added to `faults`."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(f"{path}{line}: not JSON ({_why(error)})") from None
        yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))
        return
    name, decode = os.fspath(path), json.JSONDecoder().raw_decode
    for number, line in _lines(text):
        try:
            row, end = decode(line)
            row = row if end == len(line) else json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{name}:{number}: not JSON ({_why(error)})")
        else:
            yield f"{name}:{number}", row


def _why(error: Exception) -> str:
    """What json says of a text that it does not take: no JSON, a number of 5,000 digits, lists in
    lists 50,000 deep."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else first_line(error)


def parquet_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a parquet file. Raises InputError naming a file that is damaged or none."""
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from None
    return [(f"{path}: row {i}", row) for i, row in enumerate(table.to_pylist(), start=1)]


def hub_rows(source: str, config: str, split: str, revision: str) -> Iterable[Row]:
    """The rows of one split of a `datasets` folder (saved by save_to_disk, or one that load_dataset
    reads) or of a hub id; config: of a hub dataset.

    Raises InputError when it cannot be had, or has no such split (listing those there are).
    """
    folder = pathlib.Path(source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(source, config or None, revision=revision or None)
    except Exception as error:  # datasets, its readers, fsspec and the hub client have their own
        raise InputError(
            f"{source}: no dataset to be had here or on the hub ({first_line(error)})"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{source}: no split {split!r}; there are {', '.join(found)}")
        found = found[split]
    name = f"{source}/{config}" if config else source
    return ((f"{name}[{split}]: row {i}", row) for i, row in enumerate(found, start=1))
