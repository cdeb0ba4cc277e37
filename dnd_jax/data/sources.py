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
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jinja2
import jinja2.sandbox
import numpy as np

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line, listed

datasets = packages.deferred("datasets")
pyarrow, parquet = packages.deferred("pyarrow"), packages.deferred("pyarrow.parquet")

FIELDS = ("prompt", "response", "system")
FILES = (".jsonl", ".json", ".parquet")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Row = tuple[str, object]  # where it stands ("FILE:LINE"), and its value


@dataclasses.dataclass(frozen=True)
class Example:
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
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, text) for number, line in lines if (text := line.strip())]


def json_rows(path: str | os.PathLike, faults: list[str]) -> list[Row]:
    """The rows of a JSONL file, or of a JSON file that holds one list; lines that are no JSON are
    added to `faults`."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})"
            ) from None
        return [(f"{path}: row {i}", row) for i, row in enumerate(rows, start=1)]
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append((f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
    return rows


def parquet_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a parquet file. Raises InputError naming a file that is damaged or none."""
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from None
    return [(f"{path}: row {i}", row) for i, row in enumerate(table.to_pylist(), start=1)]


def hub_rows(source: Source, default_split: str) -> Iterable[Row]:
    """The rows of a `datasets` folder (saved by save_to_disk, or one that load_dataset reads) or of
    a hub id.

    Raises InputError when it cannot be had, or has no such split (listing those there are).
    """
    split, folder = source.split or default_split, pathlib.Path(source.source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(source.source)
        else:
            found = datasets.load_dataset(
                source.source, source.config or None, revision=source.revision or None
            )
    except (
        Exception
    ) as error:  # datasets, its readers, fsspec and the hub client all raise their own
        reason = first_line(error)
        raise InputError(
            f"{source.source}: no dataset to be had here or on the hub ({reason})"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{source.source}: no split {split!r}; there are {', '.join(found)}")
        found = found[split]
    name = f"{source.source}/{source.config}" if source.config else source.source
    return ((f"{name}[{split}]: row {i}", row) for i, row in enumerate(found, start=1))


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
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(path)
    return value


def column_reader(columns: Mapping[str, str], name: str) -> Callable[[str, Mapping], dict]:
    """(where, row) -> {"prompt", "response", "system"} by a column map; numbers and truth values
    become text.

    Raises InputError: here for a template that is none, when called for a column that a row lacks.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
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

    def read(where: str, row: Mapping) -> dict:
        values = {}
        for field, reader in readers.items():
            try:
                value = reader(row)
            except KeyError:
                raise InputError(
                    f"{where}: no column {columns[field]!r} for {field}; there are {', '.join(row)}"
                ) from None
            except (jinja2.TemplateError, TypeError, IndexError, ValueError) as error:
                raise InputError(
                    f"{where}: columns.{field} cannot be filled in ({error}); there are "
                    f"{', '.join(row)}"
                ) from None
            values[field] = str(value) if isinstance(value, bool | int | float) else value
        return values

    return read


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
    path, suffix = source.source, pathlib.Path(source.source).suffix
    if suffix in (".jsonl", ".json"):
        rows: Iterable[Row] = json_rows(path, faults)
    elif suffix == ".parquet":
        rows = parquet_rows(path)
    else:
        rows = hub_rows(source, split)
    if source.limit:
        rows = list(rows)
        keep = np.random.default_rng(0).choice(
            len(rows), min(source.limit, len(rows)), replace=False
        )
        rows = [rows[i] for i in np.sort(keep)]
    read = column_reader(source.columns, path) if source.columns else None
    examples, longer = [], 0
    for where, row in rows:
        if not isinstance(row, Mapping):
            faults.append(f"{where}: expected an object, got {type(row).__name__}")
            continue
        try:
            if read:
                row = read(where, row)
            elif (
                "prompt" not in row
                and (turns := row.get("conversations", row.get("messages"))) is not None
            ):
                row, more = _conversation(where, turns, row.get("system") or "")
                longer += more > 0
        except InputError as error:
            faults.append(str(error))
            continue
        example = _example(where, row, source.system, answers, faults)
        if example:
            examples.append(example)
    if faults:
        raise listed("malformed examples", faults, most=5)
    if len(examples) < least:
        raise InputError(f"{path}: {len(examples)} example(s), at least {least} needed")
    without = [e.where for e in examples if not e.response]
    if without and len(without) < len(examples):
        raise InputError(
            f"{without[0]}: no response, but others of the file have one; give all or none"
        )
    return Reading(tuple(examples), longer)


def _example(
    where: str, row: Mapping, system: str, answers: bool, faults: list[str]
) -> Example | None:
    """The example of a row with "prompt", "response", "system"; or None, and why is added to
    `faults`."""
    row = {**row, "system": row.get("system") or system}
    needed = FIELDS if answers or row.get("response") else ("prompt", "system")
    bad = [
        key
        for key in needed
        if not isinstance(row.get(key), str) or (key != "system" and not row[key].strip())
    ]
    if bad:
        there = (
            ""
            if "prompt" in row
            else f" (columns {', '.join(k for k in row if k != 'system')}; name them in a column "
            "map)"
        )
        faults.append(f"{where}: {' and '.join(bad)} must be given as text{there}")
        return None
    return Example(row["prompt"], row.get("response") or "", row["system"], where)


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
        if not isinstance(text, str) or not text.strip():
            faults.append(f'{where}: expected an object with a "prompt" text')
        prompts.append(text)
    if faults:
        raise InputError(faults[0])
    return prompts
