"""The optimizers of all trainings."""

import jax.numpy as jnp
import optax

from dnd_jax.config import schema


def make_optimizer(config: schema.Train) -> optax.GradientTransformation:
    """AdamW (docs/METHOD.md section 6) or Adafactor on everything, global-norm clip, linear
    warm-up, cosine to 0."""
    warmup = min(config.warmup_steps, config.steps - 1)
    start = 0.0 if warmup else config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(start, config.learning_rate, warmup, config.steps)
    if config.optimizer == "adafactor":
        # Steps of Adam's size: neither scaled by the parameters' own size nor clipped a second
        # time.
        inner = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,
            clipping_threshold=None,
            min_dim_size_to_factor=8,
            weight_decay_rate=config.weight_decay,
        )
    else:
        moment = jnp.bfloat16 if config.optimizer == "adamw_bfloat16_moment" else None
        inner = optax.adamw(schedule, weight_decay=config.weight_decay, mu_dtype=moment)
    return optax.chain(optax.clip_by_global_norm(config.clip), inner)
