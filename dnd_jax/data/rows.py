"""Rows of a file or of a Hugging Face dataset, each with the place that messages name it by.

    .jsonl .ndjson .json        objects, one a line, or one list of them, also at a key of the file
    .csv .tsv                   a line of names, then cells
    .parquet .arrow .feather    tables
    a folder, a hub id          what `datasets` reads

.gz, .bz2 or .xz may stand behind the first five.
"""

import bz2
import contextlib
import dataclasses
import gzip
import itertools
import json
import lzma
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from dnd_jax.core import digests, packages
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.core.files import (
    is_of_system,
    json_of,
    once_each,
    read_text,
    text_of,
    why_no_json,
)
from dnd_jax.core.names import name_fault, twin_faults
from dnd_jax.data.tables import cell_rows, shortest, table_rows, unlabeled

datasets = packages.deferred("datasets")

Row = tuple[str, object]  # where it stands ("FILE:LINE"), and its value
CELLS = {".csv": ",", ".tsv": "\t"}
JSON = (".jsonl", ".ndjson", ".json")
TEXTS = (*JSON, *CELLS)
FILES = (*TEXTS, ".parquet", ".arrow", ".feather")
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
GLOBBED = "*?[]{}"  # in the name of a folder, which `datasets` takes for a pattern


def kind_of(path: str | os.PathLike, *also: str) -> tuple[str, str]:
    """(what a file is by its name, what it is packed in): (".csv", ".gz"), (".csv", ""); in lower
    case. ("", "") for one of no known kind. also: text files that count as known."""
    *_, first, last = ["", "", *(suffix.lower() for suffix in pathlib.Path(path).suffixes)]
    if last in (*FILES, *also):
        return last, ""
    return (first, last) if last in PACKED and first in (*TEXTS, *also) else ("", "")


def unknown_kind(path: str | os.PathLike, *also: str) -> InputError:
    """Of a file whose name ends as none that is read; the error says which are."""
    suffix = pathlib.Path(path).suffix
    return InputError(
        f"{path}: files {f'of {suffix}' if suffix else 'without a suffix'} are not read; save it "
        f"as one of {', '.join((*also, *FILES))}; the first {len(also) + len(TEXTS)} may be packed "
        f"({', '.join(PACKED)})"
    )


def prompt_files(path: str | os.PathLike) -> dict[str, pathlib.Path]:
    """{"": a file of prompts}, or of a folder {NAME: the file NAME.jsonl, NAME.txt.gz, ... in it},
    hidden ones and files of systems left out.

    Raises InputError for a folder without any, with others in it, and for names that cannot be
    those of folders or are there twice.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return {"": path}
    found: dict[str, pathlib.Path] = {}
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or is_of_system(file.name):
            continue
        if file.is_dir():
            raise InputError(f"{file}: a folder among the files of prompts; give one of both")
        kind, packing = kind_of(file, ".txt")
        if not kind:
            raise unknown_kind(file, ".txt")
        name = file.name[: len(file.name) - len(kind + packing)]
        if fault := name_fault(name):
            raise InputError(f"{file}: {fault}; rename the file")
        if name in found:
            raise InputError(f"{file}: {found[name].name} has the same name; rename one")
        found[name] = file
    if not found:
        raise InputError(f"{path}: no files of prompts in this folder")
    if faults := twin_faults(found):
        raise InputError(f"{path}: {faults[0]}")
    return found


def file_rows(path: str | os.PathLike, faults: list[str], field: str = "") -> Iterable[Row]:
    """The rows of a file, read as its name says; lines that are no row are added to `faults`.
    field: the key of a JSON file's object that holds its rows.

    Raises InputError for a file that cannot be read, or of no known kind.
    """
    kind, packing = kind_of(path)
    if not kind:
        raise unknown_kind(path)
    if not os.path.lexists(path):
        raise InputError(f"{path}: cannot be read (No such file or directory){_beside(path)}")
    if kind not in TEXTS:
        return table_rows(path, kind)
    text = unpacked(path, packing)
    if field:
        return field_rows(path, text, field)
    if kind in CELLS:
        return cell_rows(path, text, CELLS[kind], faults)
    return json_rows(path, text, faults)


def _beside(path: str | os.PathLike) -> str:
    """What there is in place of a missing file: others of its name and another kind."""
    path = pathlib.Path(path)
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    stem = path.name.split(".")[0]
    names = sorted(other.name for other in found if other.name.split(".")[0] == stem)
    return f"; there is {', '.join(names)}" if names else ""


def unpacked(path: str | os.PathLike, packing: str) -> str:
    """The text of a file, packed as its suffix says or (empty) not. Raises InputError."""
    if not packing:
        return read_text(path)
    try:
        with PACKED[packing](path) as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read ({reason})") from None
    return text_of(raw, path)


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """(line number, stripped line) of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if stripped := line.strip():
            yield number, stripped


def json_rows(path: str | os.PathLike, text: str, faults: list[str]) -> Iterator[Row]:
    """The rows of a JSONL file's text, or of a JSON file's that holds one list; lines that are no
    JSON are added to `faults`."""
    if _is_one(text):
        value = json_of(text, path, once=True)
        rows = value if isinstance(value, list) else [value]
        yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))
        return
    name, decode = os.fspath(path), json.JSONDecoder(object_pairs_hook=once_each).raw_decode
    for number, line in lines_of(text):
        try:
            row, end = decode(line)
            row = row if end == len(line) else json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{name}:{number}: not JSON ({why_no_json(error)})")
        else:
            yield f"{name}:{number}", row


