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

import numpy as np

from dnd_jax.data.composed import Task, compose, named, write_suite
from dnd_jax.data.skills_words import FORMS, NEW_FORMS, NEW_OPERATIONS, OPERATIONS, PLURALS

ROWS = {"train": 240, "test": 60}  # of a task
NO_OPERATION, NO_FORM = "Do the usual task.", "Answer as always."


def write_skills(out: str | os.PathLike, seed: int = 0) -> None:
    """Writes the suite folder `out`. The seed draws the unseen combinations, the lists of words and
    the wordings."""
    rng = np.random.default_rng([seed, 135])
    operations, forms = list(OPERATIONS), list(FORMS)
    train, unseen = compose(rng, operations, forms)
    unseen["operation"] = named([(new, str(rng.choice(forms))) for new in NEW_OPERATIONS])
    unseen["form"] = named([(str(rng.choice(operations)), new) for new in NEW_FORMS])
    lists = _draw_lists(rng)
    phrases = {split: rng.random((count, 2)) for split, count in ROWS.items()}

    def rows_of(task: Task) -> dict[str, list[dict]]:
        return {
            split: [
                _row(task, task.shows[i % len(task.shows)], words, phrases[split][i])
                for i, words in enumerate(lists[split])
            ]
            for split in ROWS
        }

    write_suite(out, f"skills-{seed}", train, unseen, rows_of)


def _draw_lists(rng: np.random.Generator) -> dict[str, list[tuple[str, ...]]]:
    """{split: lists of three words}, the same for every task. No list stands in both splits, in
    whatever order."""
    words, found = sorted(PLURALS), {}
    while len(found) < sum(ROWS.values()):
        drawn = tuple(str(word) for word in rng.choice(words, 3, replace=False))
        found.setdefault(frozenset(drawn), drawn)
    lists = list(found.values())
    return {"train": lists[: ROWS["train"]], "test": lists[ROWS["train"] :]}


def _row(task: Task, shown: str, words: tuple[str, ...], drawn: np.ndarray) -> dict:
    """A question and its answer. drawn: two numbers in [0, 1) that choose the wordings."""
    operation, form = (OPERATIONS | NEW_OPERATIONS)[task.first], (FORMS | NEW_FORMS)[task.second]
    numbers = task.phrases()
    first, second = (
        part.wordings[numbers[int(u * len(numbers))]]
        for part, u in zip((operation, form), drawn, strict=True)
    )
    said = {
        "both": f"{first} {second}",
        "first": f"{first} {NO_FORM}",
        "second": f"{NO_OPERATION} {second}",
    }
    prompt = f"{said[shown]}\n{', '.join(words)}"
    return {"prompt": prompt, "response": form.answer.format(x=operation.of(*words))}
