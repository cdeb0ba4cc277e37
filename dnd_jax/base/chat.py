"""Questions and answers as arrays for the base LM: rendered with the base's chat template,
tokenised once, ahead of time."""

import dataclasses
import json
from collections.abc import Iterable, Sequence

import jinja2
import numpy as np
import tokenizers

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example

transformers = packages.deferred("transformers")
# The template of a base pretrained here; a given base brings its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
ROLES = ("<system>", "<user>", "<assistant>")
DATE = "26 Jul 2024"  # for chat templates that name the day, and would render other texts tomorrow
SHORTEST = 64  # tokens of a batch's rows, unless all rows are shorter


def build_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer of Qwen2's own class, trained on `texts`: at most vocab_size
    tokens, the 256 bytes included.

    Every piece starts with a space, so that a word is one token wherever it stands.
    """
    special = {**SPECIAL, "add_prefix_space": True}
    backend = transformers.Qwen2Tokenizer(**special)._tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        extra_special_tokens=list(ROLES),
        **special,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(tokenizer, prompt: str, system: str = "") -> str:
    """The text that precedes the response, special tokens included: the base's chat template, or
    prompt and a line break (after the begin token, where the tokenizer sets one) where it has none.

    A template that knows no system role gets the system text before the prompt; one that can think
    aloud is told not to; one that says what day it is (Llama 3.2's) always says the same.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer("")["input_ids"]
        begin = tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else ""
        return f"{begin}{system}\n{prompt}\n" if system else f"{begin}{prompt}\n"

    def apply(messages: list[dict]) -> str:
        options = {"enable_thinking": False, "date_string": DATE}
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )

    if not system:
        return apply([{"role": "user", "content": prompt}])
    try:
        return apply([{"role": "system", "content": system}, {"role": "user", "content": prompt}])
    except jinja2.TemplateError:  # Gemma's raises one
        return apply([{"role": "user", "content": f"{system}\n\n{prompt}"}])


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token ids (n, S), padded on the right; the response and its end token lie at [start, end)."""

    ids: np.ndarray  # int32 (n, S)
    start: np.ndarray  # int32 (n,)
    end: np.ndarray  # int32 (n,)
    skipped: int = 0  # examples that were too long and are not here
    cut: int = 0  # and those that are here with the beginning of their prompt cut

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

    def batch(self, index: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Rows `index` as {"ids" (..., S), "at" (..., R), "labels" (..., R)}, R = width: logits at
        `at` predict `labels` (-1: beyond the response).

        S is the power of two that holds the longest of the rows: few lengths to compile for, and
        little padding to compute.
        """
        end = self.end[index]
        ids = self.ids[index][..., : max(SHORTEST, 1 << int(end.max() - 1).bit_length())]
        at = self.start[index][..., None] + np.arange(width)
        inside = at < end[..., None]
        at = np.minimum(at, ids.shape[-1] - 1)
        labels = np.where(inside, np.take_along_axis(ids, at, axis=-1), -1)
        return {"ids": ids, "at": at - 1, "labels": labels.astype(np.int32)}

    @property
    def response_width(self) -> int:
        """The longest response, its end token included."""
        return int((self.end - self.start).max())


def encode(
    tokenizer, examples: Sequence[Example], max_length: int, too_long: str = "refuse"
) -> Sequences:
    """Tokenises examples; one without a response ends where that would start.

    too_long, of an example with more than max_length tokens: "refuse" it with an InputError that
    names its file and line; "skip" it; or "cut" the beginning of its prompt, never its system text,
    template or answer (skipped, where those alone are too long). Raises InputError where all are
    skipped, and for a tokenizer without an end token.
    """
    pairs = _token_pairs(tokenizer, examples)
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
    kept = [
        (cut.get(i, p), r) for i, (p, r) in enumerate(pairs) if i not in cut or cut[i] is not None
    ]
    if not kept:
        raise InputError(
            f"{examples[0].where}: all {len(examples)} examples have more than "
            f"base.max_length={max_length} tokens; raise the setting"
        )
    skipped = len(pairs) - len(kept)
    return _padded(kept, tokenizer.pad_token_id, skipped, len(long) - skipped)


def encode_packed(tokenizer, examples: Sequence[Example], length: int) -> Sequences:
    """Tokenises examples of any length, one after the other in rows of `length` tokens, to learn
    every token of; the last few that fill no row go.

    Raises InputError when not even one row is filled, and for a tokenizer without an end token.
    """
    pairs = _token_pairs(tokenizer, examples)
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


def _token_pairs(tokenizer, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """(tokens of the rendered prompt, of the response with its end token) of every example; nothing
    ends where there is no response. Raises InputError for a tokenizer without an end token."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer has no eos_token, so no answer could end; "
            "set one"
        )
    prompts = _tokens(tokenizer, [render(tokenizer, e.prompt, e.system) for e in examples])
    responses = _tokens(tokenizer, [e.response for e in examples])
    end = [tokenizer.eos_token_id]
    return [(p, r + end * bool(r)) for p, r in zip(prompts, responses, strict=True)]


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
