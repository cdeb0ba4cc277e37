"""The generator: condition embeddings (B, N, L, C) -> optional length projection -> decoder -> tokens (B, T, h, w).

The frozen text encoder stays outside: its output is computed once and cached, or in the same jitted step (see pairs.py).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.models.hyperconv import Features, HyperConvDecoder, torch_uniform

LENGTH_PROJECTIONS = ("camera_ready", "first_release")


class LengthProjection(nn.Module):
    """Squeezes the text axis L -> M by two linear layers over it (METHOD.md section 4).

    "camera_ready" has SiLU between them and acts on the transposed (N, C, L); "first_release" has none and reshapes instead of
    transposing, which scrambles the axes: it exists only so that weights released that way compute what they were trained to.
    """

    kind: str
    length: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxNxLxC: jax.Array) -> jax.Array:
        b, n, full_length, c = x_BxNxLxC.shape

        def dense(name: str, fan_in: int) -> nn.Dense:
            init = torch_uniform(fan_in)
            return nn.Dense(self.length, kernel_init=init, bias_init=init, dtype=self.dtype, name=name)

        down, gate = dense("down", full_length), dense("gate", self.length)
        if self.kind == "camera_ready":
            return gate(nn.silu(down(x_BxNxLxC.swapaxes(2, 3)))).swapaxes(2, 3)
        if self.kind == "first_release":
            return gate(down(x_BxNxLxC.reshape(b, n, c, full_length))).reshape(b, n, self.length, c)
        raise ValueError(f"length projection {self.kind!r} is none of {LENGTH_PROJECTIONS}")


class Generator(nn.Module):
    """features: (N, L, C) of every stage, the condition's first and the token grid's last. The rest as `HyperConvDecoder`."""

    features: Sequence[Features]
    kernel_size: int
    length_projection: str | None = None
    dtype: jnp.dtype = jnp.float32
    convolution: str = "auto"
    platform: str | None = None
    batch_ways: int = 1
    kernel_ways: int = 1

    @nn.compact
    def __call__(self, condition_BxNxLxC: jax.Array) -> jax.Array:
        x = condition_BxNxLxC.astype(self.dtype)
        if self.length_projection:
            x = LengthProjection(self.length_projection, self.features[0][1], self.dtype, name="length_projection")(x)
        how = (self.dtype, self.convolution, self.platform, self.batch_ways, self.kernel_ways)
        return HyperConvDecoder(self.features, self.kernel_size, *how, name="decoder")(x)
