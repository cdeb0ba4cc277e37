"""A "same" cross-correlation tile by tile in the Fourier domain, as small matrix products
(overlap-save).

For a grid (H, W), kernel k and t-point transforms (t = step + k - 1):

    x -> tiles (t_h, t_w) -> real DFT down H, complex DFT along W -> planes X    "analysis"
    kernel (k, k)         -> the same, conjugated                 -> planes V
    P = X V over channels, one matrix product a plane
    P -> inverse DFTs, the valid (step_h, step_w) of each tile    -> y           "synthesis"

A complex product over channels is three real ones (Gauss): the planes of a frequency are (re, im,
re + im) of X and of V, and the synthesis matrices turn the three products back. So everything is a
real bilinear algorithm, y = S [(A x) * (K w)], and the gradients are its transposes: dP = S' dy, dx
= A' (dP V'), dw = K' (X' dP). They share dP, and X and V are computed again rather than kept.
dnd_jax/ops/dft_tpu.py lays the same algorithm out for bfloat16 on a TPU.

A grid axis of one tile needs no padding: zeros wrap around, t = size + k // 2 is enough, and
matrices have the grid's own columns. Letters: f row frequency (0..t_h/2), p its re/im pair, g
column frequency, q plane of X, V and P (o plane of P where it has others), i j positions, d output
channel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dnd_jax.ops.tiles import GAUSS, Axis, cut, matrices


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Types inside: of half-transformed arrays on the way to the planes, of the planes, of their
    products and all that follows these."""

    between: jnp.dtype
    spectrum: jnp.dtype
    product: jnp.dtype
    # bring every operand's largest value to about 1 first (float16 has little range)
    scaled: bool = False


class Transforms:
    """The linear maps of one convolution; every one is written once, forwards, and transposed by
    JAX or by swapping indices."""

    def __init__(self, h: Axis, w: Axis, arithmetic: Arithmetic):
        self.h, self.w, self.arithmetic = h, w, arithmetic
        self._matrices = matrices(h, w, GAUSS)

    def _dot(self, pattern: str, name: str, value: jax.Array, out: jnp.dtype) -> jax.Array:
        """An einsum of a transform matrix with data, in the data's type but accumulated in at least
        float32."""
        matrix = jnp.asarray(getattr(self._matrices, name), value.dtype)
        wide = jnp.promote_types(value.dtype, jnp.float32)
        return jnp.einsum(
            pattern, matrix, value, precision="highest", preferred_element_type=wide
        ).astype(out)

    def x_rows(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """-> (f, p, width_w, B, tiles_h, tiles_w, C)."""
        x = x_BxHxWxC.astype(self.arithmetic.between)
        x = cut(cut(x, 1, self.h), 3, self.w).transpose(2, 4, 0, 1, 3, 5)
        return self._dot("fpi,ijbhwc->fpjbhwc", "x_rows", x, self.arithmetic.between)

    def k_rows(self, kernel: jax.Array) -> jax.Array:
        """(k, k, C, D) -> (f, p, k, C, D)."""
        between = self.arithmetic.between
        return self._dot("fpi,ijcd->fpjcd", "k_rows", kernel.astype(between), between)

    def y_rows(self, y: jax.Array, shape: tuple[int, int, int, int], out: jnp.dtype) -> jax.Array:
        """(f, p, step_w, B, tiles_h, tiles_w, D) -> (B, H, W, D)."""
        y = self._dot("ifp,fpjbhwd->ijbhwd", "y_rows", y, out)
        batch, height, width, channels = shape
        y = y.transpose(2, 3, 0, 4, 1, 5).reshape(
            batch, self.h.tiles * self.h.step, self.w.tiles * self.w.step, channels
        )
        return y[:, :height, :width]

    # Of one row frequency (no f), so that a loop over f keeps only its own planes.
    def x_planes(self, z: jax.Array) -> jax.Array:
        """(p, width_w, B, tiles_h, tiles_w, C) -> (q, g, B, tiles_h, tiles_w, C)."""
        return self._dot("qgpj,pjbhwc->qgbhwc", "x_columns", z, self.arithmetic.spectrum)

    def x_planes_transposed(self, planes: jax.Array) -> jax.Array:
        return self._dot("qgpj,qgbhwc->pjbhwc", "x_columns", planes, self.arithmetic.product)

    def k_planes(self, z: jax.Array) -> jax.Array:
        """(p, k, C, D) -> (q, g, C, D)."""
        return self._dot("qgpj,pjcd->qgcd", "k_columns", z, self.arithmetic.spectrum)

    def k_planes_transposed(self, planes: jax.Array) -> jax.Array:
        return self._dot("qgpj,qgcd->pjcd", "k_columns", planes, self.arithmetic.product)

    def y_columns(self, products: jax.Array) -> jax.Array:
        """(q, g, B, tiles_h, tiles_w, D) -> (p, step_w, B, tiles_h, tiles_w, D)."""
        return self._dot("pjqg,qgbhwd->pjbhwd", "y_columns", products, self.arithmetic.product)

    def y_columns_transposed(self, z: jax.Array) -> jax.Array:
        return self._dot("pjqg,pjbhwd->qgbhwd", "y_columns", z, self.arithmetic.spectrum)

    def _multiply(self, pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
        precision = "highest" if a.dtype == jnp.float32 else None
        return jnp.einsum(
            pattern, a, b, precision=precision, preferred_element_type=self.arithmetic.product
        )

    # The products over channels (or over tiles, for the kernel's gradient), frequency by frequency.
    def product(self, x_planes: jax.Array, k_planes: jax.Array) -> jax.Array:
        return self._multiply("qgbhwc,qgcd->qgbhwd", x_planes, k_planes)

    def product_to_x(self, dp: jax.Array, k_planes: jax.Array) -> jax.Array:
        return self._multiply("qgbhwd,qgcd->qgbhwc", dp, k_planes)

    def product_to_k(self, x_planes: jax.Array, dp: jax.Array) -> jax.Array:
        return self._multiply("qgbhwc,qgbhwd->qgcd", x_planes, dp)


def _scale(x: jax.Array, scaled: bool) -> tuple[jax.Array, jax.Array | None]:
    """x divided by the power of two next to its largest magnitude, and that power (None:
    untouched)."""
    if not scaled:
        return x, None
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x))
    power = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(largest > 0, largest, 1))))
    return x / power, power


