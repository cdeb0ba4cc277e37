"""The encoder of T5 (relu) and T5 v1.1, mT5 (gated gelu), dropout off. Source: Raffel et al. 2020,
arXiv 1910.10683.

Attention has no scale and no absolute positions: a learnt bias for each head and bucket of
distances, shared by all layers.
"""

import dataclasses
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dnd_jax.base.architecture import RMSNorm
from dnd_jax.base.names import Table, by_prefix

SHARED = "shared.weight"


def t5_table(layers: int, gated: bool) -> Table:
    """(stored name, our path, transposed) of every parameter of T5's encoder, whose first block
    holds the position bias of all."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    table = [
        (SHARED, "word_embeddings/embedding", False),
        (f"{attention}.relative_attention_bias.weight", "relative_bias", False),
        ("encoder.final_layer_norm.weight", "norm/scale", False),
    ]
    attend = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}
    feed = ({"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}) | {"wo": "down"}
    for i in range(layers):
        theirs, ours = f"encoder.block.{i}.layer", f"layer_{i}"
        table += [
            (f"{theirs}.0.SelfAttention.{a}.weight", f"{ours}/{b}/kernel", True)
            for a, b in attend.items()
        ]
        table += [
            (f"{theirs}.1.DenseReluDense.{a}.weight", f"{ours}/{b}/kernel", True)
            for a, b in feed.items()
        ]
        table.append((f"{theirs}.0.layer_norm.weight", f"{ours}/attention_norm/scale", False))
        table.append((f"{theirs}.1.layer_norm.weight", f"{ours}/output_norm/scale", False))
    return table


def t5_names(stored: Collection[str], layers: int, gated: bool) -> dict[str, str]:
    """{stored name: the table's}, without decoder and head, which are not used. The encoder's own
    table of embeddings, where it is stored, counts and not the shared one."""
    wanted = {theirs for theirs, _, _ in t5_table(layers, gated)}
    names = {name: by_prefix(name, wanted, "transformer") for name in stored}
    names = {a: b for a, b in names.items() if not b.startswith(("decoder.", "lm_head."))}
    own = [name for name in names if name.endswith("encoder.embed_tokens.weight")]
    if own:
        names = {a: b for a, b in names.items() if b != SHARED} | dict.fromkeys(own, SHARED)
    return names


WINDOW = 512  # docs/METHOD.md section 4; also the length that T5 was trained with
FEED_FORWARDS = ("relu", "gated-gelu")
RULES = (  # as those of base/architecture.py
    (r"(query|key|value|up|gate)/kernel$", ("fsdp", "tensor")),
    (r"(attention_output|down)/kernel$", ("tensor", "fsdp")),
    (r"word_embeddings/embedding$", (None, "fsdp")),
    (r"relative_bias$", ()),
    (r"norm/scale$", ()),
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of a Hugging Face T5 config.json that shape the encoder's computation."""

    vocab_size: int
    d_model: int  # C
    d_kv: int  # a head's width
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies gelu(gate) with up, instead of relu(up)."""
        return self.feed_forward_proj == "gated-gelu"


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance key - query from 1 - length to length - 1, int32 (2 * length -
    1,).

    Half of the buckets are for keys after the query. Of each half, half are for one distance each
    and the others grow logarithmically up to max_distance. In float32 as PyTorch does: at a
    boundary the rounding decides.
    """
    distance = np.arange(1 - length, length)
    half = buckets // 2
    exact = half // 2
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / exact) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (far * np.float32(half - exact)).astype(np.int32), half - 1)
    return np.where(distance > 0, half, 0).astype(np.int32) + np.where(
        np.abs(distance) < exact, np.abs(distance), far
    )


class T5Layer(nn.Module):
    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxLxC: jax.Array, bias_BxHxLxL: jax.Array) -> jax.Array:
        c = self.config
        batch, length, width = x_BxLxC.shape

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        x = RMSNorm(c.layer_norm_epsilon, self.dtype, name="attention_norm")(x_BxLxC)
        names = ("query", "key", "value")
        q, k, v = (
            dense(name, c.num_heads * c.d_kv)(x).reshape(batch, length, c.num_heads, c.d_kv)
            for name in names
        )
        scores = jnp.einsum("bshe,bthe->bhst", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias_BxHxLxL, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bhst,bthe->bshe", weights, v).reshape(batch, length, -1)
        x = x_BxLxC + dense("attention_output", width)(attended)

        y = RMSNorm(c.layer_norm_epsilon, self.dtype, name="output_norm")(x)
        up = dense("up", c.d_ff)(y)
        inner = nn.gelu(dense("gate", c.d_ff)(y), approximate=True) * up if c.gated else nn.relu(up)
        return x + dense("down", width)(inner)


class T5Encoder(nn.Module):
    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @property
    def width(self) -> int:
        """C of the hidden states."""
        return self.config.d_model

    @property
    def window(self) -> int:
        """The longest L."""
        return WINDOW

    @nn.compact
    def __call__(self, ids_BxL: jax.Array, valid_BxL: jax.Array) -> jax.Array:
        """valid_BxL is 1 at real tokens. Returns the last hidden states (B, L, C), padding
        positions included."""
        c = self.config
        length = ids_BxL.shape[1]
        init = nn.initializers.normal(0.02)
        x = nn.Embed(
            c.vocab_size, c.d_model, embedding_init=init, dtype=self.dtype, name="word_embeddings"
        )(ids_BxL)
        table = self.param("relative_bias", init, (c.relative_attention_num_buckets, c.num_heads))
        by_distance = table[
            distance_buckets(
                length, c.relative_attention_num_buckets, c.relative_attention_max_distance
            )
        ]
        place = jnp.arange(length)
        bias_LxLxH = by_distance[place[None, :] - place[:, None] + length - 1]
        hidden = jnp.where(valid_BxL > 0, 0.0, jnp.finfo(jnp.float32).min)
        bias = bias_LxLxH.transpose(2, 0, 1)[None] + hidden[:, None, None, :]
        for i in range(c.num_layers):
            x = T5Layer(c, self.dtype, name=f"layer_{i}")(x, bias)
        return RMSNorm(c.layer_norm_epsilon, self.dtype, name="norm")(x)
