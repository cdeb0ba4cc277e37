"""A suite: the tasks of one run as a folder of JSONL files, checked when it is read.

    suite.json       {"name", "corpus": "corpus.jsonl", "train": [NAME, ...], "unseen": [NAME, ...], "kinds": {NAME: KIND}}
    corpus.jsonl     {"prompt", "response"} a line, to pretrain a base from scratch (optional with a given base)
    datasets/NAME/train.jsonl, test.jsonl    {"prompt", "response", "system"} a line ("system" is optional)

`kinds` is optional and only groups the unseen tasks in reports. Generation sees the prompts of an unseen dataset's train.jsonl
alone.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

from dnd_jax.errors import InputError, listed
from dnd_jax.files import read_json

DEFAULT_KIND = "unseen"
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One question; `where` is its file and line, for messages."""

    prompt: str
    response: str
    system: str = ""
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclasses.dataclass(frozen=True)
class Suite:
    name: str
    root: pathlib.Path
    corpus: tuple[Example, ...]  # empty when the suite has none
    train: tuple[Dataset, ...]
    unseen: tuple[Dataset, ...]
    kinds: Mapping[str, str]  # of every unseen dataset
    fingerprint: str  # of everything a run reads from it

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        return self.train + self.unseen


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """(line number, text) of a UTF-8 file's non-blank lines. Raises InputError naming the file (and line) that cannot be read."""
    path = pathlib.Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    lines = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from None
        if text:
            lines.append((number, text))
    return lines


def read_jsonl(path: str | os.PathLike, least: int = 1) -> tuple[Example, ...]:
    """The examples of a JSONL file. Raises InputError naming file, line and key of the first few faults, or too few examples."""
    examples, faults = [], []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
            continue
        if not isinstance(row, dict):
            faults.append(f"{where}: expected an object, got {type(row).__name__}")
            continue
        row = {"system": "", **row}
        bad = [key for key in ("prompt", "response", "system") if not isinstance(row.get(key), str)]
        bad += [key for key in ("prompt", "response") if isinstance(row.get(key), str) and not row[key].strip()]
        if bad:
            faults.append(f"{where}: {' and '.join(bad)} must be given as text")
            continue
        examples.append(Example(row["prompt"], row["response"], row["system"], where))
    if faults:
        raise listed("malformed examples", faults, most=5)
    if len(examples) < least:
        raise InputError(f"{path}: {len(examples)} example(s), at least {least} needed")
    return tuple(examples)


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Prompts of a file: JSONL objects with "prompt" (anything else in them is ignored), or plain text, one prompt a line.

    Raises InputError naming file and line.
    """
    path = pathlib.Path(path)
    prompts = []
    for number, line in read_lines(path):
        if path.suffix in (".jsonl", ".json"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
            line = row.get("prompt") if isinstance(row, dict) else None
            if not isinstance(line, str) or not line.strip():
                raise InputError(f'{path}:{number}: expected an object with a "prompt" text')
        prompts.append(line)
    return prompts


def load_suite(root: str | os.PathLike, least_prompts: int = 2) -> Suite:
    """Reads and checks a suite folder. least_prompts: examples that every train file must hold (the generator's N).

    Raises InputError naming the file and what is wrong in it.
    """
    root = pathlib.Path(root)
    path = root / "suite.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object")
    unknown = sorted(raw.keys() - {"name", "corpus", "train", "unseen", "kinds"})
    if unknown:
        raise InputError(f"{path}: unknown key(s) {', '.join(unknown)}; expected name, corpus, train, unseen and kinds")
    for key in ("train", "unseen"):
        names = raw.get(key)
        if not isinstance(names, list) or not all(isinstance(n, str) and n and n == os.path.basename(n) for n in names):
            raise InputError(f"{path}: {key} must be a list of dataset names (folders under datasets/)")
    if len(raw["train"]) < 2:
        raise InputError(f"{path}: train names {len(raw['train'])} dataset(s), at least 2 needed to learn a mapping from prompts")
    names = raw["train"] + raw["unseen"]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(f"{path}: dataset(s) named twice: {', '.join(twice)}; an unseen one must not be trained on")
    kinds = raw.get("kinds", {})
    if not isinstance(kinds, dict) or not kinds.keys() <= set(raw["unseen"]):
        raise InputError(f"{path}: kinds must map names of unseen datasets to a word")

    def dataset(name: str) -> Dataset:
        folder = root / "datasets" / name
        return Dataset(name, read_jsonl(folder / "train.jsonl", least_prompts), read_jsonl(folder / "test.jsonl"))

    corpus = read_jsonl(root / raw["corpus"], 2) if raw.get("corpus") else ()
    train, unseen = (tuple(dataset(n) for n in raw[key]) for key in ("train", "unseen"))
    kinds = {n: str(kinds.get(n, DEFAULT_KIND)) for n in raw["unseen"]}
    digest = hashlib.sha256(json.dumps([raw["train"], raw["unseen"], kinds]).encode())
    for examples in (corpus, *(part for d in train + unseen for part in (d.train, d.test))):
        digest.update(json.dumps([(e.prompt, e.response, e.system) for e in examples]).encode())
    return Suite(str(raw.get("name", root.name)), root, corpus, train, unseen, kinds, digest.hexdigest())
