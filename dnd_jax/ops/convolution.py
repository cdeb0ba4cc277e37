"""`convolve`: the "same" cross-correlation over two of three axes that a hyper-convolution is made
of (docs/METHOD.md section 5)."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from dnd_jax.ops import dft, dft_tpu
from dnd_jax.ops.choice import choose
from dnd_jax.ops.cost_model import SHIFTED, ConvPlan, Problem, arithmetic, on_tpu
from dnd_jax.ops.tiles import Axis


def convolve(
    x_BxNxLxC: jax.Array,
    kernel: jax.Array,
    axis: int,
    method: str | ConvPlan = "auto",
    platform: str | None = None,
) -> jax.Array:
    """Cross-correlation with zero "same" padding over the two non-batch axes other than `axis`,
    mixing `axis`.

    kernel (k, k, in, out) with k odd: its first two dimensions follow the two grid axes in the
    order of x. Returns x's layout and type with `axis` of size `out`. method: "direct" (the
    compiler's convolution), "dft" (tile by tile in the Fourier domain, dnd_jax/ops/dft.py), "auto"
    (the cheaper one by the cost model of dnd_jax/ops/cost_model.py, of few channels on a CPU also
    `shifted`; on a GPU, whose rates were not measured, "direct"), "tuned" (the fastest one measured
    here, else as "auto"), or a `ConvPlan`.
    platform: the one it is compiled for, "cpu", "gpu" or "tpu" (default: the present one). On a
    mesh it is meant for each device's own part (shard_map, as dnd_jax/parallel/placement.py does);
    it works without, too. A kernel of higher precision than x is kept by "dft" and rounded to x's
    type by "direct". Raises ValueError for an even or oblong kernel, channels that differ, an axis
    that is none, or an empty dimension.
    """
    if x_BxNxLxC.ndim != 4 or kernel.ndim != 4 or axis not in (1, 2, 3):
        raise ValueError(
            "convolve takes x of 4 dimensions, a kernel of 4 and axis 1, 2 or 3, not "
            f"{x_BxNxLxC.shape}, {kernel.shape}, {axis}"
        )
    if kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise ValueError(f"kernel {kernel.shape}: the first two dimensions must be equal and odd")
    if 0 in x_BxNxLxC.shape or 0 in kernel.shape:
        raise ValueError(
            f"x {x_BxNxLxC.shape} and kernel {kernel.shape} must not have an empty dimension; a "
            "batch has at least 1"
        )
    if x_BxNxLxC.shape[axis] != kernel.shape[2]:
        raise ValueError(
            f"x {x_BxNxLxC.shape} has {x_BxNxLxC.shape[axis]} channels on axis {axis}, the kernel "
            f"takes {kernel.shape[2]}"
        )
    if not isinstance(method, ConvPlan):
        method = choose(
            Problem.of(x_BxNxLxC, kernel, axis, platform or jax.default_backend()), method
        )
    if method.direct:
        return direct(x_BxNxLxC, kernel, axis, method.platform)
    return _convolve(x_BxNxLxC, kernel, axis, method)


def direct(x_BxNxLxC: jax.Array, kernel: jax.Array, axis: int, platform: str = "") -> jax.Array:
    """The same by the compiler's own convolution, in the order of x; on a CPU, in XLA's there."""
    if platform == "cpu":
        kernel = kernel.astype(x_BxNxLxC.dtype)
        return jnp.moveaxis(_channels_last(jnp.moveaxis(x_BxNxLxC, axis, 3), kernel), 3, axis)
    grid = tuple(a for a in (1, 2, 3) if a != axis)
    layout = (0, axis, *grid)
    return lax.conv_general_dilated(
        x_BxNxLxC,
        kernel.astype(x_BxNxLxC.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=lax.ConvDimensionNumbers(
            lhs_spec=layout, rhs_spec=(3, 2, 0, 1), out_spec=layout
        ),
    )


@jax.custom_vjp
def _channels_last(x_BxHxWxI: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, H, W, O), in the order in which XLA's convolution on CPUs takes its arrays, and so are
    its gradients. It turns those of another order itself, but in a loop (micro-batches), where a
    convolution of another order takes 50 times as long (`lax.scan`, jax 0.10.2)."""
    return _correlated(x_BxHxWxI, kernel, "SAME")