def _unscale(y: jax.Array, *powers: jax.Array | None) -> jax.Array:
    for power in powers:
        if power is not None:
            y = y * power
    return y


def _each_frequency(function, looped: bool, *arrays):
    """`function` over the leading axis: in a loop, which keeps the planes of one row frequency, or
    all at once."""
    return lax.map(lambda args: function(*args), arrays) if looped else jax.vmap(function)(*arrays)


def _part(array: jax.Array, index: jax.Array | int, chunks: int, axis: int) -> jax.Array:
    size = array.shape[axis] // chunks
    return lax.dynamic_slice_in_dim(array, index * size, size, axis=axis) if chunks > 1 else array


def forward(
    x: jax.Array,
    kernel: jax.Array,
    h: Axis,
    w: Axis,
    arithmetic: Arithmetic,
    looped: bool = False,
    chunks: int = 1,
) -> jax.Array:
    """x (B, H, W, C), kernel (k, k, C, D) -> y (B, H, W, D), of x's type.

    looped: one row frequency after the other. chunks (a divisor of D): one part of the output
    channels after the other.
    """
    maps = Transforms(h, w, arithmetic)
    x_scaled, x_power = _scale(x, arithmetic.scaled)
    k_scaled, k_power = _scale(kernel, arithmetic.scaled)
    zx = maps.x_rows(x_scaled)

    def one(zx, zk):
        return maps.y_columns(maps.product(maps.x_planes(zx), maps.k_planes(zk)))

    def part(i):
        zk = maps.k_rows(_part(k_scaled, i, chunks, 3))
        out = arithmetic.product if arithmetic.scaled else x.dtype
        y = maps.y_rows(
            _each_frequency(one, looped, zx, zk), (*x.shape[:3], kernel.shape[3] // chunks), out
        )
        return _unscale(y, x_power, k_power).astype(x.dtype)

    if chunks == 1:
        return part(0)
    y = lax.map(part, jnp.arange(chunks))  # (chunks, B, H, W, D / chunks)
    return jnp.moveaxis(y, 0, 3).reshape(*x.shape[:3], kernel.shape[3])


def backward(
    x: jax.Array,
    kernel: jax.Array,
    dy: jax.Array,
    h: Axis,
    w: Axis,
    arithmetic: Arithmetic,
    looped: bool = False,
    chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """(dx, dkernel) of `forward` for dy (B, H, W, D)."""
    maps = Transforms(h, w, arithmetic)
    x_scaled, x_power = _scale(x, arithmetic.scaled)
    k_scaled, k_power = _scale(kernel, arithmetic.scaled)
    dy, dy_power = _scale(dy.astype(arithmetic.product), arithmetic.scaled)
    zx = maps.x_rows(x_scaled)
    part_shape = (*dy.shape[:3], dy.shape[3] // chunks)
    zy_shape = (h.t // 2 + 1, 2, w.step, x.shape[0], h.tiles, w.tiles, part_shape[3])
    y_rows_transposed = jax.linear_transpose(
        lambda y: maps.y_rows(y, part_shape, arithmetic.product),
        jax.ShapeDtypeStruct(zy_shape, arithmetic.product),
    )
    # Transposed as maps of the products' type: the gradients are rounded once, at the end, and what
    # all channels or positions add up to has room, which it may not have in float16.
    wide = Transforms(h, w, dataclasses.replace(arithmetic, between=arithmetic.product))
    x_rows_transposed = jax.linear_transpose(
        wide.x_rows, jax.ShapeDtypeStruct(x.shape, arithmetic.product)
    )
    k_part_shape = (*kernel.shape[:3], part_shape[3])
    k_rows_transposed = jax.linear_transpose(
        wide.k_rows, jax.ShapeDtypeStruct(k_part_shape, arithmetic.product)
    )

    def one(zx, zk, zy):
        dp = maps.y_columns_transposed(zy)
        dx = maps.x_planes_transposed(maps.product_to_x(dp, maps.k_planes(zk)))
        return dx, maps.k_planes_transposed(maps.product_to_k(maps.x_planes(zx), dp))

    def part(i):
        (zy,) = y_rows_transposed(_part(dy, i, chunks, 3))
        zk = maps.k_rows(_part(k_scaled, i, chunks, 3))
        dzx, dzk = _each_frequency(one, looped, zx, zk, zy.astype(arithmetic.between))
        return dzx, k_rows_transposed(dzk)[0]

    if chunks == 1:
        dzx, dk = part(0)
    else:

        def accumulate(dzx, i):
            more, dk = part(i)
            return dzx + more, dk

        dzx, dk = lax.scan(accumulate, jnp.zeros(zx.shape, arithmetic.product), jnp.arange(chunks))
        dk = jnp.moveaxis(dk, 0, 3).reshape(kernel.shape)
    (dx,) = x_rows_transposed(dzx)
    dx, dk = _unscale(dx, k_power, dy_power), _unscale(dk, x_power, dy_power)
    return dx.astype(x.dtype), dk.astype(kernel.dtype)
