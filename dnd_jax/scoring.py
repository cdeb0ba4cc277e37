"""Greedy answers of the base LM in JAX, and the scores of an answer: exact match, right content, right format."""

import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.errors import InputError
from dnd_jax.models.base_lm import BaseLM, Lora
from dnd_jax.suite import Dataset

SCORES = ("exact", "content", "format")
MOST_LABELS = 32  # different answers of a dataset whose labels' likelihoods are compared
FORM_SHARE = 0.95  # a word that this share of a dataset's responses has belongs to the form, the others to the content


def words(text: str) -> list[str]:
    """Words and single punctuation marks of a text."""
    return re.findall(r"\w+|[^\w\s]", text)


class Scorer:
    """Scores answers to one dataset's questions.

    exact: the same words in the same order. content: the share of the right answer's content words that the answer holds (words
    that nearly all of the dataset's responses share are form, the others content). format: the answer has the right shape:
    as many words, the same form words and punctuation in the same places, any word where a content word belongs.
    """

    def __init__(self, responses: Sequence[str]):
        self.right = [words(r) for r in responses]
        counts: dict[str, int] = {}
        for response in self.right:
            for word in set(response):
                counts[word] = counts.get(word, 0) + 1
        self.form = {word for word, count in counts.items() if count >= FORM_SHARE * len(self.right)}

    def _shape(self, answer: Iterable[str]) -> list[str]:
        return [w if w in self.form or not w[0].isalnum() else "*" for w in answer]

    def each(self, answers: Sequence[str]) -> dict[str, list[float]]:
        """Scores, each in 0..1, of one answer a question in the order of the responses."""
        scores: dict[str, list[float]] = {key: [] for key in SCORES}
        for right, text in zip(self.right, answers, strict=True):
            answer = words(text)
            content = set(right) - self.form
            scores["exact"].append(float(answer == right))
            scores["content"].append(len(content & set(answer)) / len(content) if content else float(answer == right))
            scores["format"].append(float(self._shape(answer) == self._shape(right)))
        return scores

    def __call__(self, answers: Sequence[str]) -> dict[str, float]:
        """The means of `each`."""
        return {key: sum(values) / len(values) for key, values in self.each(answers).items()}


def labels_of(dataset: Dataset) -> list[str]:
    """The answers that a dataset chooses from, when its responses are a few labels. Raises InputError when they are many."""
    found = sorted({e.response for e in dataset.train + dataset.test if e.response})
    if len(found) > MOST_LABELS:
        raise InputError(
            f"{dataset.name}: {len(found)} different answers, so no labels to choose from (at most {MOST_LABELS}); set "
            "--config.evaluate.answers=greedy"
        )
    return found


def make_greedy(module: BaseLM, max_new_tokens: int):
    """A jitted greedy decoder: (params, lora, lora_scale, ids (B, S), valid (B, S), end id) -> ids (B, max_new_tokens).

    Prompts are padded on the left; tokens after an end token are the end token.
    """

    def decode(params: Mapping, lora: Lora, lora_scale: float, ids, valid, end):
        batch, length = ids.shape
        ids = jnp.concatenate([ids, jnp.full((batch, max_new_tokens), end, ids.dtype)], axis=1)
        valid = jnp.concatenate([valid, jnp.zeros((batch, max_new_tokens), valid.dtype)], axis=1)

        def step(i, carry):
            ids, valid, done = carry
            hidden = module.apply({"params": params}, ids, lora, lora_scale, valid, method="hidden")
            last = jax.lax.dynamic_index_in_dim(hidden, length + i - 1, axis=1, keepdims=False)
            token = jnp.argmax(module.apply({"params": params}, last, method="head"), axis=-1).astype(ids.dtype)
            token = jnp.where(done, end, token)
            at = (0, length + i)
            ids = jax.lax.dynamic_update_slice(ids, token[:, None], at)
            valid = jax.lax.dynamic_update_slice(valid, jnp.ones((batch, 1), valid.dtype), at)
            return ids, valid, done | (token == end)

        ids, _, _ = jax.lax.fori_loop(0, max_new_tokens, step, (ids, valid, jnp.zeros(batch, bool)))
        return ids[:, length:]

    return jax.jit(decode)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows of any length as (ids, valid), int32 (B, S), padded on the left."""
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad, np.int32)
    valid = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        valid[i, length - len(row) :] = 1
    return ids, valid
