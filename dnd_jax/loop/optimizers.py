"""The optimizers of all trainings.

A new one is an entry of `DIRECTIONS` and its name in config.training.OPTIMIZERS. All share the
order: clip the gradient, turn it into a direction, add the weight decay, multiply both by the
learning rate. Decay is therefore decoupled, as AdamW's: without a gradient a step leaves 1 - rate x
decay of a parameter.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import optax

from dnd_jax.config import schema

# Gradient -> direction of a step, about 1 a parameter whatever the gradient's size.
DIRECTIONS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adamw_bfloat16_moment": functools.partial(optax.scale_by_adam, mu_dtype=jnp.bfloat16),
    # Adafactor's second moments alone. Its other parts, steps in proportion to the parameter's own
    # size and a second clipping, would make steps of another size than Adam's.
    "adafactor": functools.partial(optax.scale_by_factored_rms, min_dim_size_to_factor=8),
}


def make_optimizer(
    learning_rate: float | optax.Schedule,
    weight_decay: float,
    clip: float,
    direction: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """clip: of the gradient's global norm. direction: made by one of `DIRECTIONS`."""
    rule = optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.chain(optax.clip_by_global_norm(clip), rule)


def warmup_cosine(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, of fewer steps than there are, then a cosine down to 0."""
    warmup = min(warmup_steps, steps - 1)
    start = 0.0 if warmup else learning_rate
    return optax.warmup_cosine_decay_schedule(start, learning_rate, warmup, steps)


def train_optimizer(config: schema.Train) -> optax.GradientTransformation:
    """The generator's (docs/METHOD.md section 6)."""
    schedule = warmup_cosine(config.learning_rate, config.warmup_steps, config.steps)
    direction = DIRECTIONS[config.optimizer]()
    return make_optimizer(schedule, config.weight_decay, config.clip, direction)


def lora_optimizer(config: schema.Lora) -> optax.GradientTransformation:
    """The LoRAs': a constant rate, since checkpoints are taken until the last step."""
    return make_optimizer(
        config.learning_rate, config.weight_decay, config.clip, DIRECTIONS["adamw"]()
    )


def base_optimizer(config: schema.Pretrain) -> optax.GradientTransformation:
    """A small base's from scratch: a shorter memory of second moments, as its loss falls fast."""
    schedule = warmup_cosine(config.learning_rate, config.warmup_steps, config.steps)
    return make_optimizer(schedule, config.weight_decay, 1.0, DIRECTIONS["adamw"](b2=0.98))
