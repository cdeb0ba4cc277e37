"""BERT as a text encoder, dropout off: MiniLM, BERT, GTE, BGE and whatever else has model_type
"bert"."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.base.names import Table, affine, by_prefix

WINDOW = 512  # docs/METHOD.md section 4
RULES = (  # as those of base/architecture.py
    (r"(query|key|value|intermediate)/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|intermediate)/bias$", ("tensor",)),
    (r"(attention_output|output)/kernel$", ("tensor", "fsdp")),
    (r"(attention_output|output)/bias$", ()),
    (r"_embeddings", (None, "fsdp")),
    (r"norm/(scale|bias)$", ()),
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The fields of a Hugging Face BERT config.json that shape the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class BertLayer(nn.Module):
    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxLxC: jax.Array, bias_BxL: jax.Array) -> jax.Array:
        c = self.config
        batch, length, width = x_BxLxC.shape
        heads = c.num_attention_heads

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(
                c.layer_norm_eps, use_fast_variance=False, dtype=self.dtype, name=name
            )

        q, k, v = (
            dense(n, width)(x_BxLxC).reshape(batch, length, heads, -1)
            for n in ("query", "key", "value")
        )
        scores = jnp.einsum(
            "bshe,bthe->bhst", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores + bias_BxL[:, None, None, :], axis=-1).astype(self.dtype)
        attended = jnp.einsum("bhst,bthe->bshe", weights, v).reshape(batch, length, width)
        x = norm("attention_norm")(x_BxLxC + dense("attention_output", width)(attended))
        inner = nn.gelu(dense("intermediate", c.intermediate_size)(x), approximate=False)
        return norm("output_norm")(x + dense("output", width)(inner))


class Bert(nn.Module):
    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @property
    def width(self) -> int:
        """C of the hidden states."""
        return self.config.hidden_size

    @property
    def window(self) -> int:
        """The longest L."""
        return min(WINDOW, self.config.max_position_embeddings)

    @nn.compact
    def __call__(self, ids_BxL: jax.Array, valid_BxL: jax.Array) -> jax.Array:
        """valid_BxL is 1 at real tokens. Returns the last hidden states (B, L, C), padding
        positions included."""
        c = self.config
        length = ids_BxL.shape[1]
        init = nn.initializers.normal(0.02)
        x = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=init, name="word_embeddings")(
            ids_BxL
        )
        position = self.param(
            "position_embeddings", init, (c.max_position_embeddings, c.hidden_size)
        )
        token_type = self.param("token_type_embeddings", init, (c.type_vocab_size, c.hidden_size))
        x = x + position[:length] + token_type[0]
        x = nn.LayerNorm(c.layer_norm_eps, use_fast_variance=False, dtype=self.dtype, name="norm")(
            x
        )
        bias = jnp.where(valid_BxL > 0, 0.0, jnp.finfo(jnp.float32).min)
        for i in range(c.num_hidden_layers):
            x = BertLayer(c, self.dtype, name=f"layer_{i}")(x, bias)
        return x


def bert_table(layers: int) -> Table:
    """(stored name, our path, transposed) of every parameter of BERT's encoder."""
    table = [
        ("embeddings.word_embeddings.weight", "word_embeddings/embedding", False),
        ("embeddings.position_embeddings.weight", "position_embeddings", False),
        ("embeddings.token_type_embeddings.weight", "token_type_embeddings", False),
        *affine("embeddings.LayerNorm", "norm", norm=True),
    ]
    for i in range(layers):
        for theirs, ours, norm in (
            ("attention.self.query", "query", False),
            ("attention.self.key", "key", False),
            ("attention.self.value", "value", False),
            ("attention.output.dense", "attention_output", False),
            ("attention.output.LayerNorm", "attention_norm", True),
            ("intermediate.dense", "intermediate", False),
            ("output.dense", "output", False),
            ("output.LayerNorm", "output_norm", True),
        ):
            table += affine(f"encoder.layer.{i}.{theirs}", f"layer_{i}/{ours}", norm)
    return table


def bert_names(stored: Collection[str], layers: int) -> dict[str, str]:
    """{stored name: the table's} of BERT's encoder, without pooler and heads, which are not used;
    gamma and beta, as the first BERTs call a LayerNorm's parameters, are renamed."""
    wanted = {theirs for theirs, _, _ in bert_table(layers)}
    names = {}
    for name in stored:
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        new = by_prefix(new.replace("LayerNorm.beta", "LayerNorm.bias"), wanted, "bert")
        of_encoder = new.removeprefix("bert.").startswith(("embeddings.", "encoder."))
        if of_encoder and not new.endswith("position_ids"):
            names[name] = new
    return names
