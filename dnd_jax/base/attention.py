"""Attention of the base LM: where tokens stand, and which of them see each other.

Letters: B batch, S sequence, T keys, H heads, K key-value heads, G = H / K, E head width, P tokens
of a prefix that all rows share, N tokens of rows without padding.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts; the fields of a config.json's
    rope_parameters."""

    # "linear": all divided by factor; "llama3": only those of long waves, with a smooth passage
    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rotary_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Radians a position of each pair of channels of a head, float32 (width / 2,)."""
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency
    slow = frequency / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    # Llama 3: how many of a channel's waves fit into the original context decides; between the two
    # bounds, a linear mix.
    waves = scaling.original_max_position_embeddings * frequency / (2 * jnp.pi)
    keep = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0, 1)
    return keep * frequency + (1 - keep) * slow


def rotate(x: jax.Array, positions: jax.Array, frequency: jax.Array) -> jax.Array:
    """Rotary position embedding of (..., H, E) at positions (...), halves convention, angles in
    float32."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


Window = int | jax.Array | None  # tokens that a query sees, itself included; None: all


def causal_mask(
    length: int, window: Window, valid_BxS: jax.Array | None = None, before: int = 0
) -> jax.Array:
    """bool (B or 1, S, before + S): whether a query (second axis) sees a key (last axis). It sees
    real tokens up to its own position, the first of which stand before all queries; with a window,
    the last `window` of them."""
    behind = before + jnp.arange(length)[:, None] - jnp.arange(before + length)
    mask = (behind >= 0)[None]
    if window is not None:
        mask = mask & (behind < window)
    return mask if valid_BxS is None else mask & valid_BxS[:, None, :].astype(bool)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q (B, S, K, G, E), k and v (B, T, K, E), mask (B or 1, S, T) -> (B, S, K * G * E); softmax in
    float32."""
    # Heads before positions, which makes plain products of matrices of both.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkgse,bkte->bkgst", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    found = jnp.einsum("bkgst,bkte->bkgse", weights, v).transpose(0, 3, 1, 2, 4)
    return found.reshape(*found.shape[:2], -1)


# (q (..., K, G, E), k (..., K, E), v (..., K, E), window) -> (..., K * G * E)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Window], jax.Array]


def in_rows(valid_BxS: jax.Array | None = None) -> Attend:
    """Attention of rows (B, S), each within itself."""

    def attend(q, k, v, window):
        return attention(q, k, v, causal_mask(q.shape[1], window, valid_BxS))

    return attend


class Packed(NamedTuple):
    """Where the tokens of B rows stand that lie one behind the other, with no padding between."""

    token_BxS: jax.Array  # which of them a row has at a position; N where it has none
    place_N: jax.Array  # the same the other way round: row * S + position; B * S of what fills up

    def positions(self) -> jax.Array:
        """(N,) within the rows."""
        return self.place_N % self.token_BxS.shape[1]

    def unpacked(self, x: jax.Array) -> jax.Array:
        """(N, ...) -> (B, S, ...)."""
        found = _moved(x, self.token_BxS.ravel(), self.place_N)
        return found.reshape(*self.token_BxS.shape, *x.shape[1:])

    def packed(self, x: jax.Array) -> jax.Array:
        """(B, S, ...) -> (N, ...)."""
        x = x.reshape(-1, *x.shape[2:])
        return _moved(x, self.place_N, self.token_BxS.ravel())


@jax.custom_vjp
def _moved(x: jax.Array, of: jax.Array, back: jax.Array) -> jax.Array:
    """x[of], zeros beyond its end, where x = _moved(x, of, back)[back]: so the gradient is read as
    well, instead of added up."""
    return jnp.take(x, of, axis=0, mode="fill", fill_value=0)


_moved.defvjp(
    lambda x, of, back: (_moved(x, of, back), (of, back)),
    lambda indices, g: (_moved(g, *reversed(indices)), None, None),
)


def in_packed(rows: Packed, prefix: int = 0) -> Attend:
    """Attention of packed tokens (P + N): a prefix within itself, each row to it and within
    itself."""

    def attend(q, k, v, window):
        batch = len(rows.token_BxS)

        def whole(x):  # keys or values -> (B, P + S, ...)
            shared = jnp.broadcast_to(x[:prefix], (batch, *x[:prefix].shape))
            return jnp.concatenate([shared, rows.unpacked(x[prefix:])], axis=1)

        mask = causal_mask(rows.token_BxS.shape[1], window, before=prefix)
        own = rows.packed(attention(rows.unpacked(q[prefix:]), whole(k), whole(v), mask))
        if not prefix:
            return own
        first = (x[None, :prefix] for x in (q, k, v))
        return jnp.concatenate([attention(*first, causal_mask(prefix, window))[0], own])

    return attend
