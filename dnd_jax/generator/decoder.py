"""The cascaded hyper-convolutional decoder: condition (B, N, L, C) -> token grid (B, T, h, w).
Paper section 3, docs/METHOD.md section 5.

A stage maps (N, L, C) -> (N', L', C'): two paths of two convolutions each over the (L, C) side,
their mean with a bias, then one convolution over N. Every convolution runs over two of the three
axes and mixes the third.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from dnd_jax.config.schema import Features
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.ops.convolution import convolve
from dnd_jax.ops.cost_model import Problem
from dnd_jax.parallel.placement import ANYWHERE, Placement

LAYER_NORM_EPS = 1e-5
CONVOLUTION = "convolution"  # the name of every convolution's output, for rematerialisation


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default initialisation of convolutions and linear layers: U(-1/sqrt(fan_in),
    1/sqrt(fan_in))."""
    return symmetric_uniform(fan_in**-0.5)


def symmetric_uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


@jax.custom_vjp
def with_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias, broadcast and in x's type. The bias's gradient is summed in its own type, in which
    devices exchange it: in bfloat16, sums over many would be off by parts in a hundred."""
    return x + bias.astype(x.dtype)


def _bias_backward(bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (1,) * (dy.ndim - bias.ndim) + bias.shape
    over = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return dy, jnp.sum(dy, over, dtype=bias.dtype).reshape(bias.shape)


with_bias.defvjp(lambda x, bias: (with_bias(x, bias), bias), _bias_backward)


class HyperConvStage(nn.Module):
    """One stage (N, L, C) -> (N', L', C')."""

    features_in: Features
    features_out: Features
    spec: DecoderSpec  # of the whole decoder
    placement: Placement = ANYWHERE

    def convolve(self, x_BxNxLxC: jax.Array, name: str, axis: int, size_out: int) -> jax.Array:
        """Mixes `axis` with the float32 kernel `name`; its method decides what that is rounded
        to."""
        k, size_in, place = self.spec.kernel_size, x_BxNxLxC.shape[axis], self.placement
        kernel = self.param(name, torch_uniform(size_in * k * k), (k, k, size_in, size_out))
        plan = self.spec.plan(Problem.of(*place.parts(x_BxNxLxC, kernel), axis, place.platform))
        # Rounded before it is gathered, half the bytes travel.
        dtype = x_BxNxLxC.dtype if plan.direct else kernel.dtype
        y = place.convolve(
            lambda x, kernel: convolve(x, kernel, axis, plan), x_BxNxLxC, kernel, axis, dtype
        )
        return checkpoint_name(y, CONVOLUTION)

    @nn.compact
    def __call__(self, x_BxNxLxC: jax.Array) -> jax.Array:
        k, dtype = self.spec.kernel_size, jnp.dtype(self.spec.dtype)
        n, length, c = self.features_in
        n_out, length_out, c_out = self.features_out
        if x_BxNxLxC.shape[1:] != self.features_in:
            raise ValueError(f"stage expects (B, {n}, {length}, {c}), got {x_BxNxLxC.shape}")

        x = nn.LayerNorm(
            epsilon=LAYER_NORM_EPS,
            reduction_axes=(-2, -1),
            feature_axes=(-2, -1),
            use_fast_variance=False,
            dtype=dtype,
            name="norm",
        )(x_BxNxLxC)
        width_first = self.convolve(x, "conv1w", 3, c_out)
        width_first = self.convolve(width_first, "conv1h", 2, length_out)
        height_first = self.convolve(x, "conv2h", 2, length_out)
        height_first = jnp.tanh(self.convolve(height_first, "conv2w", 3, c_out))
        bias = self.param("bias", symmetric_uniform(1 / (length_out * c_out)), (length_out, c_out))
        y = with_bias(width_first + height_first, bias) / 3

        y = self.convolve(y, "conv_n", 1, n_out)
        bias_n = self.param("bias_n", torch_uniform(n * k**2), (n_out,))
        y = with_bias(y, bias_n[:, None, None])
        return x_BxNxLxC + y if self.features_in == self.features_out else y


class HyperConvDecoder(nn.Module):
    """The cascade of a spec's stages: (B, N, L, C) -> (B, T, h, w). No final activation.

    placement: on which mesh.
    """

    spec: DecoderSpec
    placement: Placement = ANYWHERE

    @nn.compact
    def __call__(self, condition_BxNxLxC: jax.Array) -> jax.Array:
        x = self.placement.activation(condition_BxNxLxC.astype(self.spec.dtype))
        stage = _stage_class(self.spec.remat)
        for i, (features_in, features_out) in enumerate(self.spec.stages):
            x = stage(features_in, features_out, self.spec, self.placement, name=f"stage_{i}")(x)
        return x


def _stage_class(remat: str) -> type[HyperConvStage]:
    """The stage as the backward pass shall see it, by config.choices.REMAT."""
    if remat == "none":
        return HyperConvStage
    keep_convolutions = jax.checkpoint_policies.save_only_these_names(CONVOLUTION)
    policy = keep_convolutions if remat == "convolutions" else None
    # prevent_cse stays on: the stages are in no scan, so nothing else keeps XLA from merging what
    # is computed again with what was computed first.
    return nn.remat(HyperConvStage, policy=policy)


def weighted_errors(
    output_BxTxHxW: jax.Array, target: jax.Array, importance_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each sample's sum over the target's non-NaN cells of importance[token] * (output - target)^2,
    and its number of such cells.

    float32 (B,) both. The loss of docs/METHOD.md section 6 is the quotient of their sums over the
    batch.
    """
    mask = ~jnp.isnan(target)
    error = output_BxTxHxW.astype(jnp.float32) - jnp.where(mask, target, 0).astype(jnp.float32)
    weight = jnp.where(mask, importance_T.astype(jnp.float32)[:, None, None], 0)
    over = (1, 2, 3)
    return jnp.sum(weight * error**2, over), jnp.sum(mask, over, dtype=jnp.float32)


def weighted_loss(
    output_BxTxHxW: jax.Array, target: jax.Array, importance_T: jax.Array
) -> jax.Array:
    """Mean over the target's non-NaN cells of importance[token] * (output - target)^2, in float32
    (docs/METHOD.md section 6)."""
    errors_B, cells_B = weighted_errors(output_BxTxHxW, target, importance_T)
    return jnp.sum(errors_B) / jnp.sum(cells_B)
