"""Questions and answers from wherever they lie: JSONL, JSON, parquet, Hugging Face `datasets` (a
hub id or a local folder).

A row becomes an Example by a column map {"prompt": ..., "response": ..., "system": ...}. A value of
the map is a column name ("question", "answers.text") or a Jinja template over the row
("{{question}}\\nA: {{choices.text[0]}}"). Without a map rows have "prompt", "response" and
optionally "system" (the original's files), or are conversations: ShareGPT's {"conversations":
[{"from": "human", "value"}, {"from": "gpt", "value"}], "system"} or {"messages": [{"role",
"content"}]}; the first question and its answer are read.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jinja2
import jinja2.sandbox
import numpy as np

from dnd_jax.core.errors import InputError, listed
from dnd_jax.data.rows import Row, hub_rows, json_rows, parquet_rows, read_lines

FIELDS = ("prompt", "response", "system")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


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


def _conversation(where: str, turns: object, system: str) -> tuple[dict, int]:
    """({"prompt", "response", "system"} of the first exchange, number of further questions). Raises
    InputError."""
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        raise InputError(f"{where}: a conversation must be a list of objects")
    said: list[tuple[str, object]] = []
    for turn in turns:
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in ROLES:
            raise InputError(
                f"{where}: speaker {role!r} of the conversation is none of {', '.join(ROLES)}"
            )
        said.append((ROLES[role], text))
    if said and said[0][0] == "system":
        own = said.pop(0)[1]
        system = system or own
    if not said or said[0][0] != "user" or (len(said) > 1 and said[1][0] != "assistant"):
        raise InputError(
            f"{where}: a conversation must begin with a question of the user and its answer"
        )
    row = {"prompt": said[0][1], "system": system}
    if len(said) > 1:
        row["response"] = said[1][1]
    return row, sum(role == "user" for role, _ in said[1:])


def _column(row: Mapping, path: str) -> object:
    """The value at "column" or "column.key.0". Raises KeyError."""
    if path in row:
        return row[path]
    value: object = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(path)
    return value


def column_reader(columns: Mapping[str, str], name: str) -> Callable[[str, Mapping], dict]:
    """(where, row) -> {"prompt", "response", "system"} by a column map; numbers and truth values
    become text.

    Raises InputError: here for a template that is none, when called for a column that a row lacks.
    """
    readers = _column_readers(columns, name)

    def read(where: str, row: Mapping) -> dict:
        values = {}
        for field, reader in readers.items():
            try:
                value = reader(row)
            except KeyError:
                raise InputError(
                    f"{where}: no column {columns[field]!r} for {field}; there are {', '.join(row)}"
                ) from None
            except Exception as error:  # a template can raise whatever Python raises
                raise InputError(
                    f"{where}: columns.{field} cannot be filled in ({error}); there are "
                    f"{', '.join(row)}"
                ) from None
            number = isinstance(value, bool | int | float) and not _missing(value)
            values[field] = str(value) if number else value
        return values

    return read


def _column_readers(
    columns: Mapping[str, str], name: str
) -> dict[str, Callable[[Mapping], object]]:
    """What reads each field of a row. Raises InputError for a template that is none."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_said
    )
    environment.globals["zip"] = zip
    readers: dict[str, Callable[[Mapping], object]] = {}
    for field, expression in columns.items():
        if "{{" in expression or "{%" in expression:
            try:
                template = environment.from_string(expression)
            except jinja2.TemplateError as error:
                raise InputError(
                    f"{name}: columns.{field} is no Jinja template ({error})"
                ) from None
            readers[field] = lambda row, template=template: template.render(row)
        else:
            readers[field] = lambda row, expression=expression: _column(row, expression)
    return readers


def _missing(value: object) -> bool:
    """Whether a value says that there is none: null, or a table's NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _said(value: object) -> object:
    """What a template prints for a value. Raises ValueError for one that has no text of its own, so
    that no "None" is taught; `{{ x or "" }}` asks for an empty text."""
    if _missing(value) or isinstance(value, list | tuple | Mapping):
        raise ValueError("a value is missing" if _missing(value) else "a list or object is no text")
    return value


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
    """The rows of a source, whatever kind it is."""
    suffix = pathlib.Path(source.source).suffix
    if suffix in (".jsonl", ".json"):
        return json_rows(source.source, faults)
    if suffix == ".parquet":
        return parquet_rows(source.source)
    return hub_rows(source.source, source.config, source.split or split, source.revision)


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
    if "prompt" not in row:
        turns = row.get("conversations", row.get("messages"))
        if turns is not None:
            return _conversation(where, turns, row.get("system") or "")
    return row, 0


def _example(where: str, row: Mapping, system: str, answers: bool) -> Example:
    """The example of a row with "prompt", "response", "system". Raises InputError for what is no
    text."""
    prompt, response, system = row.get("prompt"), row.get("response"), row.get("system") or system
    if not response and not answers:
        response = ""
    bad = [] if _is_text(prompt) else ["prompt"]
    if not _is_text(response) and (answers or response):
        bad.append("response")
    if type(system) is not str:
        bad.append("system")
    if bad:
        there = (
            ""
            if "prompt" in row
            else f" (columns {', '.join(k for k in row if k != 'system')}; name them in a column "
            "map)"
        )
        raise InputError(f"{where}: {' and '.join(bad)} must be given as text{there}")
    for text in (prompt, response, system):
        if not (text.isascii() or _encodes(text)):
            raise InputError(
                f"{where}: {text[:40]!r} ... holds half of a character (a surrogate, as left by "
                "cutting through an emoji), which is no text; remove it"
            )
    return Example(prompt, response, system, where)


def _is_text(value: object) -> bool:
    return type(value) is str and value != "" and not value.isspace()


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    """Prompts of a file: JSONL objects with "prompt" (anything else in them is ignored), or plain
    text, one prompt a line.

    Raises InputError naming file and line.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".jsonl", ".json"):
        return [line for _, line in read_lines(path)]
    faults: list[str] = []
    prompts = []
    for where, row in json_rows(path, faults):
        text = row.get("prompt") if isinstance(row, dict) else None
        if not _is_text(text) or not _encodes(text):
            faults.append(f'{where}: expected an object with a "prompt" text')
        prompts.append(text)
    if faults:
        raise InputError(faults[0])
    return prompts
