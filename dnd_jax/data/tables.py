"""Rows of tables: CSV, TSV, parquet, Arrow.

A cell of a CSV is text, as it stands. What `datasets` reads as null is None here too: an empty
cell, the words that tables mean nothing by (NULL_CELLS); and so is -1 of a ClassLabel.
"""

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line

pyarrow, parquet = packages.deferred("pyarrow"), packages.deferred("pyarrow.parquet")
ipc = packages.deferred("pyarrow.ipc")

# What pandas, and `datasets` with it, takes for null in a CSV.
NULL_CELLS = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>"}
NULL_CELLS |= {"N/A", "NA", "n/a", "NULL", "null", "None", "NaN", "nan", "-NaN", "-nan"}
SEPARATORS = ",;\t|"
SHORT = {"float": np.float32, "float32": np.float32, "float16": np.float16}
SHORT["halffloat"] = np.float16


def cell_rows(
    path: str | os.PathLike, text: str, separator: str, faults: list[str]
) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The rows of a CSV's text; those with more or fewer cells than the first line has names are
    added to `faults`. Raises InputError for names that are no names, and quotes that do not end."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = _names(path, next(reader, []), separator)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(names):
                yield (
                    f"{path}:{line}",
                    {
                        name: None if cell in NULL_CELLS else cell
                        for name, cell in zip(names, cells, strict=True)
                    },
                )
            elif cells:
                faults.append(
                    f"{path}:{line}: {len(cells)} cells, but the first line has {len(names)} names"
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not a table ({error})") from None


def _names(path: str | os.PathLike, cells: list[str], separator: str) -> list[str]:
    """The names of a CSV's columns; one without a name gets pandas'. Raises InputError for a name
    that is there twice, and a line that another mark separates."""
    names = [name or f"Unnamed: {i}" for i, name in enumerate(cells)]
    found = [mark for mark in SEPARATORS if len(names) == 1 and mark in names[0]]
    if found:
        raise InputError(
            f"{path}:1: one column, {names[0][:60]!r}; its names seem to be separated by "
            f"{found[0]!r}, not {separator!r}: save it with {separator!r}"
        )
    _once_each(path, names)
    return names


def _once_each(path: str | os.PathLike, names: Collection[str]) -> None:
    """Raises InputError for a column's name that is there twice."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise InputError(f"{path}: columns with one name: {', '.join(twice)}; rename one")


def table_rows(path: str | os.PathLike, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a parquet or Arrow file (or folder of parquet files). Raises InputError naming
    one that is damaged or none."""
    try:
        table = parquet.read_table(path) if kind == ".parquet" else _arrow(path)
        _once_each(path, table.column_names)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        what = kind.removeprefix(".")
        raise InputError(f"{path}: not a readable {what} file ({first_line(error)})") from None
    places = (f"{path}: row {i}" for i in range(1, len(rows) + 1))
    short = {field.name: str(field.type) for field in table.schema if str(field.type) in SHORT}
    labelled = unlabeled(shortest(rows, short), _features(table.schema))
    return list(zip(places, labelled, strict=True))


def _arrow(path: str | os.PathLike) -> "pyarrow.Table":
    """The table of an Arrow file, or of a stream in one, as `datasets` writes it."""
    with pyarrow.memory_map(os.fspath(path)) as file:
        try:
            return ipc.open_file(file).read_all()
        except pyarrow.ArrowInvalid:
            file.seek(0)
            return ipc.open_stream(file).read_all()


def _features(schema: "pyarrow.Schema") -> Mapping[str, Any]:
    """What `datasets` kept of its columns' features; nothing for another's table."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def shortest(rows: Iterable[dict], names: Mapping[str, str]) -> Iterator[dict]:
    """Rows in which the numbers of columns of less than 64 bits, {name: type}, are the shortest
    that mean the same: 0.1 that was stored in 32 bits is 0.1, not 0.10000000149011612."""
    for row in rows:
        for name, kind in names.items():
            if isinstance(row.get(name), float | np.floating):
                row = {**row, name: float(str(SHORT[kind](row[name])))}
        yield row


def unlabeled(rows: Iterable[dict], features: Mapping[str, Any]) -> Iterator[dict]:
    """Rows with None for -1 of a ClassLabel, which says that there is no label. features: the
    columns', as objects of `datasets` or their JSON."""
    labels = [
        name
        for name, of in features.items()
        if (of.get("_type") if isinstance(of, Mapping) else type(of).__name__) == "ClassLabel"
    ]
    for row in rows:
        for name in labels:
            if row.get(name) == -1:
                row = {**row, name: None}
        yield row
