"""Scores of LoRAs on rows: those of each row by itself, whatever fills up the batches."""

import jax
import numpy as np
import pytest

from dnd_jax.base.architecture import BaseLM, LmConfig
from dnd_jax.base.loss import answer_loss
from dnd_jax.base.sequences import Sequences
from dnd_jax.lora import scores
from dnd_jax.lora.scores import score_loras

CONFIG = LmConfig(3, 16, 24, 2, 2, 1)


def rows_of(rng, count: int, prompt: int, response: int) -> Sequences:
    """Rows of random lengths; of three tokens, so that some answers are right."""
    start = rng.integers(1, prompt, count).astype(np.int32)
    end = start + rng.integers(1, response, count).astype(np.int32)
    return Sequences(
        rng.integers(0, CONFIG.vocab_size, (count, end.max())).astype(np.int32), start, end
    )


@pytest.fixture(scope="module")
def base():
    module = BaseLM(CONFIG)
    ids = np.zeros((1, 4), np.int32)
    return module, module.init(jax.random.key(0), ids)["params"]


def test_scores_are_those_of_each_row(base):
    module, params = base
    rng = np.random.default_rng(0)
    tasks = [rows_of(rng, 5, 6, 3), rows_of(rng, 2, 15, 2), rows_of(rng, 1, 3, 4)]
    lora = {
        name: rng.standard_normal((3, *shape), np.float32)
        for name, shape in CONFIG.lora_shapes(2, ("q_proj", "v_proj")).items()
    }
    found = score_loras(module, params, lora, 0.5, tasks, 4)
    for k, (task, score) in enumerate(zip(tasks, found, strict=True)):
        one = {name: value[k] for name, value in lora.items()}
        loss_of = jax.jit(lambda batch, one=one: answer_loss(module, params, batch, one, 0.5))
        right = [loss_of(task.batch(np.array([i]), 4))[1] for i in range(len(task))]
        np.testing.assert_allclose(score.exact, np.mean(right), atol=1e-6)
        parts = np.split(np.arange(len(task)), range(4, len(task), 4))
        losses = [loss_of(task.batch(p, 4))[0] for p in parts]
        expected = np.average(losses, weights=[len(p) for p in parts])
        np.testing.assert_allclose(score.loss, expected, rtol=1e-5)
    assert 0 < np.mean([score.exact for score in found]) < 1


def test_tasks_of_about_a_length_have_one_program(base):
    module, params = base
    rng = np.random.default_rng(1)
    tasks = [rows_of(rng, count, 5, 3) for count in range(2, 8)]
    lora = {
        name: np.zeros((len(tasks), *shape), np.float32)
        for name, shape in CONFIG.lora_shapes(2, ("q_proj",)).items()
    }
    before = scores._batch_score._cache_size()
    score_loras(module, params, lora, 1.0, tasks, 4)
    assert scores._batch_score._cache_size() == before + 1
