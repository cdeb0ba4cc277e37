"""The loss of a base LLM on answers."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from dnd_jax.base.architecture import BaseLM, Lora


def answer_loss(
    module: BaseLM,
    params: Mapping,
    batch: Mapping,
    lora: Lora | None = None,
    lora_scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy over response tokens, share of responses whose every token is the most
    likely one).

    batch: {"ids" (B, S), "at" (B, R), "labels" (B, R)} of `Sequences.batch`, perhaps with "prefix"
    (P,).
    """
    rows = batch["ids"], lora, lora_scale, None, batch.get("prefix")
    hidden = module.apply({"params": params}, *rows, method="hidden")
    hidden = jnp.take_along_axis(hidden, batch["at"][..., None], axis=1)
    logits = module.apply({"params": params}, hidden, method="head")
    inside = batch["labels"] >= 0
    labels = jnp.maximum(batch["labels"], 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = jnp.all((jnp.argmax(logits, axis=-1) == labels) | ~inside, axis=-1)
    return jnp.sum(losses * inside) / jnp.sum(inside), jnp.mean(right)
