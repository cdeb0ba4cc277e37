"""What is wrong with a suite's data, found before anything is trained on it.

    dnd data-report --suite=DIR [--strict]

Faults make scores mean something else than they seem (docs/METHOD.md section 7 has the original's):
they are warned of when a suite is loaded, and refused with --strict. Notes are only for the report.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import listed
from dnd_jax.core.stage import DEFAULT, ON_SUITE, Given, Stage
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, Suite, load_suite

SAME_SHARE = (
    0.5  # of the smaller dataset's questions: above it two datasets share too much to count as two
)
FEW = 12  # different answers that can be a set of labels
LABEL_LENGTH = 16  # characters of a response that can be a label
MAJORITY = 0.9  # share of one answer in a test set that is worth a note
CHANCE = 10  # fewer answers may be alike by chance
SHOWN = 3
_CHOICE = re.compile(r"^[ \t]*\(?([A-Za-z]|\d{1,2})[:.)][ \t]+\S", re.MULTILINE)
_FIRST_TWO = (["a", "b"], ["1", "2"], ["0", "1"])  # labels that choices begin with
_INNER = re.compile(r"\w+")
_TOLD_APART = re.compile(r"\w+|[-+*/=<>^%|&~]")  # "3 + 4" and "3 - 4" are two questions


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about a suite; `fault` when it spoils results."""

    dataset: str
    text: str
    fault: bool = True

    def __str__(self) -> str:
        return f"{self.dataset}: {self.text}"


def normal(text: str) -> str:
    """Words and operators alone, in lower case: what is compared when texts are called the same."""
    return " ".join(_TOLD_APART.findall(text.casefold()))


def question(prompt: str) -> str:
    """A prompt without its choices (lines such as "A: iron", from the first on), normalised."""
    first = _CHOICE.search(prompt) if choices(prompt) else None
    return normal(prompt[: first.start()] if first and normal(prompt[: first.start()]) else prompt)


def choices(prompt: str) -> list[str]:
    """The labels of a prompt's choices: ["A", "B", ...]; none where lines do not begin as such
    (code may have "x: int")."""
    found = _CHOICE.findall(prompt)
    return found if [label.casefold() for label in found[:2]] in _FIRST_TWO else []


def is_label(response: str) -> bool:
    """Whether a response can be one of a few labels, such as "[A]" or "True"."""
    return len(response) <= LABEL_LENGTH and len(_INNER.findall(response)) == 1


def shape(response: str) -> str:
    """The form of a label: "[A]" -> "[X]", "[12]" -> "[0]", "True" -> "Word", "b" -> "x"."""

    def kind(match: re.Match) -> str:
        word = match.group()
        if word.isdigit():
            return "0"
        if len(word) == 1:
            return "X" if word.isupper() else "x"
        return "WORD" if word.isupper() else "Word" if word[0].isupper() else "word"

    return _INNER.sub(kind, response)


def _where(examples: Sequence[Example]) -> str:
    more = ", ..." if len(examples) > SHOWN else ""
    return f" ({', '.join(e.where for e in examples[:SHOWN])}{more})"


def _duplicates(dataset: Dataset) -> Iterator[Finding]:
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        first: dict[tuple[str, str], Example] = {}
        again, contradicting = [], []
        for example in examples:
            key = (example.system, " ".join(example.prompt.split()))
            earlier = first.setdefault(key, example)
            if earlier is not example:
                (
                    again if earlier.response.split() == example.response.split() else contradicting
                ).append(example)
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


Asked = tuple[set[str], set[str]]  # normalised prompts and questions


def _overlaps(dataset: Dataset, trained: Mapping[str, Asked]) -> Iterator[Finding]:
    """Test questions that occur in the dataset's own train file or in one that is trained on."""
    tested = [(e, normal(e.prompt), question(e.prompt)) for e in dataset.test]
    for name, (prompts, questions) in trained.items():
        same = [e for e, prompt, _ in tested if prompt in prompts]
        alike = [e for e, prompt, asked in tested if asked in questions and prompt not in prompts]
        if found := same + alike:
            how = (
                f", {len(alike)} of them with other choices"
                if alike and choices(alike[0].prompt)
                else ""
            )
            total = len(dataset.test)
            yield Finding(
                dataset.name,
                f"{len(found)} of {total} test questions occur in {name}'s "
                f"train{how}{_where(found)}",
            )


