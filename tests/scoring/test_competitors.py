"""The competitors: ridge regression against a known map and a brute-force refit, the nearest
dataset, the mean adapter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnd_jax.encoders.cache import mean_pooled
from dnd_jax.generator.nearest import nearest
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.targets import ElementTarget
from dnd_jax.scoring.competitors import RIDGE_STRENGTHS, Ridge, mean_weights, running_mean

SHAPES = {
    "model.layers.0.mlp.up_proj.lora_A.weight": (2, 6),
    "model.layers.0.mlp.up_proj.lora_B.weight": (9, 2),
}
CELLS = sum(rows * columns for rows, columns in SHAPES.values())


def as_tensors(vector: np.ndarray) -> dict[str, np.ndarray]:
    parts = np.split(vector, [12])
    return {
        key: part.reshape(shape).astype(np.float32)
        for (key, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def fitted(target, pooled, weights, batches) -> Ridge:
    return Ridge.fit(target, pooled, (weights[name] for name in pooled), batches)


def problem(
    seed: int,
    datasets: int,
    width: int,
    noise: float,
    draws: int = 3,
    chunk_width: int | None = None,
):
    """Datasets whose adapters are a linear map of their mean embedding, plus noise. Returns what
    `fitted` takes, and the map."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(datasets, width))
    linear = rng.normal(size=(width, CELLS)) * 0.02
    offset = rng.normal(size=CELLS) * 0.02
    vectors = means @ linear + offset + noise * rng.normal(size=(datasets, CELLS))
    adapters = {f"d{i}": as_tensors(v) for i, v in enumerate(vectors)}
    layout = LoraLayout.from_tensors(adapters["d0"], chunk_width)
    target = ElementTarget.fit(layout, lambda: adapters.items())
    spread = rng.normal(size=(datasets, 8, width)) * 0.3 * (noise > 0)
    spread -= spread.mean(axis=1, keepdims=True)
    pooled = {f"d{i}": m + s for i, (m, s) in enumerate(zip(means, spread, strict=True))}
    weights = {name: target.encode(tensors) for name, tensors in adapters.items()}
    batches = [[rng.permutation(8)[:4] for _ in range(draws)] for _ in range(datasets)]
    return (target, pooled, weights, batches), linear, offset


@pytest.mark.parametrize("chunk_width", [None, 4])
def test_ridge_recovers_a_linear_map(chunk_width):
    """chunk_width 4 does not divide 6 and 9: padded cells must not disturb the fit."""
    inputs, linear, offset = problem(seed=0, datasets=40, width=5, noise=0, chunk_width=chunk_width)
    ridge = fitted(*inputs)
    assert ridge.strength == min(RIDGE_STRENGTHS) and ridge.left_out_error < 1e-3
    unseen = np.random.default_rng(1).normal(size=(7, 5))
    expected = as_tensors(unseen.mean(axis=0) @ linear + offset)
    found = ridge.tensors(unseen)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=2e-3 * np.abs(value).max(), err_msg=key)


def brute_force(target, pooled, weights, batches, strength: float) -> float:
    """Left-out error by solving, without each dataset in turn, the ridge problem over the others'
    rows in its primal form."""
    rows = [
        [pooled[name][i].mean(axis=0) for i in draws]
        for name, draws in zip(pooled, batches, strict=True)
    ]
    everything = np.concatenate(rows)
    centre = everything.mean(axis=0)
    penalty = strength * np.mean(np.sum((everything - centre) ** 2, axis=1))
    answers = [weights[name].astype(np.float64).reshape(-1) for name in pooled]
    zero = np.mean(np.square(answers))
    error = 0.0
    for left in range(len(rows)):
        x = np.array([row - centre for i, draws in enumerate(rows) if i != left for row in draws])
        y = np.array([answers[i] for i, draws in enumerate(rows) if i != left for _ in draws])
        coefficients = np.linalg.inv(x.T @ x + penalty * np.eye(x.shape[1])) @ x.T @ y
        error += np.mean(
            [np.mean(((row - centre) @ coefficients - answers[left]) ** 2) for row in rows[left]]
        )
    return error / len(rows) / zero


@given(
    st.integers(0, 2**32 - 1),
    st.integers(3, 9),
    st.integers(1, 6),
    st.sampled_from([0.005, 0.02, 0.1]),
)
def test_ridge_strength_is_that_of_a_brute_force_refit(seed, datasets, width, noise):
    inputs, _, _ = problem(seed, datasets, width, noise)
    errors = {strength: brute_force(*inputs, strength) for strength in RIDGE_STRENGTHS}
    ridge = fitted(*inputs)
    assert ridge.left_out_error == pytest.approx(errors[ridge.strength], rel=1e-4)
    assert ridge.left_out_error <= min(errors.values()) * (1 + 1e-4)


