"""What is wrong with a suite's data, found before anything is trained on it: what
`dnd data-report` prints.

Faults make scores mean something else than they seem (docs/METHOD.md section 7 has the original's):
they are warned of when a suite is loaded, and refused with --strict. Notes are only for the report.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json, write_json
from dnd_jax.data.questions import (
    INNER,
    LABEL_LENGTH,
    Files,
    asked_of,
    choices,
    is_label,
    shape,
)
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.data.suite_file import SPLITS

SAME_SHARE = 0.5  # of the smaller dataset's prompts: above it two share too much to count as two
FEW = 12  # different answers that can be a set of labels
MAJORITY = 0.9  # share of one answer in a test set that is worth a note
CHANCE = 10  # fewer answers may be alike by chance
SHOWN = 3
CHECKS = 2  # counted up whenever the checks find something else than before


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about a suite; `fault` when it spoils results."""

    dataset: str
    text: str
    fault: bool = True

    def __str__(self) -> str:
        return f"{self.dataset}: {self.text}"


def _where(examples: Sequence[Example]) -> str:
    more = ", ..." if len(examples) > SHOWN else ""
    return f" ({', '.join(e.where for e in examples[:SHOWN])}{more})"


def _duplicates(dataset: Dataset, files: Files) -> Iterator[Finding]:
    """Examples of one file that have the same system text and prompt."""
    for split in SPLITS:
        examples, asked = getattr(dataset, split), files[dataset.name, split]
        times = Counter(asked.prompts) if len(asked.sets[0]) < len(examples) else {}
        first: dict[tuple[str, str], Example] = {}
        again, contradicting = [], []
        for example, prompt in zip(examples, asked.prompts, strict=True):
            if times.get(prompt, 1) == 1:
                continue
            earlier = first.setdefault(
                (example.system, " ".join(example.question.split())), example
            )
            if earlier is not example:
                same = earlier.response.split() == example.response.split()
                (again if same else contradicting).append(example)
        if again:
            yield Finding(
                dataset.name,
                f"{len(again)} of {len(examples)} {split} examples are there before{_where(again)}",
            )
        if contradicting:
            yield Finding(
                dataset.name,
                f"{len(contradicting)} {split} prompts are there before with another "
                f"answer{_where(contradicting)}",
            )


def _overlaps(dataset: Dataset, every: Sequence[str], files: Files) -> Iterator[Finding]:
    """Test questions that occur in any train file, whatever is answered there: the dataset's own
    first, then those of others, together where they have the same of them."""
    tested = files[dataset.name, "test"]
    found: dict[tuple[bool, frozenset, frozenset], list[str]] = {}
    for name in dict.fromkeys([dataset.name, *every]):
        shared = [a & b for a, b in zip(tested.sets, files[name, "train"].sets, strict=True)]
        if any(shared):
            key = (name == dataset.name, *map(frozenset, shared))
            found.setdefault(key, []).append(name)
    rows = list(zip(dataset.test, tested.prompts, tested.questions, strict=True)) if found else []
    for (_, prompts, questions), names in found.items():
        same = [e for e, prompt, _ in rows if prompt in prompts]
        alike = [e for e, prompt, asked in rows if asked in questions and prompt not in prompts]
        how = (
            f", {len(alike)} of them with other choices"
            if alike and choices(alike[0].prompt)
            else ""
        )
        yield Finding(
            dataset.name,
            f"{len(same + alike)} of {len(dataset.test)} test questions occur in "
            f"{_whose(names)} train{how}{_where(same + alike)}",
        )


def _whose(names: Sequence[str]) -> str:
    """ "a's", "a's, b's" and, of many, how many more."""
    more = f" and {len(names) - SHOWN} more datasets'" if len(names) > SHOWN else ""
    return ", ".join(f"{name}'s" for name in names[:SHOWN]) + more