def field_rows(path: str | os.PathLike, text: str, field: str) -> Iterator[Row]:
    """The rows at a key of a JSON file's object: a list of them, or an object of them whose keys
    only name them. Raises InputError."""
    try:
        value = json_of(text, path, once=True)
    except InputError as error:
        raise InputError(f"{error}; a file with a field is one JSON object") from None
    if not isinstance(value, dict) or field not in value:
        there = f"there are {', '.join(value)}" if isinstance(value, dict) else "it is no object"
        raise InputError(f"{path}: no field {field!r}; {there}")
    rows = value[field]
    if isinstance(rows, list):
        named = ((f"row {i}", row) for i, row in enumerate(rows, start=1))
    elif isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
        named = ((f"row {key!r}", row) for key, row in rows.items())
    else:
        raise InputError(f"{path}: field {field!r} holds neither a list nor an object of rows")
    yield from ((f"{path}: {field}: {name}", row) for name, row in named)


def _is_one(text: str) -> bool:
    """Whether a text is one JSON value over several lines, or a list: not an object a line."""
    _, first = next(lines_of(text), (0, ""))
    if first.startswith("["):
        return True
    if not first.startswith("{") or "\n" not in text:
        return False
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(first)
        return False
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


def hub_rows(
    source: str, config: str = "", split: str = "", revision: str = "", otherwise: str = "train"
) -> Iterable[Row]:
    """The rows of one split of a `datasets` folder (saved by save_to_disk, or one that load_dataset
    reads) or of a hub id; config: of a hub dataset; otherwise: the split where none is given.

    Raises InputError when it cannot be had, or has no such split (listing those there are).
    """
    folder = pathlib.Path(source)
    if not folder.is_dir() and (source.startswith((".", "/")) or source.count("/") > 1):
        raise InputError(f"{source}: no such file or folder")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(source)
        elif folder.is_dir() and ("::" in source or any(mark in source for mark in GLOBBED)):
            found = _load_by_another_name(folder, config)
        elif folder.is_dir():
            found = datasets.load_dataset(source, config or None, cache_dir=cache_of(folder))
        else:
            found = datasets.load_dataset(source, config or None, revision=revision or None)
    except Exception as error:  # datasets, its readers, fsspec and the hub client have their own
        raise InputError(
            f"{source}: no dataset to be had here or on the hub ({first_line(error)})"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        there, wanted = list(found), split or otherwise
    else:  # of one that does not say which split it is, any
        there = [str(found.split or split or otherwise)]
        wanted = split or there[0]
    if wanted not in there:
        raise InputError(f"{source}: no split {wanted!r}; there are {', '.join(there)}")
    found = found[wanted] if isinstance(found, datasets.DatasetDict) else found
    name = f"{source}/{config}" if config else source
    places = (f"{name}[{wanted}]: row {i}" for i in itertools.count(1))
    kinds = {name: getattr(of, "dtype", None) for name, of in found.features.items()}
    short = {name: kind for name, kind in kinds.items() if kind in ("float32", "float16")}
    rows = shortest(_read(found, source), short)
    return zip(places, unlabeled(rows, found.features), strict=False)


def _read(found: "datasets.Dataset", source: str) -> Iterator[dict[str, Any]]:
    """The rows of a dataset; pictures, sounds and the like as they are stored. Raises InputError
    for one that cannot be read."""
    try:
        for name, feature in found.features.items():
            if getattr(feature, "decode", False):
                found = found.cast_column(name, dataclasses.replace(feature, decode=False))
        yield from found
    except Exception as error:  # of any codec
        raise InputError(f"{source}: a row cannot be read ({first_line(error)})") from None


def digest_of(folder: str | os.PathLike) -> str:
    """sha256 of the files of a folder that `load_dataset` may read, under their names in it: of all
    that are not hidden. Raises InputError."""
    files = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [pathlib.Path(place, name) for name in names if not name.startswith(".")]
        files |= {os.path.relpath(path, folder): path for path in paths if path.is_file()}
    return digests.of_files(files)


def cache_of(folder: str | os.PathLike) -> str:
    """Where `load_dataset` keeps what it makes of a local folder's files: a place for these
    contents. By itself it tells files apart by their paths and times of change alone."""
    return os.path.join(datasets.config.HF_DATASETS_CACHE, f"dnd_jax-{digest_of(folder)[:16]}")


def _load_by_another_name(folder: pathlib.Path, config: str) -> "datasets.DatasetDict":
    """What load_dataset reads from a folder whose name it would take for a pattern: from links to
    its files."""
    with tempfile.TemporaryDirectory() as temporary:
        for place, _, files in os.walk(folder.absolute()):
            linked = pathlib.Path(temporary, "files", os.path.relpath(place, folder.absolute()))
            linked.mkdir(parents=True)
            for file in files:
                (linked / file).symlink_to(pathlib.Path(place, file))
        return datasets.load_dataset(
            os.path.join(temporary, "files"),
            config or None,
            cache_dir=os.path.join(temporary, "cache"),
            keep_in_memory=True,
        )