def _gradients(operands: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dx and the kernel's (k, k, I, O)."""
    x, kernel = operands
    edge = [(kernel.shape[0] // 2,) * 2] * 2
    dx = _correlated(dy, kernel[::-1, ::-1].swapaxes(2, 3), "SAME")
    dkernel = _correlated(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), edge)
    return dx, dkernel.transpose(1, 2, 0, 3)


def _correlated(x: jax.Array, kernel: jax.Array, padding) -> jax.Array:
    numbers = "NHWC", "HWIO", "NHWC"
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)


_channels_last.defvjp(lambda x, kernel: (_channels_last(x, kernel), (x, kernel)), _gradients)


def shifted(x_BxNxLxC: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """The same as a sum over taps and input channels of the shifted input times a number, which
    vectorises along the last grid axis. For few channels: all terms are written out."""
    if axis == 3:
        return jnp.moveaxis(shifted(jnp.moveaxis(x_BxNxLxC, 3, 1), kernel, 1), 1, 3)
    grid = [a for a in (1, 2, 3) if a != axis]
    k, _, size_in, size_out = kernel.shape
    weights = kernel.astype(x_BxNxLxC.dtype)
    padded = jnp.pad(x_BxNxLxC, [(k // 2, k // 2) if a in grid else (0, 0) for a in range(4)])

    def term(i: int, j: int, channel: int, some: slice) -> jax.Array:
        part = padded
        for a, first in zip((*grid, axis), (i, j, channel), strict=True):
            size = 1 if a == axis else x_BxNxLxC.shape[a]
            part = lax.slice_in_dim(part, first, first + size, axis=a)
        return part * jnp.expand_dims(weights[i, j, channel, some], [a - 1 for a in grid])

    terms = list(itertools.product(range(k), range(k), range(size_in)))
    # In two halves: a compiler puts them together in an array, where it would write a single sum
    # anew into each of its readers.
    half = size_out // 2
    halves = [slice(half), slice(half, size_out)] if half else [slice(size_out)]
    return jnp.concatenate(
        [functools.reduce(jnp.add, (term(*t, some) for t in terms)) for some in halves], axis
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, axis: int, plan: ConvPlan) -> jax.Array:
    if plan.forward is None:
        return direct(x, kernel, axis, plan.platform)
    if plan.forward == SHIFTED:
        return shifted(x, kernel, axis)
    x = jnp.moveaxis(x, axis, 3)
    h, w = (
        Axis(size, kernel.shape[0], n) for size, n in zip(x.shape[1:3], plan.forward, strict=True)
    )
    if on_tpu(x.dtype, plan.platform):
        y = dft_tpu.forward(x, kernel, h, w, plan.ordered)
    else:
        y = dft.forward(
            x, kernel, h, w, arithmetic(x.dtype, plan.platform), plan.looped, plan.chunks
        )
    return jnp.moveaxis(y, 3, axis)


def _forward(x, kernel, axis, plan):
    return _convolve(x, kernel, axis, plan), (x, kernel)


def _backward(axis, plan, residuals, dy):
    x, kernel = residuals
    by = functools.partial(direct, axis=axis, platform=plan.platform)
    if plan.backward is None:
        return jax.vjp(by, x, kernel)[1](dy)
    if plan.backward == SHIFTED:
        _, gradient_of_kernel = jax.vjp(functools.partial(by, x), kernel)
        transposed = kernel[::-1, ::-1].swapaxes(2, 3)
        return shifted(dy, transposed, axis), *gradient_of_kernel(dy)
    x, dy = jnp.moveaxis(x, axis, 3), jnp.moveaxis(dy, axis, 3)
    h, w = (
        Axis(size, kernel.shape[0], n) for size, n in zip(x.shape[1:3], plan.backward, strict=True)
    )
    if on_tpu(x.dtype, plan.platform):
        dx, dkernel = dft_tpu.backward(x, kernel, dy, h, w, plan.ordered)
    else:
        dx, dkernel = dft.backward(
            x, kernel, dy, h, w, arithmetic(x.dtype, plan.platform), plan.looped, plan.chunks
        )
    return jnp.moveaxis(dx, 3, axis), dkernel


_convolve.defvjp(_forward, _backward)
