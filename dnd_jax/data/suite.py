"""A suite: the tasks of one run, checked when they are read. It is a folder with a suite.json, in
one of two forms.

Files in their places (the corpus pretrains a base from scratch and is optional with a given one;
"system" is optional too):

    suite.json       {"name", "corpus": "corpus.jsonl", "train": [NAME, ...], "unseen": [NAME, ...],
                      "kinds": {NAME: KIND}}
    corpus.jsonl     {"prompt", "response"} a line
    datasets/NAME/train.jsonl, test.jsonl    {"prompt", "response", "system"} a line

Files or Hugging Face datasets from anywhere, listed (any name of the file will do,
--suite=my_suite.json):

    {"name", "corpus": SOURCE or [SOURCE, ...], "kinds", "datasets": [
      {"name": "arc_easy", "role": "train", "source": "ARC-e_train.jsonl"}, {"name": "arc_easy",
      "role": "test", "source": "ARC-e_test.jsonl"}, {"name": "obqa", "role": "unseen", "source":
      "allenai/openbookqa", "config": "main", "split": "train", "limit": 5000,
       "columns": {"prompt": "question_stem", "response": "[{{answerKey}}]"}},
      {"name": "obqa", "role": "test", ...},
      {"name": "mine", "role": "unseen", "source": "mine.parquet", "holdout": 100}]}

Roles: "train" is trained on, "unseen" is the pool of prompts that generation draws from, "test"
holds the scored questions of the dataset with its name; "holdout" splits them off a source that has
no test of its own. Paths are relative to the file's folder; the other keys are those of
dnd_jax.data.sources.Source. `kinds` only groups the unseen tasks in reports.

Of an unseen dataset's train file generation sees the prompts alone; where it has no responses there
is no tuned reference.
"""

import dataclasses
import difflib
import json
import os
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as encode_string

import numpy as np

from dnd_jax.core import digests
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json
from dnd_jax.core.names import name_fault, twin_faults
from dnd_jax.data.rows import FILES
from dnd_jax.data.sources import FIELDS, Example, Reading, Source, hold_out, read_source

DEFAULT_KIND = "unseen"
MOST_LABELS = 32  # different answers of a dataset whose labels' likelihoods are compared
SPLITS = ("train", "test")
POOLS = ("train", "unseen")
ROLES = (*POOLS, "test")
OWN = {"name", "role", "holdout"}  # keys of a listed dataset beside those of its source


