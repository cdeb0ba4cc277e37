"""Texts that the encoder cuts: how many of a set have more than condition.max_text_length tokens
and lose their end, and what is done about it.

It is said how many are. Prompts that differ only behind the cut are one to the generator: a set of
which more than half of the prompts are lost is refused, unless condition.too_long is "cut". A
prompt is lost when more than half of its tokens are behind the cut, or when what is left of it is
left of another prompt too, of this set or another.
"""

import contextlib
import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from dnd_jax.config.schema import Config
from dnd_jax.config.validate import section
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json, write_json
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.suite import Suite
from dnd_jax.parallel import hosts

SHARE = 0.5  # of a prompt's tokens, and of a set's prompts, that may be lost
# Tokens that no tokenizer adds more of. An ASCII text has at most as many of its own as characters.
SPECIAL = 8
BLOCK = 1000  # texts that are tokenised at once
SHOWN = 3  # sets that are listed
COUNTS = 1  # counted up whenever `count` finds something else than before
RAISE = "raise it, shorten the prompts"

# Texts, L -> their tokens as the encoder gets them, special ones included, None for what the
# vocabulary lacks; L = None: uncut.
Tokens = Callable[[Sequence[str], int | None], list[Sequence]]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How many of so many texts are longer than `limit` tokens, how long the longest is, and how
    many are lost."""

    texts: int
    cut: int
    longest: int
    limit: int
    lost: int

    @property
    def most(self) -> bool:
        """Whether too many are lost to tell tasks apart."""
        return self.lost > SHARE * self.texts

    def __str__(self) -> str:
        lost = f"; {self.lost} lose most of it, or all that tells them apart" if self.lost else ""
        return (
            f"{self.cut} of {self.texts} prompts have more than condition.max_text_length = "
            f"{self.limit} tokens (up to {self.longest}) and lose their end{lost}"
        )


def count(sets: Mapping[str, Sequence[str]], tokens: Tokens, limit: int) -> dict[str, Cut]:
    """{name: how many of its texts are cut} of the sets of which any are. Only texts that may be
    cut are tokenised."""
    lengths: dict[str, int] = {}  # of every text that is cut
    longest: dict[str, int] = {}
    for name, texts in sets.items():
        unsure = [text for text in texts if not text.isascii() or len(text) + SPECIAL > limit]
        found = list(map(len, _blocks(unsure, tokens, None)))
        lengths |= {t: n for t, n in zip(unsure, found, strict=True) if n > limit}
        longest[name] = max(found, default=0)
    kept = zip(lengths, _blocks(list(lengths), tokens, limit), strict=True)
    # Two texts of unknown words look alike without a cut.
    left = [text if None in its else hash(tuple(its)) for text, its in kept]
    times = Counter(left)
    lost = {
        text
        for text, key in zip(lengths, left, strict=True)
        if lengths[text] * (1 - SHARE) > limit or times[key] > 1
    }
    return {
        name: Cut(len(texts), cut, longest[name], limit, sum(text in lost for text in texts))
        for name, texts in sets.items()
        if (cut := sum(text in lengths for text in texts))
    }


def _blocks(texts: Sequence[str], tokens: Tokens, limit: int | None) -> Iterator[Sequence]:
    """The tokens of each text, block by block."""
    for first in range(0, len(texts), BLOCK):
        yield from tokens(texts[first : first + BLOCK], limit)


def of_suite(
    suite: Suite,
    tokens: Tokens,
    config: Config,
    kept: pathlib.Path | None = None,
    encoder: str = "",
) -> dict[str, Cut]:
    """`count` of a suite's datasets.

    kept: a file that holds what was counted last; it is read when that was of this suite, encoder
    (a `PromptEncoder.fingerprint`) and settings, else written by process 0.
    """
    form, seed, limit = config.condition.form, config.seed, config.condition.max_text_length
    state = {"counts": COUNTS, "suite": suite.fingerprint, "encoder": encoder}
    state |= {"form": form, "seed": seed, "limit": limit}
    with contextlib.suppress(InputError, LookupError, TypeError, AttributeError):  # absent, damaged
        stored = read_json(kept) if kept else {}
        if stored["state"] == state:
            return {name: section(Cut, cut, name) for name, cut in stored["cut"].items()}
    found = count(
        {d.name: condition_texts(d.train, form, seed) for d in suite.every}, tokens, limit
    )
    if kept and hosts.lead():
        cuts = {name: dataclasses.asdict(cut) for name, cut in found.items()}
        write_json(kept, {"state": state, "cut": cuts})
    return found


def check(found: Mapping[str, Cut], too_long: str, fix: str, say: Callable = print) -> None:
    """Says in one line of which sets, by their names, prompts are cut.

    too_long: condition.too_long; unless it is "cut", raises InputError that lists those of which
    most are lost. fix: what can be done beside allowing it.
    """
    most = {name: cut for name, cut in found.items() if cut.most}
    if most and too_long != "cut":
        raise InputError(
            f"{_listed(most)}; tasks that differ only there get the same adapter: {fix}, or allow "
            "it by --config.condition.too_long=cut"
        )
    if found:
        say(_listed(found))


def _listed(found: Mapping[str, Cut]) -> str:
    """The first SHOWN of the sets."""
    more = f"; and {len(found) - SHOWN} more datasets" if len(found) > SHOWN else ""
    return "; ".join(f"{name}: {found[name]}" for name in list(found)[:SHOWN]) + more
