"""A base that is asked questions, wherever it runs: prompts as token ids, answers as texts, and of
labels the likeliest."""

import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from dnd_jax.base.chat import ends_of, render
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.sequences import token_pairs
from dnd_jax.data.sources import Example

Row = tuple[list[int], int]  # token ids, and how many at their end are the answer's


class AskedBase:
    """What bases in PyTorch and behind a server have in common."""

    engine = ""  # what computes, as results name it

    def __init__(self, base: str | os.PathLike, batch_size: int, max_new_tokens: int):
        self.base = pathlib.Path(base)
        self.tokenizer = load_tokenizer(base)
        self.ends = ends_of(base, self.tokenizer)
        self.max_new_tokens = max_new_tokens
        self._batch_size = batch_size

    def prompt_ids(
        self, examples: Sequence[Example], shots: Sequence[Example] = ()
    ) -> list[list[int]]:
        """Token ids of each example as `rendered`."""
        texts = self.rendered(examples, shots)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def rendered(self, examples: Sequence[Example], shots: Sequence[Example] = ()) -> list[str]:
        """Each example as the base is asked: the training template, up to where the answer begins.
        shots: answered examples, as turns before it."""
        before = [(e.prompt, e.response) for e in shots]
        return [render(self.tokenizer, e.prompt, e.system, before) for e in examples]

    def choose(
        self, examples: Sequence[Example], labels: Sequence[str], shots: Sequence[Example] = ()
    ) -> list[str]:
        """Of the labels, the answer to each example that the base finds most likely, its end token
        included. shots: as in `prompt_ids`."""
        labelled = [e._replace(response=label) for e in examples for label in labels]
        pairs = token_pairs(self.tokenizer, labelled, self.ends, shots)
        rows = [(prompt + answer, len(answer)) for prompt, answer in pairs]
        scores = []
        for first in range(0, len(rows), self._batch_size):
            scores += self._likelihoods(rows[first : first + self._batch_size])
        best = np.reshape(scores, (len(examples), len(labels))).argmax(axis=1)
        return [labels[i] for i in best]

    def _likelihoods(self, rows: Sequence[Row]) -> list[float]:
        """The logarithm of the likelihood of each row's answer."""
        raise NotImplementedError

    def decode(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The texts of answers without their end token; what other special tokens they have (a
        call of a tool may begin with one) is a part of them."""
        return self.tokenizer.batch_decode([list(a) for a in answers], skip_special_tokens=False)


def positions_of(config) -> float:
    """How many tokens a transformers configuration is for; infinite where it does not say."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or math.inf
