"""When two questions are the same, and what form an answer has: what the data report compares.

Two prompts say the same when their words and operators do (`normal`), two questions when that is so
without their choices. All prompts of a suite are compared in about the time that reading their
JSON takes.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence

from dnd_jax.data.suite import Suite
from dnd_jax.data.suite_file import SPLITS

LABEL_LENGTH = 16  # characters of a response that can be a label
_CHOICE = re.compile(r"\n[ \t]*\(?([A-Za-z]|\d{1,2})[:.)][ \t]+\S")  # in "\n" + prompt
_FIRST_TWO = ("ab", "12", "01")  # labels that choices begin with
INNER = re.compile(r"\w+")
_TOLD_APART = re.compile(r"\w+|[-+*/=<>^%|&~]")  # "3 + 4" and "3 - 4" are two questions
_LOWER = bytes(range(128)).lower().ljust(256)
_NOT_TOLD = bytes(code for code in range(128) if not _TOLD_APART.match(chr(code)))


def normal(text: str) -> str:
    """Words and operators alone, in lower case: what is compared when texts are called the same."""
    return " ".join(_TOLD_APART.findall(text.casefold()))


def _packed(text: str) -> bytes:
    """`normal` of a text without its spaces, at a hundred times the speed where it is ASCII."""
    if text.isascii():
        return text.encode().translate(_LOWER, _NOT_TOLD)
    return normal(text).replace(" ", "").encode()


def alike(texts: Sequence[str]) -> list[bytes]:
    """One value a text: two are equal just where `normal` of the texts is.

    That is the packed text, unless different texts have the same: only those are normalised.
    """
    packed = list(map(_packed, texts))
    first: dict[bytes, str] = {}
    unclear = {
        its for its, text in zip(packed, texts, strict=True) if first.setdefault(its, text) != text
    }
    return [
        b"=" + normal(text).encode() if its in unclear else its
        for its, text in zip(packed, texts, strict=True)
    ]


def question(prompt: str) -> str:
    """A prompt without its choices (lines such as "A: iron", from the first on), normalised."""
    return normal(_stem(prompt, _parted(prompt)[1]))


def choices(prompt: str) -> list[str]:
    """The labels of a prompt's choices: ["A", "B", ...]; none where lines do not begin as such
    (code may have "x: int")."""
    return list(_parted(prompt)[0])


def _parted(prompt: str) -> tuple[tuple[str, ...], int]:
    """(the labels of a prompt's choices, where the first one's line begins: its end without)."""
    if "\n" in prompt:
        labels = _CHOICE.findall(lines := f"\n{prompt}")
        if len(labels) > 1 and (labels[0] + labels[1]).casefold() in _FIRST_TWO:
            return tuple(labels), _CHOICE.search(lines).start()
    return (), len(prompt)


def _stem(prompt: str, end: int) -> str:
    """The first `end` characters of a prompt; all of it where no word is in them."""
    stem = prompt[:end]
    return stem if _TOLD_APART.search(stem) else prompt


@dataclasses.dataclass(frozen=True)
class Asked:
    """The prompts of one file, in its order: what is equal for prompts that say the same, for their
    questions without the choices, and the labels of those."""

    prompts: Sequence[bytes]
    questions: Sequence[bytes]
    choices: Sequence[tuple[str, ...]]

    @functools.cached_property
    def sets(self) -> tuple[set[bytes], set[bytes]]:
        """(prompts, questions)."""
        return set(self.prompts), set(self.questions)


Files = Mapping[tuple[str, str], Asked]  # of (name of the dataset, "train" or "test")


def asked_of(suite: Suite) -> Files:
    """What is compared of the prompts of every file."""
    files = {(d.name, split): getattr(d, split) for d in suite.every for split in SPLITS}
    prompts = [e.question for examples in files.values() for e in examples]
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # a few lists of labels, not one a prompt
    labels, stems = [], {}  # stems: of the prompts that have choices
    for i, prompt in enumerate(prompts):
        its, end = _parted(prompt)
        labels.append(known.setdefault(its, its))
        if its:
            stems[i] = _stem(prompt, end)
    compared = alike([*prompts, *stems.values()])
    whole = compared[: len(prompts)]
    questions = list(whole)
    for i, stem in zip(stems, compared[len(prompts) :], strict=True):
        questions[i] = stem
    ends = list(itertools.accumulate(map(len, files.values())))
    spans = [slice(end - len(its), end) for its, end in zip(files.values(), ends, strict=True)]
    return {
        key: Asked(whole[span], questions[span], labels[span])
        for key, span in zip(files, spans, strict=True)
    }


def is_label(response: str) -> bool:
    """Whether a response can be one of a few labels, such as "[A]" or "True"."""
    return len(response) <= LABEL_LENGTH and len(INNER.findall(response)) == 1


def shape(response: str) -> str:
    """The form of a label: "[A]" -> "[X]", "[12]" -> "[0]", "True" -> "Word", "b" -> "x"."""

    def kind(match: re.Match) -> str:
        word = match.group()
        if word.isdigit():
            return "0"
        if len(word) == 1:
            return "X" if word.isupper() else "x"
        return "WORD" if word.isupper() else "Word" if word[0].isupper() else "word"

    return INNER.sub(kind, response)
