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
    step takes them; of each checkpoint its tokens (T, h, w), read one at a time. No module's is 0.
    """
    norms = jax.jit(lambda target, tokens: jax.tree.map(jnp.sqrt, squared_sizes(target, tokens)))
    of_each = [jax.device_get(norms(target, tokens[None])) for tokens in checkpoints]
    means = jax.tree.map(lambda *found: np.mean(np.concatenate(found), 0), *of_each)
    least = np.finfo(np.float32).tiny ** 0.5
    return {"target": target, "sizes": jax.tree.map(lambda x: np.maximum(x, least), means)}


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
        ratios = [
            jnp.sqrt(squared / frozen["sizes"][module] ** 2 + SMALL).reshape(len(output), -1)
            for module, squared in squared_sizes(frozen["target"], output).items()
        ]
        ratio = jnp.concatenate(ratios, axis=1)  # (b, modules)
        found["size"] = jnp.mean(ratio, 1)
        found["size_loss"] = jnp.mean((ratio - 1) ** 2, 1)
        added += config.size_weight * found["size_loss"]
    if config.wording_weight:
        pairs = output.reshape(-1, 2, *output.shape[1:])
        apart = jnp.mean((pairs[:, 0] - pairs[:, 1]) ** 2, (1, 2, 3)) / 2
        found["wording_loss"] = jnp.repeat(apart, 2)
        added += config.wording_weight * found["wording_loss"]
    return added, found
