"""Greedy answers of the base LM in JAX."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.base.architecture import BaseLM, Lora


def make_greedy(module: BaseLM, max_new_tokens: int):
    """A jitted greedy decoder: (params, lora, lora_scale, ids (B, S), valid (B, S), ends (E,)) ->
    ids (B, max_new_tokens).

    Prompts are padded on the left. An answer ends with any of the tokens `ends`; those after it are
    the first of them.
    """

    def decode(params: Mapping, lora: Lora, lora_scale: float, ids, valid, ends):
        batch, length = ids.shape
        ids = jnp.concatenate([ids, jnp.full((batch, max_new_tokens), ends[0], ids.dtype)], axis=1)
        valid = jnp.concatenate([valid, jnp.zeros((batch, max_new_tokens), valid.dtype)], axis=1)

        def step(i, carry):
            ids, valid, done = carry
            hidden = module.apply({"params": params}, ids, lora, lora_scale, valid, method="hidden")
            last = jax.lax.dynamic_index_in_dim(hidden, length + i - 1, axis=1, keepdims=False)
            token = jnp.argmax(
                module.apply({"params": params}, last, method="head"), axis=-1
            ).astype(ids.dtype)
            token = jnp.where(done, ends[0], token)
            at = (0, length + i)
            ids = jax.lax.dynamic_update_slice(ids, token[:, None], at)
            valid = jax.lax.dynamic_update_slice(valid, jnp.ones((batch, 1), valid.dtype), at)
            return ids, valid, done | jnp.isin(token, ends)

        ids, _, _ = jax.lax.fori_loop(0, max_new_tokens, step, (ids, valid, jnp.zeros(batch, bool)))
        return ids[:, length:]

    return jax.jit(decode)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows of any length as (ids, valid), int32 (B, S), padded on the left."""
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad, np.int32)
    valid = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        valid[i, length - len(row) :] = 1
    return ids, valid
