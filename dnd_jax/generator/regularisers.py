"""What is added to a train step's loss, beyond the paper, so that generated LoRAs stay sane: the
size of BA, and agreement between two sets of prompts (docs/METHOD.md section 6).
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.config.training import Train
from dnd_jax.generator.answers import loras_of
from dnd_jax.lora.names import LORA_A, LORA_B
from dnd_jax.lora.targets import Target

NUMBERS = ("size", "size_loss", "wording_loss")  # that are written
UNTRAINED = 1e-3
SMALL = 1e-6  # of a squared ratio: a root has no gradient at 0, where lora_B may start


def squared_sizes(target: Target, tokens_KxTxHxW: jax.Array) -> dict[str, jax.Array]:
    """The squared Frobenius norm of BA of each module of K LoRAs: {module: (K,)}, or of all layers
    together, {module inside a layer: (K, layers)}. BA itself is never made."""
    loras, found = loras_of(target, tokens_KxTxHxW), {}
    for key in (key for key in loras if key.endswith(LORA_A)):
        module = key.removesuffix(LORA_A)
        a, b = loras[key], loras[module + LORA_B]
        of_a, of_b = a @ a.swapaxes(-1, -2), b.swapaxes(-1, -2) @ b  # (K, ..., r, r)
        found[module] = jnp.sum(of_a * of_b, (-2, -1))
    return found


def tuned_sizes(target: Target, checkpoints: Iterable[np.ndarray]) -> dict:
    """{"target", "sizes": of each module the mean norm of BA over LoRA checkpoints}, as a train
    step takes them; of each checkpoint its tokens (T, h, w), read one at a time. 0 for a module
    whose norm is less than UNTRAINED of all modules' mean: it has none to come near to.
    """
    norms = jax.jit(lambda target, tokens: jax.tree.map(jnp.sqrt, squared_sizes(target, tokens)))
    of_each = [jax.device_get(norms(target, tokens[None])) for tokens in checkpoints]
    means = jax.tree.map(lambda *found: np.mean(np.concatenate(found), 0), *of_each)
    least = UNTRAINED * np.mean(np.concatenate([x.ravel() for x in means.values()]))
    return {"target": target, "sizes": jax.tree.map(lambda x: x * (x > least), means)}


def regularised(
    config: Train, output_bxTxHxW: jax.Array, frozen: Mapping
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(what is added to the loss of each sample, numbers to be written), (b,) each.

    "size": the norm of BA by the checkpoints', in the mean over modules; "size_loss": the mean
    square of its distance from 1; "wording_loss": half the mean square of what differs between the
    tokens of two sets of prompts, of samples 2i and 2i + 1. frozen: with `tuned_sizes`.
    """
    output, found = output_bxTxHxW.astype(jnp.float32), {}
    added = jnp.zeros(len(output))
    if config.size_weight:
        squared, sizes = squared_sizes(frozen["target"], output), frozen["sizes"]
        modules = list(squared)
        squared_bxM = jnp.concatenate([squared[m].reshape(len(output), -1) for m in modules], 1)
        size_M = jnp.concatenate([jnp.ravel(sizes[m]) for m in modules])
        known = size_M > 0
        ratio = jnp.sqrt(squared_bxM / jnp.where(known, size_M, 1) ** 2 + SMALL)
        found["size"] = jnp.mean(ratio, 1, where=known)
        found["size_loss"] = jnp.mean((ratio - 1) ** 2, 1, where=known)
        added += config.size_weight * found["size_loss"]
    if config.wording_weight:
        pairs = output.reshape(-1, 2, *output.shape[1:])
        apart = jnp.mean((pairs[:, 0] - pairs[:, 1]) ** 2, (1, 2, 3)) / 2
        found["wording_loss"] = jnp.repeat(apart, 2)
        added += config.wording_weight * found["wording_loss"]
    return added, found