def _answers(dataset: Dataset) -> Iterator[Finding]:
    """Files with one answer, or nearly."""
    counts = Counter(e.response for e in dataset.test)
    (most, count), total = counts.most_common(1)[0], len(dataset.test)
    if len(counts) == 1 and total >= CHANCE:
        yield Finding(
            dataset.name,
            f"every one of {total} test answers is {most!r}: to answer always the same scores 1.00",
        )
    elif count >= MAJORITY * total and total >= CHANCE:
        yield Finding(dataset.name, f"{count} of {total} test answers are {most!r}", fault=False)
    answers = {e.response for e in dataset.train}
    if dataset.labeled and len(dataset.train) >= CHANCE and len(answers) == 1:
        yield Finding(
            dataset.name, f"every one of {len(dataset.train)} train answers is {answers.pop()!r}"
        )


def _choices(dataset: Dataset, files: Files) -> Iterator[Finding]:
    """Answers that are none of the choices of their prompts."""
    for split in SPLITS:
        examples = getattr(dataset, split)
        labels = _labels(examples)
        choices = files[dataset.name, split].choices
        pairs = list(zip((labels.get(e.response) for e in examples), choices, strict=True))
        asked = sum(label is not None and bool(found) for label, found in pairs)
        stray = [
            i for i, (label, found) in enumerate(pairs) if label and found and label not in found
        ]
        if asked > len(examples) / 2 and stray:
            yield Finding(
                dataset.name,
                f"{len(stray)} {split} answers name none of their choices, such as "
                f"{examples[stray[0]].response!r} of {', '.join(choices[stray[0]])}"
                f"{_where([examples[i] for i in stray])}",
            )


def _forms(dataset: Dataset, learnt: Mapping[str, str] | None) -> Iterator[Finding]:
    """Labels that no trained adapter can ever give. learnt: the forms of all training answers,
    for an unseen dataset."""
    counts, total = Counter(e.response for e in dataset.test), len(dataset.test)
    trained = Counter(e.response for e in dataset.train)
    if max(len(counts), len(trained)) > FEW or not all(map(is_label, counts)):
        return  # numbers and names take forms that no train answer happened to have
    forms = _forms_of([dataset])
    never = [e for e in dataset.test if shape(e.response) not in forms]
    if forms and never:
        yield Finding(
            dataset.name,
            f"{len(never)} of {total} test answers look like {never[0].response!r}, but no train "
            f"answer does (those look like {next(iter(forms.values()))!r}): they can never match",
        )
    unknown = [e for e in dataset.test if learnt and shape(e.response) not in learnt]
    if unknown and not never:
        yield Finding(
            dataset.name,
            f"{len(unknown)} of {total} test answers look like {unknown[0].response!r}, as none "
            "of any training dataset",
        )
    if len(shapes := Counter(map(shape, counts))) > 1:
        yield Finding(
            dataset.name,
            f"test answers have {len(shapes)} forms: {', '.join(sorted(counts)[:8])}",
            fault=False,
        )


def _labels(examples: Sequence[Example]) -> dict[str, str]:
    """The responses that can be labels, with the word in each: {"[A]": "A"}."""
    responses = dict.fromkeys(e.response for e in examples)
    return {r: INNER.findall(r)[0] for r in responses if is_label(r)}


def _forms_of(datasets: Iterable[Dataset]) -> dict[str, str]:
    """The forms of the train answers that can be labels, with the first answer of each."""
    forms: dict[str, str] = {}
    for dataset in datasets:
        for label in _labels(dataset.train):
            forms.setdefault(shape(label), label)
    return forms


def _same_files(suite: Suite, files: Files) -> Iterator[Finding]:
    """Datasets with the same examples, or most of their prompts in common."""
    for split in SPLITS:
        prompts = [files[d.name, split].sets[0] for d in suite.every]
        times = Counter(itertools.chain.from_iterable(prompts))
        several = {prompt for prompt, count in times.items() if count > 1}
        common = [its & several for its in prompts]
        for i, dataset in enumerate(suite.every):
            for j, earlier in enumerate(suite.every[:i]):
                shared, least = len(common[i] & common[j]), min(len(prompts[i]), len(prompts[j]))
                if shared == least and _alike(getattr(dataset, split), getattr(earlier, split)):
                    yield Finding(
                        dataset.name,
                        f"its {split} examples are those of {earlier.name}: one dataset under two "
                        "names",
                    )
                elif shared > SAME_SHARE * least:
                    yield Finding(
                        dataset.name,
                        f"shares {shared} of {least} {split} prompts with {earlier.name}",
                    )


