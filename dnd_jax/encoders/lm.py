"""A decoder-only LM as a text encoder: the hidden states of one of its layers (docs/METHOD.md
section 4)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.base.architecture import Layer, LmConfig, RMSNorm
from dnd_jax.base.attention import in_rows
from dnd_jax.base.layers import through


class LmEncoder(nn.Module):
    """The first blocks of a decoder-only LM. layer 0: the embeddings. layer n: the output of block
    n, for the last block after the final norm. Blocks behind `layer` are not made. Parameters are
    named and sharded as BaseLM's."""

    config: LmConfig
    layer: int
    dtype: jnp.dtype = jnp.float32

    @property
    def width(self) -> int:
        """C of the hidden states."""
        return self.config.hidden_size

    @property
    def window(self) -> int:
        """The longest L."""
        return self.config.max_position_embeddings

    @nn.compact
    def __call__(self, ids_BxL: jax.Array, valid_BxL: jax.Array) -> jax.Array:
        """valid_BxL is 1 at real tokens, padded on the right. Returns (B, L, C), padding positions
        included."""
        c = self.config
        x = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="embed_tokens")(ids_BxL)
        positions = jnp.broadcast_to(jnp.arange(ids_BxL.shape[1]), ids_BxL.shape)
        layer = Layer(c, self.dtype, name="layers")
        x = through(layer, self.layer, c.windows, x, in_rows(valid_BxL), positions)
        return (
            RMSNorm(c.rms_norm_eps, self.dtype, name="norm")(x)
            if self.layer == c.num_hidden_layers
            else x
        )