@pytest.mark.parametrize("chunk_width", [None, 4])
def test_ridge_tokens_are_those_of_coefficients_written_out(chunk_width):
    """By the formula as it stands in books, in float64: prompts -> (C, cells) coefficients of all
    rows -> tokens."""
    (target, pooled, weights, batches), *_ = problem(
        seed=7, datasets=6, width=8, noise=0.02, chunk_width=chunk_width
    )
    ridge = fitted(target, pooled, weights, batches)
    x = np.stack(
        [
            pooled[name][i].mean(axis=0)
            for name, draws in zip(pooled, batches, strict=True)
            for i in draws
        ]
    )
    centre = x.mean(axis=0)
    answers = np.nan_to_num(
        np.stack([weights[name].astype(np.float64).reshape(-1) for name in pooled])
    )
    y = np.repeat(answers, [len(draws) for draws in batches], axis=0)
    gram = (x - centre) @ (x - centre).T
    penalty = ridge.strength * np.trace(gram) / len(gram)
    coefficients = (x - centre).T @ np.linalg.solve(gram + penalty * np.eye(len(gram)), y)
    unseen = np.random.default_rng(1).normal(size=(7, 8))
    expected = target.decode(((unseen.mean(axis=0) - centre) @ coefficients).reshape(target.shape))
    for key, value in ridge.tensors(unseen).items():
        np.testing.assert_allclose(
            value, expected[key], rtol=1e-5, atol=1e-6 * np.abs(expected[key]).max()
        )
    assert (
        ridge.shares.shape == (6, 8)
        and ridge.tokens.shape == (6, answers.shape[1])
        and ridge.tokens.dtype == np.float32
    )


def test_ridge_without_a_signal_predicts_the_mean():
    """Weights that have nothing to do with the prompts: a strong penalty wins, and the answer is
    about the mean adapter."""
    (target, pooled, weights, batches), *_ = problem(seed=3, datasets=6, width=8, noise=0.5)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=value.shape).astype(np.float32) for name, value in weights.items()
    }
    ridge = fitted(target, pooled, weights, batches)
    assert ridge.strength >= 100 and ridge.left_out_error >= 0.99
    mean, own = target.decode(np.zeros(target.shape, np.float32)), target.decode(weights["d0"])
    for key, value in ridge.tensors(pooled["d0"]).items():
        # Far closer to the mean than to the very weights that it was shown for these prompts.
        assert np.abs(value - mean[key]).max() < 0.2 * np.abs(own[key] - mean[key]).max()


def test_mean_pooled_leaves_padding_out():
    condition = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = [condition[0, :2].mean(axis=0), condition[1].mean(axis=0)]
    np.testing.assert_allclose(mean_pooled(condition, valid), expected, rtol=1e-6)


def test_nearest_compares_directions_from_the_centre():
    """All embeddings share a large component; by the plain cosine (and the plain distance) "far"
    would win."""
    common = np.array([10.0, 0.0, 0.0])
    means = {"far": [0.0, 0.1, 0.02], "same": [0.0, 0.2, 3.0], "opposite": [0.0, -0.3, -3.0]}
    datasets = {
        name: common + np.array([offset, offset]) + [[0, 0.01, 0], [0, -0.01, 0]]
        for name, offset in means.items()
    }
    prompts = common + np.array([[0.0, 0.1, 0.5], [0.0, 0.0, 0.5]])
    query = prompts.mean(axis=0)
    plain = {
        n: d.mean(axis=0) @ query / np.linalg.norm(d.mean(axis=0)) for n, d in datasets.items()
    }
    assert max(plain, key=plain.get) == "far"
    assert nearest(prompts, datasets) == "same"
    for name, pooled in datasets.items():
        assert nearest(pooled, datasets) == name


def test_running_mean():
    values = [np.random.default_rng(i).normal(size=(2, 3)).astype(np.float32) for i in range(50)]
    values[3][0, 1] = np.nan
    mean = running_mean(iter(values))
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, np.mean(values, axis=0), rtol=1e-5, atol=1e-7)


def test_mean_weights():
    rng = np.random.default_rng(0)
    adapters = [
        {
            "a": rng.normal(size=(2, 3)).astype(np.float32),
            "b": rng.normal(size=4).astype(np.float32),
        }
        for _ in range(5)
    ]
    mean = mean_weights(iter(adapters))
    assert mean.keys() == {"a", "b"}
    for key, value in mean.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(
            value, np.mean([a[key] for a in adapters], axis=0), rtol=1e-5, atol=1e-7
        )
