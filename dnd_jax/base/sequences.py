"""Questions and answers as arrays for the base LM: as its chat template shows them, tokenised once,
ahead of time."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from dnd_jax.base.chat import ANSWER, PROMPT, answer_text, render
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token ids (n, S), padded on the right; the response and its end token lie at [start, end)."""

    ids: np.ndarray  # int32 (n, S)
    start: np.ndarray  # int32 (n,)
    end: np.ndarray  # int32 (n,)
    skipped: int = 0  # examples that were too long and are not here
    cut: int = 0  # and those that are here with the beginning of their prompt cut
    of: np.ndarray | None = None  # int (n,), the examples' numbers; None: all, in their order

    def __len__(self) -> int:
        return len(self.ids)

    def lost(self, what: str, max_length: int) -> str:
        """One line that counts what was too long; empty where nothing was."""
        if not self.skipped + self.cut:
            return ""
        how = [f"{self.skipped} skipped"] * bool(self.skipped)
        how += [f"{self.cut} cut at the beginning of their prompts"] * bool(self.cut)
        return (
            f"{what}: {self.skipped + self.cut} of {len(self) + self.skipped} examples have more "
            f"than base.max_length={max_length} tokens: {', '.join(how)}"
        )

    @functools.cached_property
    def prefix(self) -> int:
        """How many tokens at the beginning are the same in every row: of a chat template, up to the
        prompt. The token before the first answer is not among them."""
        first = self.ids[:, : max(0, int(self.start.min()) - 1)]
        return int(np.argmin(np.append((first == first[0]).all(axis=0), False)))

    def batch(self, index: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Rows `index` as {"ids" (..., S), "at" (..., R), "labels" (..., R)}, R = width: logits at
        `at` predict `labels` (-1: beyond the response).

        S holds the longest of the rows and is one of a few: little to compile for, and little
        padding to compute.
        """
        end = self.end[index]
        ids = self.ids[index][..., : padded_length(int(end.max()))]
        at = self.start[index][..., None] + np.arange(width)
        inside = at < end[..., None]
        at = np.minimum(at, ids.shape[-1] - 1)
        labels = np.where(inside, np.take_along_axis(ids, at, axis=-1), -1)
        return {"ids": ids, "at": at - 1, "labels": labels.astype(np.int32)}

    def answers(self) -> Iterator[np.ndarray]:
        """The tokens of each row's response."""
        return (row[a:b] for row, a, b in zip(self.ids, self.start, self.end, strict=True))

    @property
    def response_width(self) -> int:
        """The longest response, its end token included."""
        return int((self.end - self.start).max())


LEAST_PREFIX = 8  # tokens that all rows share, from which on they are computed apart


def shared_prefix(tasks: Iterable[Sequences]) -> int:
    """Tokens that the rows of each task begin with alike: 0 where they are too few to gain by."""
    shared = min(task.prefix for task in tasks)
    return shared if shared >= LEAST_PREFIX else 0


def packed_rows(
    tasks: Sequence[Sequences], index: Sequence[np.ndarray], prefix: int, pad: int
) -> dict[str, np.ndarray]:
    """Rows index[k], B each, of each of K tasks, one behind the other with no padding between:
    {"ids" (K, N), "token" (K, B, S), "place" (K, N), "at" (K, R), "labels" (K, R), "prefix" (K,
    P)}, int32.

    token and place: of base/attention.py's Packed. Logits of the tokens `at` predict `labels` (-1:
    none). The first `prefix` tokens, which all rows of a task begin with, are taken off them, and
    so is the last, which predicts nothing. N, S and R hold the most of any task and are ones of a
    few: little to compile for. pad: token id.
    """
    found = [_one_behind_the_other(*each, prefix) for each in zip(tasks, index, strict=True)]
    count, longest = len(index[0]), int(max(step.max() for _, _, step, _, _ in found)) + 1
    whole, length = padded_length(max(len(ids) for ids, *_ in found), 8), padded_length(longest)
    width = padded_length(max(len(at) for *_, at, _ in found), 2)
    packed = {
        "ids": np.full((len(tasks), whole), pad, np.int32),
        "token": np.full((len(tasks), count, length), whole, np.int32),
        "place": np.full((len(tasks), whole), count * length, np.int32),
        "at": np.zeros((len(tasks), width), np.int32),
        "labels": np.full((len(tasks), width), -1, np.int32),
        "prefix": np.stack([task.ids[0, :prefix] for task in tasks]),
    }
    for k, (ids, row, step, at, labels) in enumerate(found):
        packed["ids"][k, : len(ids)] = ids
        packed["token"][k, row, step] = np.arange(len(ids))
        packed["place"][k, : len(ids)] = row * length + step
        packed["at"][k, : len(at)] = at
        packed["labels"][k, : len(at)] = labels
    return packed


def _one_behind_the_other(
    task: Sequences, rows: np.ndarray, prefix: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens (n,), their rows' places in `rows`, their positions in these, which of them predict
    responses' tokens (r,), those)."""
    lengths = task.end[rows] - prefix - 1
    row = np.repeat(np.arange(len(rows)), lengths)
    step = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.flatnonzero(step >= task.start[rows][row] - prefix - 1)
    of = rows[row]
    return task.ids[of, prefix + step], row, step, at, task.ids[of[at], prefix + step[at] + 1]


def padded_length(tokens: int, steps: int = 4) -> int:
    """How long rows are made that have so many tokens: the next of so many steps an octave, each of
    8 at least."""
    octave = 1 << (tokens - 1).bit_length() >> 1
    step = max(8, octave // steps)
    return -(-tokens // step) * step


def encode(
    tokenizer,
    examples: Sequence[Example],
    max_length: int,
    too_long: str = "refuse",
    ends: Collection[int] = (),
) -> Sequences:
    """Tokenises examples; one without a response ends where that would start.

    too_long, of an example with more than max_length tokens: "refuse" it with an InputError that
    names its file and line; "skip" it; or "cut" the beginning of its prompt, never its system text,
    template or answer (skipped, where those alone are too long). ends: of the base's answers.
    Raises InputError where all are skipped, and as `token_pairs`.
    """
    pairs = token_pairs(tokenizer, examples, ends)
    long = [i for i, (p, r) in enumerate(pairs) if len(p) + len(r) > max_length]
    if long and too_long == "refuse":
        example, (p, r) = examples[long[0]], pairs[long[0]]
        raise InputError(
            f"{example.where}: {len(p) + len(r)} tokens with its response, more than "
            f"base.max_length={max_length}; shorten it or raise the setting"
        )
    cut = dict.fromkeys(long)  # None: skipped
    if too_long == "cut":
        cut = {i: _cut(tokenizer, examples[i], max_length - len(pairs[i][1])) for i in long}
    of = [i for i in range(len(pairs)) if cut.get(i, ()) is not None]
    kept = [(cut.get(i, pairs[i][0]), pairs[i][1]) for i in of]
    if not kept:
        raise InputError(
            f"{examples[0].where}: all {len(examples)} examples have more than "
            f"base.max_length={max_length} tokens; raise the setting"
        )
    skipped = len(pairs) - len(kept)
    found = _padded(kept, tokenizer.pad_token_id, skipped, len(long) - skipped)
    return dataclasses.replace(found, of=np.array(of)) if skipped else found


def encode_shown(
    tokenizer,
    examples: Sequence[Example],
    shots: Sequence[Sequence[Example]],
    max_length: int,
    ends: Collection[int] = (),
) -> Sequences:
    """Tokenises examples, each behind answered examples of its own. Raises InputError for one that
    has then more than max_length tokens, and as `token_pairs`."""
    pairs: list = [None] * len(examples)
    alike: dict[tuple, list[int]] = {}  # those behind the same ones are tokenised together
    for i, before in enumerate(shots):
        alike.setdefault(tuple(before), []).append(i)
    for before, rows in alike.items():
        found = token_pairs(tokenizer, [examples[i] for i in rows], ends, before)
        for i, pair in zip(rows, found, strict=True):
            pairs[i] = pair
    for example, before, (p, r) in zip(examples, shots, pairs, strict=True):
        if len(p) + len(r) > max_length:
            raise InputError(
                f"{example.where}: {len(p) + len(r)} tokens behind {len(before)} answered "
                f"examples, more than base.max_length={max_length}; lower config.train.shots or "
                "raise that"
            )
    return _padded(pairs, tokenizer.pad_token_id, 0, 0)


def encode_packed(tokenizer, examples: Sequence[Example], length: int) -> Sequences:
    """Tokenises examples of any length, one after the other in rows of `length` tokens, to learn
    every token of; the last few that fill no row go.

    Raises InputError when not even one row is filled, and for a tokenizer without an end token.
    """
    pairs = token_pairs(tokenizer, examples)
    stream = np.concatenate([np.array(p + r, np.int32) for p, r in pairs])
    rows = len(stream) // length
    if not rows:
        raise InputError(
            f"the corpus has {len(stream)} tokens, fewer than base.max_length={length}; lower "
            "the setting"
        )
    return Sequences(
        stream[: rows * length].reshape(rows, length),
        np.ones(rows, np.int32),
        np.full(rows, length, np.int32),
    )


def token_pairs(
    tokenizer,
    examples: Sequence[Example],
    ends: Collection[int] = (),
    shots: Sequence[Example] = (),
) -> list[tuple[list[int], list[int]]]:
    """`plain_pairs`, of answers that can be said. ends: what else ends an answer of the base
    (`ends_of`). Raises InputError also for a response that has an end inside."""
    pairs = plain_pairs(tokenizer, examples, shots)
    for example, (_, ids) in zip(examples, pairs, strict=True):
        if inside := [token for token in ids[:-1] if token == ids[-1] or token in ends]:
            raise InputError(
                f"{example.where}: its response has {tokenizer.decode(inside[:1])!r} in it, which "
                "ends an answer of this base; remove it"
            )
    return pairs


def plain_pairs(
    tokenizer, examples: Sequence[Example], shots: Sequence[Example] = ()
) -> list[tuple[list[int], list[int]]]:
    """(tokens of the rendered prompt, of the answer up to and with its end token) of every example;
    nothing ends where there is no response.

    An answer's tokens are those that it has behind its prompt. shots: answered examples, as turns
    before every prompt. Raises InputError as `render` and `answer_text` do.
    """
    # Each prompt and each response once: to choose of labels is to ask every prompt with each.
    keys, responses = [(e.prompt, e.system) for e in examples], [e.response for e in examples]
    before = [(e.prompt, e.response) for e in shots]
    shown = {key: render(tokenizer, *key, before) for key in dict.fromkeys(keys)}
    said = {r: answer_text(tokenizer, r) if r else "" for r in dict.fromkeys(responses)}
    asked, answered = [shown[key] for key in keys], [said[r] for r in responses]
    distinct = list(dict.fromkeys(asked))
    ids_of = dict(zip(distinct, _tokens(tokenizer, distinct), strict=True))
    prompts = [ids_of[text] for text in asked]
    wholes = _tokens(tokenizer, [p + a for p, a in zip(asked, answered, strict=True)])
    pairs = []
    for prompt, answer, whole in zip(prompts, answered, wholes, strict=True):
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:  # the two share a token
            ids = _tokens(tokenizer, [answer])[0]
        pairs.append((prompt, ids))
    return pairs


def how_taught(tokenizer) -> tuple[str, bool]:
    """(hash of a marked example as it is taught, as text and as tokens; whether version 0.2.0 made
    the same tokens of it: the prompt's, the response's by itself, the tokenizer's end token)."""
    [(prompt, answer)] = token_pairs(tokenizer, [Example(PROMPT, ANSWER)])
    text = render(tokenizer, PROMPT) + answer_text(tokenizer, ANSWER)
    before = [*_tokens(tokenizer, [ANSWER])[0], tokenizer.eos_token_id]
    return digests.of_json([text, prompt, answer]), answer == before


def _tokens(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _cut(tokenizer, example: Example, room: int) -> list[int] | None:
    """The tokens of a rendered prompt that lost as much of its beginning as makes them fit; None
    where no character of it has room."""

    def rest(first: int) -> list[int]:
        text = render(tokenizer, example.prompt[first:], example.system)
        return _tokens(tokenizer, [text])[0]

    fewest, most = 0, len(example.prompt)  # characters to cut: too few, and the first that may do
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if len(rest(middle)) <= room else (middle, most)
    found = rest(most)
    return found if most < len(example.prompt) and len(found) <= room else None


def _padded(
    pairs: Sequence[tuple[list[int], list[int]]], pad: int, skipped: int, cut: int
) -> Sequences:
    """(prompt, response) token lists as arrays."""
    start = np.array([len(p) for p, _ in pairs], np.int32)
    end = np.array([len(p) + len(r) for p, r in pairs], np.int32)
    ids = np.full((len(pairs), end.max()), pad, np.int32)
    for row, (p, r) in zip(ids, pairs, strict=True):
        row[: len(p) + len(r)] = p + r
    return Sequences(ids, start, end, skipped, cut)
