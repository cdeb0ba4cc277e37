"""Tokens that all rows share are computed once; nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest

from dnd_jax.base.architecture import BaseLM, LmConfig
from dnd_jax.base.loss import answer_loss
from dnd_jax.base.sequences import Sequences

CONFIG = LmConfig(50, 32, 48, 3, 4, 2, windows=())


def rows(shared: int, count: int = 6) -> Sequences:
    """Rows of 10 to 20 tokens, the first so many the same in all; answers of 1 to 4."""
    rng = np.random.default_rng(shared)
    ids = rng.integers(1, 50, (count, 20)).astype(np.int32)
    ids[:, :shared] = ids[0, :shared]
    if shared < 20:
        ids[0, shared] = 0  # no other row has it
    end = rng.integers(14, 21, count).astype(np.int32)
    return Sequences(ids, end - rng.integers(1, 5, count).astype(np.int32), end)


@pytest.mark.parametrize("shared, windows", [(1, (None, 4, 4)), (5, (7, 7, 7)), (9, ())])
def test_loss_and_gradient_are_those_of_whole_rows(shared, windows):
    data = rows(shared)
    assert data.prefix == shared
    module = BaseLM(dataclasses.replace(CONFIG, windows=windows))
    params = module.init(jax.random.key(0), data.ids)["params"]
    shapes = CONFIG.lora_shapes(2, ("q_proj", "v_proj", "down_proj"))
    keys = jax.random.split(jax.random.key(1), len(shapes))
    lora = {
        n: jax.random.normal(k, s) * 0.1 for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }

    def found(prefix):
        batch = data.batch(np.arange(len(data)), data.response_width, prefix)
        assert batch["ids"].shape[1] <= 20 - prefix
        both = jax.value_and_grad(
            lambda x: answer_loss(module, params, batch, x, 2.0), has_aux=True
        )
        return jax.jit(both)(lora)

    for prefix in {1, shared}:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
            found(prefix),
            found(0),
        )


def test_the_token_before_an_answer_is_not_shared():
    """Its state predicts the answer's first token, in each row's own batch."""
    ids = np.full((2, 8), 7, np.int32)
    data = Sequences(ids, np.array([3, 5], np.int32), np.array([4, 8], np.int32))
    assert data.prefix == 2
    assert data.batch(np.arange(2), 3, 2)["at"].min() == 0


def test_a_single_row_shares_all_of_its_prompt():
    data = Sequences(np.arange(9)[None], np.array([6], np.int32), np.array([9], np.int32))
    assert data.prefix == 5


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 8), (8, 8), (9, 16), (45, 48), (64, 64), (65, 80), (100, 112), (129, 160)],
)
def test_rows_are_padded_to_one_of_a_few_lengths(tokens, length):
    ids = np.zeros((1, 400), np.int32)
    data = Sequences(ids, np.array([tokens - 1], np.int32), np.array([tokens], np.int32))
    assert data.batch(np.array([0]), 1)["ids"].shape == (1, length)
