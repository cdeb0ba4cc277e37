"""Questions and answers from wherever they lie: files of dnd_jax/data/rows.py, Hugging Face
`datasets` (a hub id or a local folder).

A row becomes an Example by a column map {"prompt": ..., "response": ..., "system": ...}. A value of
the map is a column name ("question", "answers.text") or a Jinja template over the row
("{{question}}\\nA: {{choices.text[0]}}"). Without a map rows have "prompt", "response" and
optionally "system" (the original's files), or are conversations
(dnd_jax/data/conversations.py); the first question and its answer are read. In place of the map's
"prompt" a source may have several templates, of which each row gets one
(dnd_jax/data/instructions.py).
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from dnd_jax.core.errors import InputError, listed
from dnd_jax.data.conversations import CONVERSATIONS, first_exchange
from dnd_jax.data.instructions import Instructed, instructed
from dnd_jax.data.rows import (
    JSON,
    Row,
    file_rows,
    hub_rows,
    kind_of,
    lines_of,
    unknown_kind,
    unpacked,
)
from dnd_jax.data.templates import column_reader, missing

FIELDS = ("prompt", "response", "system")
T = TypeVar("T")


class Example(NamedTuple):
    """One question; `where` is its file and line, for messages. An unlabeled prompt has an empty
    response. asked: where its source has templates, its prompt in the words by which the dataset
    tells it from others."""

    prompt: str
    response: str
    system: str = ""
    where: str = ""
    asked: str = ""

    @property
    def question(self) -> str:
        """By which it is told from others, in whatever words a row is asked."""
        return self.asked or self.prompt


@dataclasses.dataclass(frozen=True)
class Source:
    """Where examples come from."""

    source: str  # a file, a folder of `datasets`, or a hub id
    config: str = ""  # of a hub dataset: "main", "ARC-Easy"
    split: str = ""
    revision: str = ""
    field: str = ""  # of a JSON file: the key that its rows lie at
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    templates: Sequence[str] = ()  # in place of a column map's prompt: one of them, drawn for a row
    system: str = ""  # for rows that bring none
    limit: int = 0  # that many rows, drawn by a fixed seed in their order; 0: all


@dataclasses.dataclass
class Reading:
    """The examples of a source, and of how many rows only the first exchange was read."""

    examples: tuple[Example, ...]
    longer_conversations: int = 0


def read_source(
    source: Source,
    least: int = 1,
    split: str = "train",
    answers: bool = True,
    asked_by: str = "",
    known: Mapping[str, str] | None = None,
) -> Reading:
    """Reads a source. split: the one meant where a hub dataset's is not given; answers=False: rows
    without a response are fine; asked_by, known: what tells rows apart where the source has
    templates (`instructed`).

    Raises InputError naming file, line and key of the first few faults, or too few examples.
    """
    faults: list[str] = []
    rows = _drawn(enumerate(_rows(source, split, faults)), source.limit)
    read, ask = _readers(source, asked_by, known)
    examples, longer = [], 0
    for place, (where, row) in rows:
        try:
            fields, more = _fields(where, row, read)
            asked = ""
            if ask:
                with _hinted(row):
                    prompt, asked = ask(where, place, row)
                fields = {**fields, "prompt": prompt}
            examples.append(_example(where, fields, source.system, answers, asked))
            longer += more > 0
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise listed("malformed examples", faults, most=5)
    if len(examples) < least:
        raise InputError(f"{source.source}: {len(examples)} example(s), at least {least} needed")
    without = [e.where for e in examples if not e.response]
    if without and len(without) < len(examples):
        raise InputError(
            f"{without[0]}: no response, but others of the file have one; give all or none"
        )
    return Reading(tuple(examples), longer)


def _readers(
    source: Source, asked_by: str, known: Mapping[str, str] | None
) -> tuple[Callable | None, Instructed | None]:
    """(what reads the fields of a row, what makes its prompt), where a source says how."""
    read = column_reader(source.columns, source.source) if source.columns else None
    if not source.templates:
        return read, None
    drawn_by = pathlib.Path(source.source).name, source.config, source.split, source.field
    ask = instructed(source.templates, source.source, drawn_by, asked_by, known)
    return read or (lambda where, row: row), ask


def _rows(source: Source, split: str, faults: list[str]) -> Iterable[Row]:
    """The rows of a source, whatever kind it is. Raises InputError for a key that says nothing of
    it."""
    path = pathlib.Path(source.source)
    if not kind_of(path)[0]:
        if path.exists() and not path.is_dir():
            raise unknown_kind(path)
        if source.field:
            raise InputError(f"{path}: only a JSON file has a field, here {source.field!r}")
        return hub_rows(source.source, source.config, source.split, source.revision, split)
    if source.config or source.revision or source.split not in ("", "train"):
        raise InputError(
            f"{path}: a file has no config, revision or split; leave them out, or name the file of "
            "the split"
        )
    if source.field and kind_of(path)[0] not in JSON:
        raise InputError(f"{path}: only a JSON file has a field, here {source.field!r}")
    return file_rows(path, faults, source.field)


def _drawn(rows: Iterable[T], limit: int) -> Iterable[T]:
    """`limit` of the rows, drawn by a fixed seed, in their order; 0: all."""
    if not limit:
        return rows
    rows = list(rows)
    keep = np.random.default_rng(0).choice(len(rows), min(limit, len(rows)), replace=False)
    return [rows[i] for i in np.sort(keep)]


def _fields(where: str, row: object, read: Callable | None) -> tuple[Mapping, int]:
    """(a row with "prompt", "response" and "system", questions that it leaves unread). read: the
    reader of a column map. Raises InputError."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    if read:
        with _hinted(row):
            return read(where, row), 0
    if missing(row.get("prompt")):
        for key in CONVERSATIONS:
            if not missing(turns := row.get(key)):
                return first_exchange(where, turns, row.get("system"))
    return row, 0


