"""What the embedded suites share: tasks that are composed of two parts (what is asked, and the form
of its answer), of which a prompt shows both or one.

Of a training task's prompts a third shows both parts, a third the first alone, a third the second
alone. Unseen tasks are of these kinds at least:

halves            both parts known, never together; each prompt shows one. No prompt tells the task,
                  several together do: one LoRA for all tasks cannot answer it
halves_reworded   a trained task, in phrases never seen, each prompt showing one part
combination       both parts known, never together; each prompt shows both
paraphrase        a trained task, in phrases never seen; each prompt shows both
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dnd_jax.core.files import replacing

TRAIN_PHRASES, HELD_PHRASES = 5, 3  # of each part; the held ones are for reworded tasks
# What a task's prompts show, one after the other and over again.
MIXED, HALVES, WHOLE = ("both", "first", "second"), ("first", "second"), ("both",)


class Task(NamedTuple):
    """first, second: the parts. held: whether it has the held phrases. shows: MIXED, HALVES or
    WHOLE."""

    first: str
    second: str
    held: bool = False
    shows: tuple[str, ...] = WHOLE

    def phrases(self) -> range:
        """Numbers of the phrases that its prompts may have."""
        every = TRAIN_PHRASES + HELD_PHRASES
        return range(TRAIN_PHRASES, every) if self.held else range(TRAIN_PHRASES)


Tasks = dict[str, Task]


def compose(
    rng: np.random.Generator, firsts: Sequence[str], seconds: Sequence[str]
) -> tuple[Tasks, dict[str, Tasks]]:
    """({name: task} to train on, {kind: {name: task}} of the unseen ones). Each first part is once
    in a combination and once in a paraphrase, each second part as often as the others."""
    shuffled = [seconds[i] for i in rng.permutation(len(seconds))]

    def diagonal(shift: int) -> list[tuple[str, str]]:
        return [(f, shuffled[(i + shift) % len(seconds)]) for i, f in enumerate(firsts)]

    new, known = diagonal(0), diagonal(1)
    trained = [(f, s) for f in firsts for s in seconds if (f, s) not in new]
    return named(trained, "", shows=MIXED), {
        "halves": named(new, "_halves", shows=HALVES),
        "halves_reworded": named(known, "_halves_reworded", held=True, shows=HALVES),
        "combination": named(new),
        "paraphrase": named(known, "_reworded", held=True),
    }


def suite_name(embedded: str, seed: int, most: int) -> str:
    """What an embedded suite is called: by what draws it, and by its tasks a kind."""
    return f"{embedded}-{seed}" + (f"-{most}" if most else "")


def named(pairs: Sequence[tuple[str, str]], end: str = "", **how) -> Tasks:
    """{FIRST_SECOND and the end: Task} of these parts."""
    return {f"{first}_{second}{end}": Task(first, second, **how) for first, second in pairs}


def write_suite(
    out: str | os.PathLike,
    name: str,
    train: Tasks,
    unseen: Mapping[str, Tasks],
    rows_of: Callable[[Task], Mapping[str, Sequence[Mapping]]],
    most: int = 0,
    corpus: Sequence[Mapping] = (),
) -> None:
    """Writes a suite's folder, whole or not at all. rows_of: {split: rows} of a task. most: unseen
    tasks of each kind, the first ones; 0: all."""
    unseen = {kind: dict(list(tasks.items())[: most or None]) for kind, tasks in unseen.items()}
    kinds = {name: kind for kind, tasks in unseen.items() for name in tasks}
    description = {"name": name, "train": list(train), "unseen": list(kinds), "kinds": kinds}
    description["wrong"] = _wrong(train, unseen)
    with replacing(out, directory=True) as temporary:
        if corpus:
            description["corpus"] = "corpus.jsonl"
            _write_rows(temporary / "corpus.jsonl", corpus)
        for tasks in (train, *unseen.values()):
            for task_name, task in tasks.items():
                for split, rows in rows_of(task).items():
                    _write_rows(temporary / "datasets" / task_name / f"{split}.jsonl", rows)
        text = json.dumps(description, indent=1) + "\n"
        (temporary / "suite.json").write_text(text, encoding="utf-8")


def _wrong(train: Tasks, unseen: Mapping[str, Tasks]) -> dict[str, str]:
    """{unseen task: one that differs from it in both parts}: the next of its kind, or else of those
    whose prompts show as much, or else a training task."""
    others = {name: task for tasks in unseen.values() for name, task in tasks.items()}
    every, found = train | others, {}
    for tasks in unseen.values():
        names = list(tasks)
        for i, name in enumerate(names):
            task = tasks[name]
            near = [*names[i + 1 :], *names[:i]]
            alike = [other for other, of in others.items() if of.shows == task.shows]
            found[name] = next(
                other
                for other in (*near, *alike, *train)
                if every[other].first != task.first and every[other].second != task.second
            )
    return found


def _write_rows(path: pathlib.Path, rows: Sequence[Mapping]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
