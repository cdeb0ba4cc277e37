"""A task ends M steps after its loss has flattened."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_jax.lora.task_step import FALL, Flattening


def end_of(losses: list[float], window: int, more: int) -> int:
    """In plain Python: the step after which a task takes no other."""
    sums = [sum(losses[i : i + window]) for i in range(0, len(losses), window)]
    for k in range(1, len(losses) // window):
        if sums[k] > (1 - FALL) * sums[k - 1] and (k + 1) * window + more < len(losses):
            return (k + 1) * window + more
    return len(losses)


def ended(rule: Flattening, losses: list[float]) -> int:
    def step(state, loss):
        return rule.after(state, loss), None

    return int(jax.lax.scan(step, rule.first(), jnp.asarray(losses, jnp.float32))[0]["end"])


@given(
    losses=st.lists(st.integers(1, 20).map(float), min_size=1, max_size=40),
    window=st.integers(1, 6),
    more=st.integers(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_the_rule_is_that_of_plain_python(losses, window, more):
    assert ended(Flattening(window, more, len(losses)), losses) == end_of(losses, window, more)


def test_a_falling_loss_takes_all_steps_and_a_level_one_does_not():
    falling = list(0.9 ** np.arange(60))
    assert ended(Flattening(5, 4, 60), falling) == 60
    assert ended(Flattening(5, 4, 60), falling[:20] + [falling[20]] * 40) == 30 + 4