def _example(where: str, row: Mapping, system: str, answers: bool, asked: str) -> Example:
    """The example of a row with "prompt", "response", "system". Raises InputError for what is no
    text."""
    prompt, response, own = (row.get(key) for key in FIELDS)
    if not answers and (missing(response) or response == ""):
        response = ""
    system = system if missing(own) or own == "" else own
    bad = [] if _is_text(prompt) else ["prompt"]
    if not _is_text(response) and (answers or response != ""):
        bad.append("response")
    if type(system) is not str:
        bad.append("system")
    if bad:
        raise InputError(f"{where}: {' and '.join(bad)} must be given as text{_hint(row, bad)}")
    for text in (prompt, response, system, asked):
        if fault := text_fault(text):
            raise InputError(f"{where}: {fault}")
    return Example(prompt, response, system, where, asked)


def _hint(row: Mapping, bad: Sequence[str], fix: str = "name them in a column map") -> str:
    """What to do about a row whose fields are no texts. fix: of columns with other names."""
    if around := _around(row):
        return around
    if any(key not in row for key in bad):
        there = ", ".join(key for key in row if key != "system")
        return f" (columns {there}; {fix})"
    return " (there is nothing in it)" if all(missing(row[key]) for key in bad) else ""


@contextlib.contextmanager
def _hinted(row: Mapping) -> Iterator[None]:
    """Adds to an InputError what `_around` says of the row."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}{_around(row)}") from None


def _around(row: Mapping) -> str:
    """What to do about a row that seems to be an object around the rows; empty for any other."""
    for key in row:
        if key not in (*FIELDS, *CONVERSATIONS) and _are_rows(row[key]):
            alone = "that list" if isinstance(row[key], list) else "a list of its values"
            return (
                f" (the rows seem to lie in {key!r}: save {alone} alone, or, in a suite, give the "
                f'source "field": "{key}")'
            )
    return " (its values seem to be the rows: save a list of them)" if _are_rows(row) else ""


def _are_rows(value: object) -> bool:
    """Whether a value is a list of objects, or an object of nothing but them."""
    each = value.values() if isinstance(value, Mapping) else value
    return (
        isinstance(value, list | Mapping)
        and bool(value)
        and all(isinstance(row, Mapping) for row in each)
    )


def _is_text(value: object) -> bool:
    return type(value) is str and value != "" and not value.isspace()


def text_fault(text: str) -> str:
    """Why a text is none that can be written; empty when it can."""
    if "\0" in text:
        return f"{text[:40]!r} ... holds a NUL character, which is no text; remove it"
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return (
            f"{text[:40]!r} ... holds half of a character (a surrogate, as left by cutting through "
            "an emoji), which is no text; remove it"
        )
    return ""


def said_fault(text: str) -> str:
    """Why a text is none that a base can be asked; empty when it is one."""
    return text_fault(text) or ("" if text.strip() else "is empty")


def read_jsonl(
    path: str | os.PathLike, least: int = 1, answers: bool = True
) -> tuple[Example, ...]:
    """The examples of a JSONL file. Raises InputError as `read_source` does."""
    return read_source(Source(os.fspath(path)), least, answers=answers).examples


def hold_out(
    examples: Sequence[Example], count: int, source: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(the others, `count` examples) of a source that has no test of its own, drawn by a fixed
    seed, each in their order.

    Examples of the same question stay on one side. Raises InputError when nothing would be left.
    """
    prompts = list(dict.fromkeys(e.question for e in examples))
    if count >= len(prompts):
        raise InputError(
            f"{source}: holdout = {count} of {len(prompts)} different prompts leaves none; hold "
            "out fewer"
        )
    drawn = {
        prompts[i] for i in np.random.default_rng(0).choice(len(prompts), count, replace=False)
    }
    kept = tuple(e for e in examples if e.question not in drawn)
    first = {e.question: e for e in reversed(examples)}
    return kept, tuple(first[prompt] for prompt in prompts if prompt in drawn)


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Prompts of a file: of a table or JSON its "prompt", or the first question of a conversation
    (anything else is ignored); of a .txt file its lines.

    Raises InputError naming file and line.
    """
    faults: list[str] = []
    prompts = []
    for where, row in _prompt_rows(pathlib.Path(path), faults):
        try:
            text = _fields(where, row, None)[0].get("prompt")
            if not _is_text(text):
                hint = _hint(row, ["prompt"], "call the one of the prompts so")
                raise InputError(f'{where}: expected an object with a "prompt" text{hint}')
            if fault := text_fault(text):
                raise InputError(f"{where}: {fault}")
            prompts.append(text)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError(faults[0])
    return prompts


def _prompt_rows(path: pathlib.Path, faults: list[str]) -> Iterable[Row]:
    """The rows of a file of prompts: a text file's lines, a pipe's too, as {"prompt": line}."""
    kind, packing = kind_of(path, ".txt")
    if not kind and (path.is_fifo() or path.is_char_device()):
        kind = ".txt"
    if not kind:
        raise unknown_kind(path, ".txt")
    if kind != ".txt":
        return file_rows(path, faults)
    lines = list(lines_of(unpacked(path, packing)))
    if lines and all(line.startswith("{") and line.endswith("}") for _, line in lines):
        raise InputError(f"{path}: its lines are JSON objects, not prompts; call it .jsonl")
    return ((f"{path}:{number}", {"prompt": line}) for number, line in lines)
