"""What LoRAs score on rows of tokens, by the base in JAX."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dnd_jax.base.architecture import BaseLM
from dnd_jax.base.loss import answer_loss
from dnd_jax.base.sequences import Sequences, padded_length


class Score(NamedTuple):
    """Of one LoRA on rows."""

    loss: float  # mean cross-entropy over their response tokens, batch by batch
    exact: float  # share of responses whose every token is the most likely one


@functools.partial(jax.jit, static_argnums=(0, 4))
def _batch_score(module: BaseLM, params, lora, batch, lora_scale: float):
    return answer_loss(module, params, batch, lora, lora_scale)


def score_loras(
    module: BaseLM,
    params: Mapping,
    lora: Mapping[str, np.ndarray],
    lora_scale: float,
    rows: Sequence[Sequences],
    batch_size: int,
) -> list[Score]:
    """Scores each task's LoRA on the task's rows; lora (K, ...) and rows have one entry a task.
    Batches have one of a few shapes: there are few programs to compile, however many tasks."""
    scores = []
    for k, of_task in enumerate(rows):
        one = {name: value[k] for name, value in lora.items()}
        loss = exact = 0.0
        for batch, real in _batches(of_task, batch_size):
            mean, share = _batch_score(module, params, one, batch, lora_scale)
            loss += float(mean) * real
            exact += float(share) * batch_size - (batch_size - real)  # what fills up is right
        scores.append(Score(loss / len(of_task), exact / len(of_task)))
    return scores


def _batches(rows: Sequences, size: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """All rows in batches of one shape, each with the number of its real rows; those that fill up
    the last one have no labels."""
    width, length = (padded_length(n) for n in (rows.response_width, rows.ids.shape[1]))
    for first in range(0, len(rows), size):
        real = min(size, len(rows) - first)
        batch = rows.batch(np.minimum(first + np.arange(size), len(rows) - 1), width)
        missing = length - batch["ids"].shape[1]
        # Behind a row nothing is attended to, whatever stands there.
        batch["ids"] = np.pad(batch["ids"], ((0, 0), (0, missing)))
        batch["labels"][real:] = -1
        yield batch, real
