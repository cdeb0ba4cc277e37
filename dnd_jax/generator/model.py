"""The generator: condition embeddings (B, N, L, C) -> optional length projection -> decoder ->
tokens (B, T, h, w).

The frozen text encoder stays outside: its output is computed once and cached, or in the same jitted
step (see inputs.py).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.config.schema import LENGTH_PROJECTIONS
from dnd_jax.generator.decoder import HyperConvDecoder, torch_uniform
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.parallel.placement import ANYWHERE, Placement
from dnd_jax.parallel.rules import shapes_of


class LengthProjection(nn.Module):
    """Squeezes the text axis L -> M by two linear layers over it (docs/METHOD.md section 4).

    "camera_ready" has SiLU between them and acts on the transposed (N, C, L); "first_release" has
    none and reshapes instead of transposing, which scrambles the axes: it exists only so that
    weights released that way compute what they were trained to.
    """

    kind: str
    length: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxNxLxC: jax.Array) -> jax.Array:
        b, n, full_length, c = x_BxNxLxC.shape

        def dense(name: str, fan_in: int) -> nn.Dense:
            init = torch_uniform(fan_in)
            return nn.Dense(
                self.length, kernel_init=init, bias_init=init, dtype=self.dtype, name=name
            )

        down, gate = dense("down", full_length), dense("gate", self.length)
        if self.kind == "camera_ready":
            return gate(nn.silu(down(x_BxNxLxC.swapaxes(2, 3)))).swapaxes(2, 3)
        if self.kind == "first_release":
            return gate(down(x_BxNxLxC.reshape(b, n, c, full_length))).reshape(b, n, self.length, c)
        raise ValueError(f"length projection {self.kind!r} is none of {LENGTH_PROJECTIONS}")


class Generator(nn.Module):
    """The length projection, where the spec has one, and the decoder. placement: on which mesh."""

    spec: DecoderSpec
    placement: Placement = ANYWHERE

    @nn.compact
    def __call__(self, condition_BxNxLxC: jax.Array) -> jax.Array:
        kind, length, dtype = self.spec.length_projection, self.spec.features[0][1], self.spec.dtype
        x = condition_BxNxLxC.astype(dtype)
        if kind:
            x = LengthProjection(kind, length, jnp.dtype(dtype), name="length_projection")(x)
        return HyperConvDecoder(self.spec, self.placement, name="decoder")(x)


def param_shapes(module: Generator) -> dict:
    """The shapes of a generator's parameters, nested as they are; nothing is computed."""
    condition = jax.ShapeDtypeStruct((1, *module.spec.condition_shape), jnp.float32)
    return shapes_of(module.init, condition)["params"]
