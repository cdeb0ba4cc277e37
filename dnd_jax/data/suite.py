"""A suite: the tasks of one run, checked when they are read. It is a folder with a suite.json, in
one of two forms.

Files in their places (the corpus pretrains a base from scratch and is optional with a given one;
"system" is optional too):

    suite.json       {"name", "corpus": "corpus.jsonl", "train": [NAME, ...], "unseen": [NAME, ...],
                      "kinds": {NAME: KIND}, "wrong": {NAME: NAME}}
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
dnd_jax.data.sources.Source ("templates", "field", ...). `kinds` only groups the unseen tasks in
reports; `wrong` says of an unseen task which other dataset's prompts are the wrong ones for it
(docs/METHOD.md section 7).

Of an unseen dataset's train file generation sees the prompts alone; where it has no responses there
is no tuned reference.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as encode_string

import numpy as np

from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import check_whole
from dnd_jax.data.sources import Example, Reading, Source, hold_out, read_source
from dnd_jax.data.suite_file import (
    POOLS,
    Entry,
    find_suite,
    read_described,
    read_description,
    read_entries,
)

DEFAULT_KIND = "unseen"
MOST_LABELS = 32  # different answers of a dataset whose labels' likelihoods are compared


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
        """The train examples that are no test questions: those that generation may see
        (docs/METHOD.md section 7)."""
        asked = {e.question.strip() for e in self.test}
        return tuple(e for e in self.train if e.question.strip() not in asked)


@dataclasses.dataclass(frozen=True)
class Suite:
    name: str
    root: pathlib.Path
    corpus: tuple[Example, ...]  # empty when the suite has none
    train: tuple[Dataset, ...]
    unseen: tuple[Dataset, ...]
    kinds: Mapping[str, str]  # of every unseen dataset
    fingerprint: str  # of everything a run reads from it
    # unseen dataset -> the one whose prompts are wrong for it, of those that the suite names
    wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
    path = find_suite(root)
    raw = read_description(path)
    entries = read_entries(path, raw)
    check_whole(raw, path)
    names = {role: [e.name for e in entries if e.role == role] for role in POOLS}
    kinds = _kinds(path, raw, names["unseen"])
    corpus = _corpus(path, raw)
    train, unseen = (
        tuple(_dataset(entry, least_prompts) for entry in entries if entry.role == role)
        for role in POOLS
    )
    parts = corpus, *(part for d in train + unseen for part in (d.train, d.test))
    wrong = _wrong(path, raw, names)
    listing = json.dumps([names["train"], names["unseen"], kinds, *[wrong] * bool(wrong)])
    digest = digests.of_text(listing, *map(_encoded, parts))
    name = str(raw.get("name", path.parent.name if path.name == "suite.json" else path.stem))
    return Suite(name, path.parent, corpus, train, unseen, kinds, digest, wrong)


def _kinds(path: pathlib.Path, raw: Mapping, unseen: list[str]) -> dict[str, str]:
    """The kind of every unseen dataset. Raises InputError for one of a dataset that is not."""
    kinds = raw.get("kinds", {})
    if not isinstance(kinds, dict) or not kinds.keys() <= set(unseen):
        raise InputError(f"{path}: kinds must map names of unseen datasets to a word")
    return {n: str(kinds.get(n, DEFAULT_KIND)) for n in unseen}


def _wrong(path: pathlib.Path, raw: Mapping, names: Mapping[str, list[str]]) -> dict[str, str]:
    """What the suite says of wrong prompts. Raises InputError unless it leads from unseen datasets
    to others of the suite."""
    wrong, every = raw.get("wrong", {}), set(sum(names.values(), []))
    if not isinstance(wrong, dict) or not all(
        name in names["unseen"] and isinstance(other, str) and other in every - {name}
        for name, other in wrong.items()
    ):
        raise InputError(f"{path}: wrong must map names of unseen datasets to other datasets")
    return wrong


def _corpus(path: pathlib.Path, raw: Mapping) -> tuple[Example, ...]:
    """The examples that a base is pretrained on; none where the suite names no corpus."""
    corpora = raw.get("corpus") or []
    sources = [
        read_described(path, "corpus", source)
        for source in (corpora if isinstance(corpora, list) else [corpora])
    ]
    return tuple(e for source in sources for e in read_source(source, 2, answers=False).examples)


def _encoded(examples: Sequence[Example]) -> str:
    """json.dumps of the list of (prompt, response, system), in less time: the pairs of response
    and system, which are few in most files, are encoded once each."""
    ends: dict[tuple[str, str], str] = {}
    encoded = []
    for prompt, response, system, *_ in examples:
        end = ends.get((response, system))
        if end is None:
            end = f"{encode_string(response)}, {encode_string(system)}]"
            ends[response, system] = end
        encoded.append(f"[{encode_string(prompt)}, {end}")
    return f"[{', '.join(encoded)}]"


def _dataset(entry: Entry, least: int) -> Dataset:
    """Reads a dataset; its pool has at least `least` examples after what is held out."""
    name, role, pool, test, holdout = (getattr(entry, f.name) for f in dataclasses.fields(entry))
    if test is None:
        read = {"train": read_source(pool, 1 if holdout else least, "train", role == "train")}
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
        read = _read_apart(pool, test, least, role == "train")
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


def _read_apart(pool: Source, test: Source, least: int, answers: bool) -> dict[str, Reading]:
    """{"train": the pool, "test": the test} of a dataset, where the same row in other words is the
    same question: the source with templates, the pool if both have some, is read last, and each of
    its rows is tried in all of them. answers: whether rows of the pool must have a response."""

    def known(reading: Reading) -> dict[str, str]:
        return {e.prompt.strip(): e.question for e in reading.examples}

    if not pool.templates:
        train = read_source(pool, least, "train", answers)
        return {"train": train, "test": read_source(test, 1, "test", known=known(train))}
    tested = read_source(test, 1, "test", asked_by=pool.templates[0])
    return {
        "train": read_source(pool, least, "train", answers, known=known(tested)),
        "test": tested,
    }


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
