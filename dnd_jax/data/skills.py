"""The embedded suite for a real base: plain-English tasks on lists of three words.

    dnd suite --name=skills --out=DIR [--config.seed=0]

A task is an operation ("the plural of the first word") and a form of answer ("in square brackets").
A prompt is an instruction for both, or for one ("Answer as always.", "Do the usual task." stand for
the other), and a line of three words. Unseen tasks are of the kinds of dnd_jax/data/composed.py;
of "operation", one that no training task has, of a family that has others there; and of "form", one
that no training task has.

Words and wordings: dnd_jax/data/skills_words.py.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dnd_jax.data.composed import Task, Tasks, compose, named, suite_name, write_suite
from dnd_jax.data.skills_words import (
    FORMS,
    NEW_FORMS,
    NEW_OPERATIONS,
    OPERATIONS,
    PLURALS,
    Form,
    Operation,
)

ROWS = {"train": 240, "test": 60}  # of a task
NO_OPERATION, NO_FORM = "Do the usual task.", "Answer as always."


Parts = tuple[Operation, Form]  # of a task
Rows = dict[str, list[dict]]  # {split: rows}
Lists = dict[str, list[tuple[str, ...]]]  # {split: lists of three words}


class Drawn(NamedTuple):
    """What a seed makes of the tables."""

    train: Tasks
    unseen: dict[str, Tasks]
    lists: Lists  # the same for every task
    wordings: dict[str, np.ndarray]  # {split: two numbers in [0, 1) a row, which choose them}

    def rows(self, task: Task) -> Rows:
        parts = (OPERATIONS | NEW_OPERATIONS)[task.first], (FORMS | NEW_FORMS)[task.second]
        return rows_of(task, parts, self.lists, self.wordings)


def write_skills(out: str | os.PathLike, seed: int = 0, most: int = 0) -> None:
    """Writes the suite folder `out`. The seed draws the unseen combinations, the lists of words and
    the wordings. most: unseen tasks of each kind; 0: all."""
    drawn, name = draw(seed), suite_name("skills", seed, most)
    write_suite(out, name, drawn.train, drawn.unseen, drawn.rows, most)


def draw(seed: int) -> Drawn:
    """The suite of a seed."""
    rng = np.random.default_rng([seed, 135])
    operations, forms = list(OPERATIONS), list(FORMS)
    train, unseen = compose(rng, operations, forms)
    unseen["operation"] = named([(new, str(rng.choice(forms))) for new in NEW_OPERATIONS])
    unseen["form"] = named([(str(rng.choice(operations)), new) for new in NEW_FORMS])
    lists = draw_lists(rng, sorted(PLURALS))
    return Drawn(train, unseen, lists, {s: rng.random((n, 2)) for s, n in ROWS.items()})


def draw_lists(rng: np.random.Generator, words: Sequence[str]) -> Lists:
    """Lists of three of the words. No list stands in both splits, in whatever order."""
    found = {}
    while len(found) < sum(ROWS.values()):
        drawn = tuple(str(word) for word in rng.choice(words, 3, replace=False))
        found.setdefault(frozenset(drawn), drawn)
    lists = list(found.values())
    return {"train": lists[: ROWS["train"]], "test": lists[ROWS["train"] :]}


def rows_of(task: Task, parts: Parts, lists: Lists, wordings: Mapping[str, np.ndarray]) -> Rows:
    """The questions of a task and their answers."""
    return {
        split: [
            _row(task, parts, task.shows[i % len(task.shows)], words, wordings[split][i])
            for i, words in enumerate(lists[split])
        ]
        for split in ROWS
    }


def _row(task: Task, parts: Parts, shown: str, words: tuple[str, ...], drawn: np.ndarray) -> dict:
    """A question and its answer. drawn: two numbers in [0, 1) that choose the wordings."""
    operation, form = parts
    said = [part.said(task) for part in parts]
    first, second = (of[int(u * len(of))] for of, u in zip(said, drawn, strict=True))
    shows = {
        "both": f"{first} {second}",
        "first": f"{first} {NO_FORM}",
        "second": f"{NO_OPERATION} {second}",
    }
    prompt = f"{shows[shown]}\n{', '.join(words)}"
    return {"prompt": prompt, "response": form.answer.format(x=operation.of(*words))}
