"""Rows one behind the other with no padding between, and tokens that all share computed once, give
the loss and gradient of rows padded to the longest."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_jax.base.architecture import BaseLM, LmConfig
from dnd_jax.base.attention import Packed
from dnd_jax.base.loss import answer_loss, distillation_loss
from dnd_jax.base.sequences import Sequences, packed_rows, padded_length

CONFIG = LmConfig(50, 32, 48, 3, 4, 2, windows=())
ROWS = 6


def rows(shared: int, count: int = ROWS, seed: int = 0) -> Sequences:
    """Rows of 10 to 20 tokens, the first so many the same in all; answers of 1 to 4."""
    rng = np.random.default_rng([shared, seed])
    ids = rng.integers(1, 50, (count, 20)).astype(np.int32)
    ids[:, :shared] = ids[0, :shared]
    if shared < 20:
        ids[0, shared] = 0  # no other row has it
    end = rng.integers(14, 21, count).astype(np.int32)
    return Sequences(ids, end - rng.integers(1, 5, count).astype(np.int32), end)


def of_task(batch: dict[str, np.ndarray], k: int = 0) -> dict[str, np.ndarray]:
    return {key: value[k] for key, value in batch.items()}


def some_lora(seed: int) -> dict[str, jax.Array]:
    shapes = CONFIG.lora_shapes(2, ("q_proj", "v_proj", "down_proj"))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    pairs = zip(keys, shapes.items(), strict=True)
    return {name: jax.random.normal(key, shape) * 0.1 for key, (name, shape) in pairs}


@pytest.mark.parametrize("shared, windows", [(1, (None, 4, 4)), (5, (7, 7, 7)), (9, ())])
def test_loss_and_gradient_are_those_of_whole_rows(shared, windows):
    """Beside another task, whose rows are more tokens."""
    data, longer = rows(shared), rows(shared)
    longer = Sequences(longer.ids, longer.start - longer.end + 20, np.full(ROWS, 20, np.int32))
    assert data.prefix == shared
    module = BaseLM(dataclasses.replace(CONFIG, windows=windows))
    params = module.init(jax.random.key(0), data.ids)["params"]
    lora, index = some_lora(1), np.arange(ROWS)

    def found(batch, loss=answer_loss, *more):
        both = jax.value_and_grad(lambda x: loss(module, params, batch, x, *more), has_aux=True)
        return jax.jit(both)(lora)

    def same(a, b):
        assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(b[1]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), a, b)

    whole = data.batch(index, data.response_width)
    for prefix in (0, 1, shared):
        packed = of_task(packed_rows([data, longer], [index, index], prefix, 49))
        assert packed["ids"].size > (data.end - 1 - prefix).sum()  # something fills up
        same(found(packed, answer_loss, 2.0), found(whole, answer_loss, 2.0))
        teacher = some_lora(2), 2.0
        same(found(packed, distillation_loss, *teacher), found(whole, distillation_loss, *teacher))


def test_the_share_of_right_responses_is_that_of_whole_rows():
    """Where some rows are right, with all of their tokens."""
    data, module = rows(2), BaseLM(CONFIG)
    params = module.init(jax.random.key(0), data.ids)["params"]
    index = np.arange(ROWS)
    for row, wrong in ((1, False), (3, True), (4, False)):  # row 3 in its first token alone
        for j in range(data.start[row], data.end[row]):
            logits = module.apply({"params": params}, data.ids[row : row + 1])
            data.ids[row, j] = (np.argmax(logits[0, j - 1]) + (wrong and j == data.start[row])) % 50
    packed = of_task(packed_rows([data], [index], 2, 0))
    for batch in (packed, data.batch(index, data.response_width)):
        assert answer_loss(module, params, batch)[1] == pytest.approx(2 / ROWS)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_token_but_a_rows_last_is_there_once(given):
    """And stands where the two tables say, whichever rows of whichever tasks are drawn."""
    count, prefix = given.draw(st.integers(1, 7)), given.draw(st.integers(0, 3))
    tasks = [rows(prefix, 5, seed) for seed in range(given.draw(st.integers(1, 3)))]
    draw = st.lists(st.integers(0, 4), min_size=count, max_size=count)
    index = [np.array(given.draw(draw)) for _ in tasks]
    batch = packed_rows(tasks, index, prefix, 7)
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
    for k, (task, drawn) in enumerate(zip(tasks, index, strict=True)):
        one = of_task(batch, k)
        table = Packed(one["token"], one["place"])
        padded = np.asarray(table.unpacked(one["ids"] + 1)) - 1  # -1: nothing
        total, labels = 0, []
        for row, i in zip(padded, drawn, strict=True):
            wanted = task.ids[i, prefix : task.end[i] - 1]
            np.testing.assert_array_equal(row[: len(wanted)], wanted)
            assert (row[len(wanted) :] == -1).all()
            total += len(wanted)
            labels += task.ids[i, task.start[i] : task.end[i]].tolist()
        np.testing.assert_array_equal(table.packed(padded)[:total], one["ids"][:total])
        assert (one["ids"][total:] == 7).all() and (
            np.asarray(table.packed(padded))[total:] == 0
        ).all()
        inside = one["labels"] >= 0
        assert one["labels"][inside].tolist() == labels and not inside[len(labels) :].any()
        after = np.pad(padded[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        after = np.asarray(table.packed(after))[one["at"][inside]]
        # What follows a token that predicts is its label, unless that was left out.
        assert all(a in (b, -1) for a, b in zip(after, labels, strict=True))


def test_the_token_before_an_answer_is_not_shared():
    """Its state predicts the answer's first token, in each row's own batch."""
    ids = np.full((2, 8), 7, np.int32)
    data = Sequences(ids, np.array([3, 5], np.int32), np.array([4, 8], np.int32))
    assert data.prefix == 2
    packed = of_task(packed_rows([data], [np.arange(2)], 2, 0))
    assert packed["at"][packed["labels"] >= 0].tolist() == [0, 3, 4, 5]


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


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_lengths_of_so_many_steps_an_octave(steps):
    lengths = [padded_length(tokens, steps) for tokens in range(1, 1025)]
    assert all(found >= tokens for tokens, found in enumerate(lengths, 1))
    assert len({n for n in lengths if 512 < n <= 1024}) == steps
    assert not any(n % 8 for n in lengths)
