"""The losses of a base LLM with a LoRA: on answers, and against the same base with another LoRA."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from dnd_jax.base.architecture import BaseLM, Lora
from dnd_jax.base.attention import Packed


def answer_loss(
    module: BaseLM,
    params: Mapping,
    batch: Mapping,
    lora: Lora | None = None,
    lora_scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy over response tokens, share of responses whose every token is the most
    likely one).

    batch: {"ids" (B, S), "at" (B, R), "labels" (B, R)} of `Sequences.batch`, or one task's of
    `packed_rows`.
    """
    logits = _logits(module, params, batch, lora, lora_scale)
    labels = jnp.maximum(batch["labels"], 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _mean_inside(losses, batch), _right(logits, batch)


def distillation_loss(
    module: BaseLM,
    params: Mapping,
    batch: Mapping,
    lora: Lora,
    teacher: Lora | None,
    lora_scale: float = 1.0,
    shown: Mapping | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(mean Kullback-Leibler divergence over response tokens, of what the base with `lora` expects
    there from what it expects with `teacher` or none, which has no gradient; the second as of
    `answer_loss`). Both have read the right answer so far. shown: a batch of the same responses
    behind other prompts, which the teacher reads in place of the batch."""
    logits = _logits(module, params, batch, lora, lora_scale)
    read = batch if shown is None else shown
    wanted = _logits(module, params, read, jax.lax.stop_gradient(teacher), lora_scale)
    divergences = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits), jax.nn.log_softmax(wanted)
    )
    return _mean_inside(divergences, batch), _right(logits, batch)


def _logits(
    module: BaseLM, params: Mapping, batch: Mapping, lora: Lora | None, lora_scale: float
) -> jax.Array:
    """(B, R, V) at the positions that predict the responses; packed, (R, V)."""
    params, at = {"params": params}, batch["at"]
    if rows := _packed(batch):
        given = batch["ids"], rows, batch["prefix"], lora, lora_scale
        hidden = module.apply(params, *given, method="hidden_packed")[at]
    else:
        hidden = module.apply(params, batch["ids"], lora, lora_scale, method="hidden")
        hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return module.apply(params, hidden, method="head")


def _packed(batch: Mapping) -> Packed | None:
    """Where the tokens of a packed batch stand."""
    return Packed(batch["token"], batch["place"]) if "token" in batch else None


def _mean_inside(values_BxR: jax.Array, batch: Mapping) -> jax.Array:
    """The mean over response tokens."""
    inside = batch["labels"] >= 0
    return jnp.sum(values_BxR * inside) / jnp.sum(inside)


def _right(logits: jax.Array, batch: Mapping) -> jax.Array:
    """The share of responses whose every token is the most likely one."""
    labels = batch["labels"]
    right = (jnp.argmax(logits, axis=-1) == labels) | (labels < 0)
    if rows := _packed(batch):
        count, length = rows.token_BxS.shape
        row = rows.place_N[batch["at"]] // length  # of each token that predicts
        right = right | (row != jnp.arange(count)[:, None])  # (B, R)
    return jnp.mean(jnp.all(right, axis=-1))