def _alike(some: Sequence[Example], others: Sequence[Example]) -> bool:
    """Whether two files have the same prompts and responses, in whatever order."""
    return len(some) == len(others) and Counter((e.prompt, e.response) for e in some) == Counter(
        (e.prompt, e.response) for e in others
    )


def findings(suite: Suite) -> list[Finding]:
    """All that is to be said about a suite, faults first."""
    files = asked_of(suite)
    names, learnt = [d.name for d in suite.every], _forms_of(suite.train)
    found = list(_same_files(suite, files))
    if len(suite.train) == 1:
        lesson = "the generator cannot learn what prompts mean; wrong prompts will do as well"
        found.append(Finding(names[0], f"is the only training dataset: {lesson}"))
    for i, dataset in enumerate(suite.every):
        found += _duplicates(dataset, files)
        found += _overlaps(dataset, names, files)
        found += _answers(dataset)
        found += _choices(dataset, files)
        found += _forms(dataset, learnt if i >= len(suite.train) else None)
        found += [Finding(dataset.name, note, fault=False) for note in dataset.notes]
        if not dataset.labeled:
            found.append(
                Finding(
                    dataset.name,
                    "its prompts have no responses, so there is no tuned reference",
                    fault=False,
                )
            )
    return sorted(found, key=lambda f: not f.fault)


def check(suite: Suite, strict: bool = False, kept: pathlib.Path | None = None) -> None:
    """Warns of a suite's faults on stderr; strict: raises InputError that lists them.

    kept: a file that holds the faults of the suite that was checked last; they are read from it
    when it is this one, unchanged.
    """
    faults = _faults(suite, kept)
    if strict:
        refuse(suite, faults)
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr, flush=True)


def refuse(suite: Suite, faults: list[str]) -> None:
    """Raises InputError that lists a suite's faults, if it has any."""
    if faults:
        raise listed(f"{suite.name}: faults in the data (--strict)", faults)


def _faults(suite: Suite, kept: pathlib.Path | None) -> list[str]:
    """The suite's faults, from the file `kept` or found and written there."""
    state = {"checks": CHECKS, "root": os.path.abspath(suite.root), "suite": suite.fingerprint}
    with contextlib.suppress(InputError, LookupError, TypeError):  # absent, damaged or another's
        stored = read_json(kept) if kept else {}
        if stored["state"] == state:
            return list(map(str, stored["faults"]))
    faults = [str(f) for f in findings(suite) if f.fault]
    if kept:
        write_json(kept, {"state": state, "faults": faults})
    return faults


def report(suite: Suite, found: Sequence[Finding]) -> str:
    """The data report: a table of the datasets, then what was found, faults and notes."""
    rows = [("dataset", "role", "train", "test", "answers", "most frequent in test")]
    for role, datasets in (("train", suite.train), ("unseen", suite.unseen)):
        for d in datasets:
            answers = Counter(e.response for e in d.test)
            most, count = answers.most_common(1)[0]
            most = most if len(most) <= LABEL_LENGTH else most[: LABEL_LENGTH - 3] + "..."
            rows.append(
                (
                    d.name,
                    role,
                    str(len(d.train)),
                    str(len(d.test)),
                    str(len(answers)),
                    f"{count / len(d.test):.0%} {most!r}",
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for title, fault in (("faults", True), ("notes", False)):
        some = [f"  {f}" for f in found if f.fault == fault]
        lines += ["", f"{title}: {len(some) or 'none'}", *some]
    return "\n".join(lines)
