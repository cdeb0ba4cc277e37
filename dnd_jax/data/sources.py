"""Questions and answers from wherever they lie: files of dnd_jax/data/rows.py, Hugging Face
`datasets` (a hub id or a local folder).

A row becomes an Example by a column map {"prompt": ..., "response": ..., "system": ...}. A value of
the map is a column name ("question", "answers.text") or a Jinja template over the row
("{{question}}\\nA: {{choices.text[0]}}"). Without a map rows have "prompt", "response" and
optionally "system" (the original's files), or are conversations
(dnd_jax/data/conversations.py); the first question and its answer are read.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dnd_jax.core.errors import InputError, listed
from dnd_jax.data.conversations import CONVERSATIONS, first_exchange
from dnd_jax.data.rows import Row, file_rows, hub_rows, kind_of, lines_of, unknown_kind, unpacked
from dnd_jax.data.templates import column_reader, missing

FIELDS = ("prompt", "response", "system")


class Example(NamedTuple):
    """One question; `where` is its file and line, for messages. An unlabeled prompt has an empty
    response."""

    prompt: str
    response: str
    system: str = ""
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where examples come from."""

    source: str  # a file, a folder of `datasets`, or a hub id
    config: str = ""  # of a hub dataset: "main", "ARC-Easy"
    split: str = ""
    revision: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    system: str = ""  # for rows that bring none
    limit: int = 0  # that many rows, drawn by a fixed seed in their order; 0: all


@dataclasses.dataclass
class Reading:
    """The examples of a source, and of how many rows only the first exchange was read."""

    examples: tuple[Example, ...]
    longer_conversations: int = 0


def read_source(
    source: Source, least: int = 1, split: str = "train", answers: bool = True
) -> Reading:
    """Reads a source. split: the one meant where a hub dataset's is not given; answers=False: rows
    without a response are fine.

    Raises InputError naming file, line and key of the first few faults, or too few examples.
    """
    faults: list[str] = []
    rows = _drawn(_rows(source, split, faults), source.limit)
    read = column_reader(source.columns, source.source) if source.columns else None
    examples, longer = [], 0
    for where, row in rows:
        try:
            fields, more = _fields(where, row, read)
            examples.append(_example(where, fields, source.system, answers))
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


def _rows(source: Source, split: str, faults: list[str]) -> Iterable[Row]:
    """The rows of a source, whatever kind it is. Raises InputError for a key that says nothing of
    it."""
    path = pathlib.Path(source.source)
    if not kind_of(path)[0]:
        if path.exists() and not path.is_dir():
            raise unknown_kind(path)
        return hub_rows(source.source, source.config, source.split, source.revision, split)
    if source.config or source.revision or source.split not in ("", "train"):
        raise InputError(
            f"{path}: a file has no config, revision or split; leave them out, or name the file of "
            "the split"
        )
    return file_rows(path, faults)


def _drawn(rows: Iterable[Row], limit: int) -> Iterable[Row]:
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
        return read(where, row), 0
    if missing(row.get("prompt")):
        for key in CONVERSATIONS:
            if not missing(turns := row.get(key)):
                return first_exchange(where, turns, row.get("system"))
    return row, 0


def _example(where: str, row: Mapping, system: str, answers: bool) -> Example:
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
    for text in (prompt, response, system):
        if fault := _text_fault(text):
            raise InputError(f"{where}: {fault}")
    return Example(prompt, response, system, where)


def _hint(row: Mapping, bad: Sequence[str], fix: str = "name them in a column map") -> str:
    """What to do about a row whose fields are no texts. fix: of columns with other names."""
    lists = [key for key, of in row.items() if isinstance(of, list) and of and key not in FIELDS]
    if rows := [key for key in lists if all(isinstance(each, Mapping) for each in row[key])]:
        return f" (the rows seem to lie in {rows[0]!r}: save that list alone)"
    if any(key not in row for key in bad):
        there = ", ".join(key for key in row if key != "system")
        return f" (columns {there}; {fix})"
    return " (there is nothing in it)" if all(missing(row[key]) for key in bad) else ""


def _is_text(value: object) -> bool:
    return type(value) is str and value != "" and not value.isspace()


def _text_fault(text: str) -> str:
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

    Examples with the same prompt stay on one side. Raises InputError when nothing would be left.
    """
    prompts = list(dict.fromkeys(e.prompt for e in examples))
    if count >= len(prompts):
        raise InputError(
            f"{source}: holdout = {count} of {len(prompts)} different prompts leaves none; hold "
            "out fewer"
        )
    drawn = {
        prompts[i] for i in np.random.default_rng(0).choice(len(prompts), count, replace=False)
    }
    kept = tuple(e for e in examples if e.prompt not in drawn)
    first = {e.prompt: e for e in reversed(examples)}
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
            if fault := _text_fault(text):
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