def _labels(dataset: Dataset, suite: Suite) -> Iterator[Finding]:
    """One-label tests, and labels that no trained adapter can ever give."""
    counts = Counter(e.response for e in dataset.test)
    (most, count), total = counts.most_common(1)[0], len(dataset.test)
    if len(counts) == 1 and total >= CHANCE:
        yield Finding(
            dataset.name,
            f"every one of {total} test answers is {most!r}: to answer always the same scores 1.00",
        )
    elif count >= MAJORITY * total and total >= CHANCE:
        yield Finding(dataset.name, f"{count} of {total} test answers are {most!r}", fault=False)
    if (
        dataset.labeled
        and len(dataset.train) >= CHANCE
        and len(answers := {e.response for e in dataset.train}) == 1
    ):
        yield Finding(
            dataset.name, f"every one of {len(dataset.train)} train answers is {answers.pop()!r}"
        )
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        asked = [e for e in examples if is_label(e.response) and choices(e.prompt)]
        stray = [e for e in asked if _INNER.findall(e.response)[0] not in choices(e.prompt)]
        if len(asked) > len(examples) / 2 and stray:
            kind = f"such as {stray[0].response!r} of {', '.join(choices(stray[0].prompt))}"
            yield Finding(
                dataset.name,
                f"{len(stray)} {split} answers name none of their choices, {kind}{_where(stray)}",
            )
    if (
        not all(map(is_label, counts))
        or max(len(counts), len({e.response for e in dataset.train})) > FEW
    ):
        return  # numbers and names take forms that no train answer happened to have
    forms = {shape(e.response) for e in dataset.train if is_label(e.response)}
    never = [e for e in dataset.test if shape(e.response) not in forms]
    if forms and never:
        yield Finding(
            dataset.name,
            f"{len(never)} of {total} test answers look like {never[0].response!r}, but no train "
            "answer does (those look like "
            f"{next(e.response for e in dataset.train if is_label(e.response))!r}): they can "
            "never match",
        )
    learnt = {shape(e.response) for d in suite.train for e in d.train if is_label(e.response)}
    unknown = [e for e in dataset.test if shape(e.response) not in learnt]
    if dataset in suite.unseen and learnt and unknown and not never:
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


def _same_files(suite: Suite) -> Iterator[Finding]:
    every = suite.train + suite.unseen
    for split in ("train", "test"):
        asked = [{normal(e.prompt) for e in getattr(d, split)} for d in every]
        whole = [sorted((e.prompt, e.response) for e in getattr(d, split)) for d in every]
        for i, dataset in enumerate(every):
            for j, earlier in enumerate(every[:i]):
                shared, least = len(asked[i] & asked[j]), min(len(asked[i]), len(asked[j]))
                if whole[i] == whole[j]:
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


def findings(suite: Suite) -> list[Finding]:
    """All that is to be said about a suite, faults first."""
    asked = {
        d.name: ({normal(e.prompt) for e in d.train}, {question(e.prompt) for e in d.train})
        for d in suite.train
    }
    found = list(_same_files(suite))
    if len(suite.train) == 1:
        lesson = "the generator cannot learn what prompts mean; wrong prompts will do as well"
        found.append(Finding(suite.train[0].name, f"is the only training dataset: {lesson}"))
    for dataset in suite.train + suite.unseen:
        own = {normal(e.prompt) for e in dataset.train}, {question(e.prompt) for e in dataset.train}
        found += _duplicates(dataset)
        found += _overlaps(dataset, {dataset.name: own, **asked})
        found += _labels(dataset, suite)
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


def check(suite: Suite, strict: bool = False) -> None:
    """Warns of a suite's faults on stderr; strict: raises InputError that lists them."""
    faults = [str(f) for f in findings(suite) if f.fault]
    if faults and strict:
        raise listed(f"{suite.name}: faults in the data (--strict)", faults)
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr, flush=True)


def report(suite: Suite) -> str:
    """The data report: a table of the datasets, then faults and notes."""
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
    found = findings(suite)
    for title, fault in (("faults", True), ("notes", False)):
        some = [f"  {f}" for f in found if f.fault == fault]
        lines += ["", f"{title}: {len(some) or 'none'}", *some]
    return "\n".join(lines)


def _run(given: Given) -> None:
    suite = load_suite(given.config.suite or given.workdir / paths.SUITE, 1)
    print(report(suite), flush=True)
    if given["strict"]:
        check(suite, strict=True)


STAGE = Stage(_run, ON_SUITE, settings=DEFAULT)