@dataclasses.dataclass(frozen=True)
class Dataset:
    """`notes` says what was not read of its sources."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...] = ()

    @property
    def labeled(self) -> bool:
        """Whether its train examples have responses, to tune on."""
        return all(e.response for e in self.train)

    @property
    def pool(self) -> tuple[Example, ...]:
        """The train examples whose prompts are no test questions: those that generation may see
        (docs/METHOD.md section 7)."""
        asked = {e.prompt.strip() for e in self.test}
        return tuple(e for e in self.train if e.prompt.strip() not in asked)


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
    def every(self) -> tuple[Dataset, ...]:
        """All datasets, the training ones first."""
        return self.train + self.unseen

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """Those that a LoRA can be tuned on: all but the unseen ones without responses."""
        return self.train + tuple(d for d in self.unseen if d.labeled)

    def with_training(self, count: int, seed: int) -> "Suite":
        """Returns the suite with only `count` of its training datasets, drawn by the seed and kept
        in their order; count 0 keeps all.

        With the same seed, the datasets of a smaller count are a subset of those of a larger one.
        Raises InputError when the suite has fewer than `count`.
        """
        if not count:
            return self
        if count > len(self.train):
            raise InputError(
                f"config.train.datasets = {count}, but {self.root} has {len(self.train)} training "
                "dataset(s)"
            )
        kept = np.sort(np.random.default_rng(seed).permutation(len(self.train))[:count])
        return dataclasses.replace(self, train=tuple(self.train[i] for i in kept))


def load_suite(root: str | os.PathLike, least_prompts: int = 2) -> Suite:
    """Reads and checks a suite: its folder or its JSON file. least_prompts: examples that every
    train file must hold (the generator's N).

    Raises InputError naming the file and what is wrong in it.
    """
    root = pathlib.Path(root)
    path = root if root.suffix == ".json" and not root.is_dir() else root / "suite.json"
    raw = _description(path)
    read = (_listed if "datasets" in raw else _in_places)(path, raw, least_prompts)
    names = {role: [n for n, (its, _) in read.items() if its == role] for role in POOLS}
    if not names["train"]:
        raise InputError(
            f"{path}: train names no dataset, so there is nothing to learn from; add one"
        )
    kinds = _kinds(path, raw, names["unseen"])
    corpus = _corpus(path, raw)
    train, unseen = (tuple(read[n][1]() for n in names[role]) for role in POOLS)
    parts = corpus, *(part for d in train + unseen for part in (d.train, d.test))
    listing = json.dumps([names["train"], names["unseen"], kinds])
    digest = digests.of_text(listing, *map(_encoded, parts))
    name = str(raw.get("name", path.parent.name if path.name == "suite.json" else path.stem))
    return Suite(name, path.parent, corpus, train, unseen, kinds, digest)


def _description(path: pathlib.Path) -> dict:
    """The JSON object of a suite's file. Raises InputError for an unknown key."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object")
    own = {"datasets"} if "datasets" in raw else {"train", "unseen"}
    unknown = sorted(raw.keys() - {"name", "corpus", "kinds"} - own)
    if unknown:
        raise InputError(
            f"{path}: unknown key(s) {', '.join(unknown)}; expected name, corpus, train, unseen "
            "and kinds, or name, corpus, datasets and kinds"
        )
    return raw


def _kinds(path: pathlib.Path, raw: Mapping, unseen: list[str]) -> dict[str, str]:
    """The kind of every unseen dataset. Raises InputError for one of a dataset that is not."""
    kinds = raw.get("kinds", {})
    if not isinstance(kinds, dict) or not kinds.keys() <= set(unseen):
        raise InputError(f"{path}: kinds must map names of unseen datasets to a word")
    return {n: str(kinds.get(n, DEFAULT_KIND)) for n in unseen}


def _corpus(path: pathlib.Path, raw: Mapping) -> tuple[Example, ...]:
    """The examples that a base is pretrained on; none where the suite names no corpus."""
    corpora = raw.get("corpus") or []
    sources = [
        _source(path, "corpus", source)
        for source in (corpora if isinstance(corpora, list) else [corpora])
    ]
    return tuple(e for source in sources for e in read_source(source, 2, answers=False).examples)


def _encoded(examples: Sequence[Example]) -> str:
    """json.dumps of the list of (prompt, response, system), in less time: the pairs of response
    and system, which are few in most files, are encoded once each."""
    ends: dict[tuple[str, str], str] = {}
    encoded = []
    for prompt, response, system, _ in examples:
        end = ends.get((response, system))
        if end is None:
            end = f"{encode_string(response)}, {encode_string(system)}]"
            ends[response, system] = end
        encoded.append(f"[{encode_string(prompt)}, {end}")
    return f"[{', '.join(encoded)}]"


Readers = dict[str, tuple[str, Callable[[], Dataset]]]  # name -> (role, what reads it)


def _in_places(path: pathlib.Path, raw: Mapping, least: int) -> Readers:
    """The datasets of "train" and "unseen", under datasets/NAME."""
    for key in ("train", "unseen"):
        names = raw.get(key)
        if not isinstance(names, list):
            raise InputError(
                f"{path}: {key} must be a list of dataset names (folders under datasets/)"
            )
        faults = [fault for name in names if (fault := name_fault(name))]
        if faults:
            raise listed(f"{path}: {key}", faults)
    names = raw["train"] + raw["unseen"]
    if faults := twin_faults(names):
        raise listed(f"{path}", faults)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(
            f"{path}: dataset(s) named twice: {', '.join(twice)}; an unseen one must not be "
            "trained on"
        )

    def reader(name: str, role: str) -> Callable[[], Dataset]:
        pool, test = (
            Source(os.fspath(path.parent / "datasets" / name / f"{split}.jsonl"))
            for split in SPLITS
        )
        return lambda: _dataset(name, role, pool, test, 0, least)

    return {name: (role, reader(name, role)) for role in ("train", "unseen") for name in raw[role]}


def _listed(path: pathlib.Path, raw: Mapping, least: int) -> Readers:
    """The datasets of the list "datasets". Raises InputError that lists every fault of it."""
    entries, faults = raw["datasets"], []
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{path}: datasets must be a list of objects")
    pools: dict[str, tuple[str, Source, int]] = {}  # name -> (role, source, holdout)
    tests: dict[str, Source] = {}
    for i, entry in enumerate(entries):
        name, role, holdout = entry.get("name"), entry.get("role"), entry.get("holdout", 0)
        what = f"datasets[{i}]"
        if fault := name_fault(name):
            faults.append(f"{what}.name = {fault}")
            continue
        what += f" ({name})"
        if role not in ROLES:
            faults.append(f"{what}.role = {role!r} is none of {', '.join(ROLES)}")
            continue
        if type(holdout) is not int or holdout < 0 or (holdout and role == "test"):
            faults.append(
                f"{what}.holdout = {holdout!r} must be a number of examples, of a train or unseen "
                "dataset"
            )
            continue
        try:
            source = _source(
                path, what, {key: value for key, value in entry.items() if key not in OWN}
            )
        except InputError as error:
            faults.append(str(error).removeprefix(f"{path}: "))
            continue
        if name in (tests if role == "test" else pools):
            faults.append(f"{what} is there twice; an unseen dataset must not be trained on")
        elif role == "test":
            tests[name] = source
        else:
            pools[name] = (role, source, holdout)
    for name, (_, _, holdout) in pools.items():
        if bool(holdout) == (name in tests):
            faults.append(f"{name} needs either an entry of role test or a holdout")
    faults += [
        f"{name} has a test, but no entry of role train or unseen"
        for name in tests.keys() - pools.keys()
    ]
    faults += twin_faults(pools)
    if faults:
        raise listed(f"{path}", faults)

    def reader(name: str) -> Callable[[], Dataset]:
        role, source, holdout = pools[name]
        return lambda: _dataset(name, role, source, tests.get(name), holdout, least)

    return {name: (role, reader(name)) for name, (role, _, _) in pools.items()}


def _source(path: pathlib.Path, what: str, raw: object) -> Source:
    """The source that a suite file describes: a path or id, or an object. Raises InputError naming
    the file and the key."""
    raw = {"source": raw} if isinstance(raw, str) else raw
    types = typing.get_type_hints(Source)
    if not isinstance(raw, dict) or not isinstance(raw.get("source"), str) or not raw["source"]:
        raise InputError(
            f"{path}: {what} needs a source: a file, a folder or the id of a dataset on the hub"
        )
    for key, value in raw.items():
        if key not in types:
            near = difflib.get_close_matches(key, [*types, *OWN], n=1)
            raise InputError(
                f"{path}: {what}.{key} is unknown" + (f"; did you mean {near[0]}?" if near else "")
            )
        if type(value) is not (types[key] if isinstance(types[key], type) else dict):
            raise InputError(f"{path}: {what}.{key} = {value!r} is of the wrong type")
    columns = raw.get("columns", {})
    if not all(key in FIELDS and isinstance(value, str) for key, value in columns.items()) or (
        columns and "prompt" not in columns
    ):
        raise InputError(
            f"{path}: {what}.columns must map prompt, response and system to names of columns or "
            "templates"
        )
    local = path.parent / raw["source"]
    is_file = pathlib.Path(raw["source"]).suffix in FILES
    return Source(
        **{**raw, "source": os.fspath(local) if is_file or local.exists() else raw["source"]}
    )


def _dataset(
    name: str, role: str, pool: Source, test: Source | None, holdout: int, least: int
) -> Dataset:
    """Reads a dataset; its pool has at least `least` examples after what is held out."""
    read = {"train": read_source(pool, 1 if holdout else least, "train", role == "train")}
    if test is None:
        kept, held = hold_out(read["train"].examples, holdout, pool.source)
        without = [e.where for e in held if not e.response]
        if without:
            raise InputError(
                f"{without[0]}: no response, but examples of {name} are held out to be scored"
            )
        if len(kept) < least:
            raise InputError(
                f"{pool.source}: {len(kept)} example(s) beside the {holdout} held out, at least "
                f"{least} needed"
            )
        read = {"train": Reading(kept, read["train"].longer_conversations), "test": Reading(held)}
    else:
        read["test"] = read_source(test, 1, "test")
    notes = [
        f"{r.longer_conversations} of {len(r.examples)} conversations of {split} have more turns; "
        "only the first answer is read"
        for split, r in read.items()
        if r.longer_conversations
    ]
    dataset = Dataset(name, read["train"].examples, read["test"].examples, tuple(notes))
    if role == "unseen" and len(dataset.pool) < least:
        raise InputError(
            f"{pool.source}: {len(dataset.pool)} example(s) beside the test questions in it, at "
            f"least {least} needed"
        )
    return dataset


def labels_of(dataset: Dataset) -> list[str]:
    """The answers that a dataset chooses from, when its responses are a few labels. Raises
    InputError when they are many."""
    found = sorted({e.response for e in dataset.train + dataset.test if e.response})
    if len(found) > MOST_LABELS:
        raise InputError(
            f"{dataset.name}: {len(found)} different answers, so no labels to choose from (at "
            f"most {MOST_LABELS}); set "
            "--config.evaluate.answers=greedy"
        )
    return found
