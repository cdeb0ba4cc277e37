"""The frozen base LLM: the Qwen2, Qwen3, Llama and Mistral architectures with LoRA on any of their
seven projections.

    module = BaseLM(config)
    logits = module.apply({"params": params}, tokens_BxS, lora=tensors, lora_scale=alpha / rank)

`lora` is a flat dict under PEFT's keys without its prefix:
"model.layers.0.self_attn.q_proj.lora_A.weight" (r, d_in), "...lora_B.weight" (d_out, r), or stacked
as base/layers.py says; projections without an entry stay as they are. Letters: B batch, S sequence,
D hidden, F feed-forward, H heads, K key-value heads, G = H / K, E head width, V vocabulary, P
tokens of a prefix that all rows share, N tokens of rows without padding.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from dnd_jax.base.attention import (
    Attend,
    Packed,
    RopeScaling,
    Window,
    in_packed,
    in_rows,
    rotary_frequencies,
    rotate,
)
from dnd_jax.base.gathering import gathered_dot, whole
from dnd_jax.base.layers import PRODUCT, through
from dnd_jax.config import schema
from dnd_jax.core.errors import InputError

Lora = Mapping[str, jax.Array]
# Megatron's layout: heads and the feed-forward's inner axis over "tensor", the other axis over
# "fsdp"; what layers have is stacked, its first axis over them. Vocabularies rarely divide (a
# tokenizer trained here has any size), so the two big tables are cut along D alone.
RULES = (
    (r"(q|k|v|gate|up)_proj/dense/kernel$", (None, "fsdp", "tensor")),
    (r"(q|k|v|gate|up)_proj/dense/bias$", (None, "tensor")),
    (r"(o|down)_proj/dense/kernel$", (None, "tensor", "fsdp")),
    (r"(o|down)_proj/dense/bias$", ()),
    (r"embed_tokens/embedding$", (None, "fsdp")),
    (r"lm_head/kernel$", ("fsdp", None)),
    (r"norm/scale$", ()),
)
# Initialisation by fan-in (embeddings by their width): at small widths the usual 0.02 learns facts
# several times more slowly.
FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class LmConfig:
    """The fields of a Hugging Face config.json that shape the computation, and what its model_type
    implies (the last six)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_scaling: RopeScaling | None = None
    model_type: str = "qwen2"
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normed head by head
    # Each layer's sliding attention window; (): all layers attend to everything before.
    windows: tuple[int | None, ...] = ()

    @property
    def head_width(self) -> int:
        """E."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def __post_init__(self):
        sizes = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        small = [f"{name} {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if small:
            raise InputError(f"base: {', '.join(small)} must be at least 1")
        uneven = self.head_dim is None and self.hidden_size % self.num_attention_heads
        if uneven or self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"base: {self.num_attention_heads} heads must divide hidden_size "
                f"{self.hidden_size} and be a multiple of "
                f"{self.num_key_value_heads} key-value heads"
            )
        width = self.head_width if self.head_dim is None else self.head_dim
        if width < 1 or width % 2:
            raise InputError(
                f"base: heads of {width} channels cannot be rotated by position, which takes pairs "
                "of them; give an even head_dim"
            )

    def projections(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each LoRA-able projection, by its path inside a layer."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = (
            self.num_attention_heads * self.head_width,
            self.num_key_value_heads * self.head_width,
        )
        return {
            "self_attn.q_proj": (d, q),
            "self_attn.k_proj": (d, kv),
            "self_attn.v_proj": (d, kv),
            "self_attn.o_proj": (q, d),
            "mlp.up_proj": (d, f),
            "mlp.gate_proj": (d, f),
            "mlp.down_proj": (f, d),
        }

    def lora_shapes(self, rank: int, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """Shapes of a LoRA's tensors on the named projections ("q_proj", ...) of every layer.
        Raises InputError if unknown."""
        projections = self.projections()
        unknown = set(targets) - {path.split(".")[1] for path in projections}
        if unknown:
            raise InputError(
                f"LoRA targets {sorted(unknown)} are no projections of the base "
                f"({', '.join(projections)})"
            )
        shapes = {}
        for layer in range(self.num_hidden_layers):
            for path, (d_in, d_out) in projections.items():
                if path.split(".")[1] in targets:
                    shapes[f"model.layers.{layer}.{path}.lora_A.weight"] = (rank, d_in)
                    shapes[f"model.layers.{layer}.{path}.lora_B.weight"] = (d_out, rank)
        return shapes


def sizes_to_pretrain(base: schema.Base, vocab_size: int) -> LmConfig:
    """The architecture of the base that `dnd pretrain` makes from these settings."""
    names = {f.name for f in dataclasses.fields(LmConfig)} & {
        f.name for f in dataclasses.fields(base)
    }
    return LmConfig(**{name: getattr(base, name) for name in names} | {"vocab_size": vocab_size})


class Projection(nn.Module):
    """x W (+ bias) + scale * (x A^T) B^T."""

    features: int
    use_bias: bool
    dtype: jnp.dtype
    dot: Callable | None = None  # of nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array, lora: Lora, lora_scale: float, path: str) -> jax.Array:
        how = {"dtype": self.dtype, "kernel_init": FAN_IN, "dot_general": self.dot}
        y = nn.Dense(self.features, self.use_bias, **how, name="dense")(x)
        y = checkpoint_name(y, PRODUCT)
        a, b = lora.get(f"{path}.lora_A.weight"), lora.get(f"{path}.lora_B.weight")
        if a is None:
            return y
        return y + (x @ a.T.astype(self.dtype)) @ b.T.astype(self.dtype) * lora_scale


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


class Layer(nn.Module):
    """One block."""

    config: LmConfig
    dtype: jnp.dtype
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attend: Attend,
        positions: jax.Array,
        lora_scale: float,
        lora: Lora,
        window: Window,
    ) -> jax.Array:
        """Tokens (..., D) at positions (...). lora: by names inside the layer."""
        c = self.config
        heads, kv_heads, width = c.num_attention_heads, c.num_key_value_heads, c.head_width

        def project(x, name, features, use_bias=False):
            split = ("tensor", None) if name in ("o_proj", "down_proj") else (None, "tensor")
            dot = gathered_dot(self.mesh, *split)
            module = Projection(features, use_bias, self.dtype, dot, name=name)
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            return module(x, lora, lora_scale, f"{block}.{name}")

        def heads_of(x, name, count):  # (..., count, E)
            return project(x, name, count * width, c.qkv_bias).reshape(*x.shape[:-1], count, width)

        y = RMSNorm(c.rms_norm_eps, self.dtype, name="input_layernorm")(x)
        q = heads_of(y, "q_proj", heads)
        k = heads_of(y, "k_proj", kv_heads)
        v = heads_of(y, "v_proj", kv_heads)
        if c.qk_norm:
            q, k = (
                RMSNorm(c.rms_norm_eps, self.dtype, name=name)(y)
                for name, y in (("q_norm", q), ("k_norm", k))
            )
        frequency = rotary_frequencies(width, c.rope_theta, c.rope_scaling)
        q, k = rotate(q, positions, frequency), rotate(k, positions, frequency)
        q = q.reshape(*k.shape[:-1], heads // kv_heads, width) * width**-0.5
        attended = attend(q, k, v, window)
        x = x + project(attended, "o_proj", c.hidden_size, c.o_bias)

        y = RMSNorm(c.rms_norm_eps, self.dtype, name="post_attention_layernorm")(x)
        gate = nn.silu(project(y, "gate_proj", c.intermediate_size, c.mlp_bias))
        inner = gate * project(y, "up_proj", c.intermediate_size, c.mlp_bias)
        return x + project(inner, "down_proj", c.hidden_size, c.mlp_bias)


class BaseLM(nn.Module):
    """Token ids (B, S) -> logits (B, S, V). Where only some positions matter: `hidden`, then `head`
    on those."""

    config: LmConfig
    dtype: jnp.dtype = jnp.float32
    # The backward pass computes each layer anew from its input, instead of from its products.
    remat: bool = False
    mesh: jax.sharding.Mesh | None = None  # where the parameters lie in parts: base/gathering.py
    unroll: bool = False  # no loop over the layers: for compilers that count its body once

    def setup(self):
        c = self.config
        embedding_init = nn.initializers.normal(c.hidden_size**-0.5)
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, embedding_init=embedding_init, dtype=self.dtype
        )
        self.layers = Layer(c, self.dtype, self.mesh)
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=FAN_IN,
                dot_general=gathered_dot(self.mesh, None, None),
            )

    def hidden(
        self,
        tokens_BxS: jax.Array,
        lora: Lora | None = None,
        lora_scale: float = 1.0,
        valid_BxS: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states (B, S, D), causal. valid_BxS marks real tokens; padding may stand on
        either side."""
        batch, length = tokens_BxS.shape
        if valid_BxS is None:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        else:
            positions = jnp.maximum(jnp.cumsum(valid_BxS, axis=1) - 1, 0)
        return self.norm(self._layers(tokens_BxS, in_rows(valid_BxS), positions, lora, lora_scale))

    def hidden_packed(
        self,
        tokens_N: jax.Array,
        rows: Packed,
        prefix_P: jax.Array,
        lora: Lora | None = None,
        lora_scale: float = 1.0,
    ) -> jax.Array:
        """The same (N, D) of rows that lie one behind the other. prefix_P: tokens that stand before
        every row, computed once."""
        prefix = len(prefix_P)
        tokens = jnp.concatenate([prefix_P, tokens_N])
        positions = jnp.concatenate([jnp.arange(prefix), prefix + rows.positions()])
        x = self._layers(tokens, in_packed(rows, prefix), positions, lora, lora_scale)
        return self.norm(x[prefix:])

    def _layers(self, tokens, attend, positions, lora, lora_scale) -> jax.Array:
        x = whole(self.mesh, self.embed_tokens(tokens))
        c, how = self.config, (self.remat, self.unroll)
        given = attend, positions, lora, lora_scale
        return through(self.layers, c.num_hidden_layers, c.windows, x, *given, *how)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (..., D) -> logits (..., V), float32."""
        c = self.config
        if not c.tie_word_embeddings:
            logits = self.lm_head(hidden)
        elif dot := gathered_dot(self.mesh, None, None):
            table = self.embed_tokens.embedding.astype(self.dtype)
            last = (((hidden.ndim - 1,), (1,)), ((), ()))
            logits = dot(hidden.astype(self.dtype), table, last)
        else:
            logits = self.embed_tokens.attend(hidden)
        return logits.astype(jnp.float32)

    def __call__(
        self,
        tokens_BxS: jax.Array,
        lora: Lora | None = None,
        lora_scale: float = 1.0,
        valid_BxS: jax.Array | None = None,
    ) -> jax.Array:
        return self.head(self.hidden(tokens_BxS, lora, lora_scale, valid_BxS))
