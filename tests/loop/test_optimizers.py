"""The optimizers of the three trainings: step, decay and clip of each, on arrays that are counted
by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dnd_jax.config.load import load_file
from dnd_jax.config.training import OPTIMIZERS
from dnd_jax.config.validate import freeze
from dnd_jax.loop.optimizers import (
    DIRECTIONS,
    base_optimizer,
    lora_optimizer,
    train_optimizer,
    warmup_cosine,
)

STEPS, RATE, DECAY = 20, 0.03, 0.5
SHAPES = {"matrix": (12, 10), "vector": (7,)}  # of which Adafactor factors the first


def sections(**changes):
    config = freeze(load_file("configs/default.py"))
    same = {"learning_rate": RATE, "weight_decay": DECAY} | changes
    steps = {"steps": STEPS, "warmup_steps": 4}
    return (
        dataclasses.replace(config.train, **same, **steps),
        dataclasses.replace(config.lora, **same),
        dataclasses.replace(config.pretrain, **same, **steps),
    )


def optimizers(**changes):
    """{name: (optimizer, learning rate of a step)}, every one that a training can have."""
    train, lora, base = sections(**changes)
    falling = warmup_cosine(RATE, 4, STEPS)
    every = {
        name: (train_optimizer(dataclasses.replace(train, optimizer=name)), falling)
        for name in OPTIMIZERS
    }
    return every | {
        "lora": (lora_optimizer(lora), lambda step: RATE),
        "base": (base_optimizer(base), falling),
    }


def run(optimizer, gradients):
    """Parameters that begin at 1, after every step."""
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(jax.device_get(params))
    return found


def test_every_allowed_optimizer_is_there():
    assert tuple(DIRECTIONS) == OPTIMIZERS


@pytest.mark.parametrize("name", optimizers())
def test_without_a_gradient_parameters_shrink_by_rate_times_decay(name):
    optimizer, rate = optimizers()[name]
    zero = {key: jnp.zeros(shape) for key, shape in SHAPES.items()}
    kept = np.cumprod([1 - float(rate(step)) * DECAY for step in range(STEPS)])
    assert 0.5 < kept[-1] < 0.9  # what is asked for shows
    for step, params in enumerate(run(optimizer, [zero] * STEPS)):
        for value in params.values():
            np.testing.assert_allclose(value, kept[step], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("name", optimizers())
def test_a_steady_gradient_moves_parameters_by_the_rate_against_it(name, size):
    """Whatever its size: steps are Adam's, after a clip that shortens all alike."""
    optimizer, rate = optimizers(weight_decay=0.0)[name]
    signs = {
        key: np.where(np.arange(np.prod(shape)).reshape(shape) % 3 > 0, 1.0, -1.0)
        for key, shape in SHAPES.items()
    }
    gradient = {key: jnp.float32(size * sign) for key, sign in signs.items()}
    moved = sum(float(rate(step)) for step in range(STEPS))
    for key, value in run(optimizer, [gradient] * STEPS)[-1].items():
        np.testing.assert_allclose(value, 1 - moved * signs[key], rtol=0, atol=0.02 * moved)


def test_the_rate_rises_and_falls_and_fits_short_runs():
    rates = [float(warmup_cosine(1.0, 4, 20)(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1])
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False)) and rates[20] < 1e-6
    assert float(warmup_cosine(1.0, 100, 1)(0)) == 1.0 and float(warmup_cosine(1.0, 0, 9)(0)) == 1.0
