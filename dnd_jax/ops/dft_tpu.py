"""The bilinear algorithm of dnd_jax/ops/dft.py laid out for bfloat16 data on a TPU, where bytes are
the limit, not operations.

What differs from dft.py, and why:

- Planes, their products and the gradients of both are bfloat16, rounded by the matrix product that
  makes them. Nothing else is rounded: transforms multiply by float32 matrices and leave
  half-transformed arrays in float32. Rounding those as well would cost more than 1.3 times the
  direct method's error (tests/ops/test_convolution.py).
- The kernel goes to planes in one step, k x k taps -> all planes of all frequencies. That is more
  operations than rows and columns apart, but the half-transformed kernel, the
  largest array of the late stages, is never written.
- The rows of all tiles are one banded matrix over the shorter grid axis, so that only the longer
  one is cut.
- A complex product is four real ones, with the smaller of X and V as the real 2 x 2 matrix: fewer
  bytes than Gauss's three, and half the rounding error.
- Grid axes come first, batch and channels last: a TPU tiles the last two, so that cutting a
  grid axis moves nothing inside a tile.
- Where the compiler's own choice of memory order makes it turn large arrays, the order is given.
  That is for each device's own part (shard_map): sharding does not get through a layout
  constraint, each device would make all planes (seen in compiled programs).

Letters: h position along the rows' axis, s tile of the rows' axis, t tile and j position along the
columns' axis, i j taps of the kernel; f p g q o b c d as in dft.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from dnd_jax.ops.tiles import WIDE_DATA, WIDE_KERNEL, Axis, matrices

SPECTRUM = jnp.bfloat16  # type of everything that has planes
BETWEEN = jnp.float32  # type of half-transformed arrays
PLANES = {WIDE_KERNEL: ("q", "oq", "o"), WIDE_DATA: ("oq", "q", "o")}  # of X, of V, of P


def form_of(h: Axis, w: Axis, batch: int, channels_out: int) -> str:
    """The smaller of X and V is the one that holds four numbers a frequency."""
    return WIDE_DATA if batch * h.tiles * w.tiles < channels_out else WIDE_KERNEL


def banded(a: Axis, tile: np.ndarray, first: int) -> np.ndarray:
    """(..., position in a tile) -> (tiles, ..., position on the axis), with tile 0 beginning at
    position `first`."""
    band = np.zeros((a.tiles, *tile.shape[:-1], a.size))
    for number in range(a.tiles):
        start = number * a.step + first
        low, high = max(start, 0), min(start + tile.shape[-1], a.size)
        band[number, ..., low:high] = tile[..., low - start : high - start]
    return band


@functools.lru_cache(maxsize=256)
def maps(h: Axis, w: Axis, form: str) -> dict[str, tuple[str, np.ndarray]]:
    """Every linear map of one tiling: the pattern of an einsum of (matrix, data) and the float64
    matrix."""
    m = matrices(h, w, form)
    x, v, p = PLANES[form]
    before = 0 if h.tiles == 1 else -(h.kernel // 2)
    return {
        "x_rows": ("sfph,htjbc->fpjstbc", banded(h, m.x_rows, before)),
        "x_columns": (f"{x}gpj,fpjstbc->f{x}gstbc", m.x_columns),
        "kernel": (
            f"f{v}gij,ijcd->f{v}gcd",
            np.einsum(f"fpi,{v}gpj->f{v}gij", m.k_rows, m.k_columns),
        ),
        "y_columns": (f"pj{p}g,f{p}gstbd->fpjstbd", m.y_columns),
        "y_rows": ("sfph,fpjstbd->htjbd", banded(h, np.moveaxis(m.y_rows, 0, -1), 0)),
    }


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def multiply(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product a plane. It is accumulated in float32 and rounded once, as a TPU's matrix
    unit does it."""
    return jnp.einsum(pattern, a, b, preferred_element_type=SPECTRUM)


def written(planes: jax.Array) -> jax.Array:
    """The same, written in their own type: a compiler would put off the rounding to where they are
    read, and write float32."""
    return lax.optimization_barrier(planes)


def cut(x_HxWxBxC: jax.Array, w: Axis) -> jax.Array:
    """-> (H, tiles, width, B, C), overlapping by k - 1 and padded with zeros outside the grid."""
    if w.tiles == 1:
        return x_HxWxBxC[:, None]
    pieces = -(-w.t // w.step)  # of a tile: itself and what it borrows from those that follow
    before, blocks = w.kernel // 2, w.tiles + pieces - 1
    x = jnp.pad(x_HxWxBxC, ((0, 0), (before, blocks * w.step - before - w.size), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], blocks, w.step, *x.shape[2:])
    return jnp.concatenate(
        [x[:, p : p + w.tiles, : w.t - p * w.step] for p in range(pieces)], axis=2
    )


class Transforms:
    """The maps of one convolution, each one matrix product."""

    def __init__(self, h: Axis, w: Axis, batch: int, channels: tuple[int, int], ordered: bool):
        form = form_of(h, w, batch, channels[1])
        self._w, self._channels, self._ordered = w, channels, ordered
        self._maps = maps(h, w, form)
        self._x, self._v, self._p = PLANES[form]

    def apply(
        self,
        name: str,
        value: jax.Array,
        out: jnp.dtype,
        transposed: bool = False,
        part: slice = slice(None),
    ) -> jax.Array:
        """One map or its transpose. part: of the positions j of a tile, where the matrix has them
        last."""
        pattern, matrix = self._maps[name]
        indices, given, made = pattern.replace("->", ",").split(",")
        pattern = f"{indices},{made}->{given}" if transposed else pattern
        matrix = jnp.asarray(matrix[..., part], BETWEEN)
        return jnp.einsum(
            pattern, matrix, value.astype(BETWEEN), precision="high", preferred_element_type=out
        )

    def planes_of_x(self, x_HxWxBxC: jax.Array) -> jax.Array:
        rows = self.apply("x_rows", cut(x_HxWxBxC, self._w), BETWEEN)
        return written(self.apply("x_columns", self.order(rows, "fpjstbc", "tjbspfc"), SPECTRUM))

    def planes_of_x_transposed(self, planes: jax.Array, out: jnp.dtype) -> jax.Array:
        """-> (H, W, B, C). The positions that a tile owns and those that it lends to the next ones
        come out of matrix products of their own: arrays that are added as they lie."""
        w = self._w
        pieces = -(-w.width // w.step)
        total = 0
        for p in range(pieces):
            part = slice(p * w.step, (p + 1) * w.step)
            rows = self.apply("x_columns", planes, BETWEEN, transposed=True, part=part)
            x = self.order(self.apply("x_rows", rows, BETWEEN, transposed=True), "htjbc", "tjbhc")
            around = (
                (0, 0, 0),
                (p, pieces - 1 - p, 0),
                (0, w.step - x.shape[2], 0),
                (0, 0, 0),
                (0, 0, 0),
            )
            total = total + lax.pad(x, jnp.zeros((), x.dtype), around)
        x = total.astype(out).reshape(total.shape[0], -1, *total.shape[3:])
        before = 0 if w.tiles == 1 else w.kernel // 2
        return x[:, before : before + w.size]

    def planes_of_kernel(self, kernel: jax.Array) -> jax.Array:
        planes = self.apply("kernel", self.packed(kernel, "ij"), SPECTRUM)
        return self.packed(planes, f"f{self._v}g")

    def gradient_of_kernel(self, planes: jax.Array, out: jnp.dtype) -> jax.Array:
        return self.packed(self.apply("kernel", planes, out, transposed=True), "ij")

    def packed(self, value: jax.Array, letters: str) -> jax.Array:
        """A kernel or its planes, (`letters`, C, D), with the channels innermost, in the order that
        pads least. A compiler would put taps innermost, where it pads 9 to 16."""
        c, d = self._channels
        turned = padded(d, 8) * padded(c, 128) < padded(c, 8) * padded(d, 128)
        return self.order(value, letters + "cd", letters + ("dc" if turned else "cd"))

    def order(self, value: jax.Array, letters: str, memory: str) -> jax.Array:
        """The array, whose dimensions are `letters`, written in the order `memory`, the innermost
        last."""
        if not self._ordered:
            return written(value)
        return with_layout_constraint(
            value, Layout(major_to_minor=tuple(map(letters.index, memory)))
        )

    def product(self, x_planes: jax.Array, k_planes: jax.Array) -> jax.Array:
        return written(
            multiply(f"f{self._x}gstbc,f{self._v}gcd->f{self._p}gstbd", x_planes, k_planes)
        )

    def product_to_x(self, dp: jax.Array, k_planes: jax.Array) -> jax.Array:
        return written(multiply(f"f{self._p}gstbd,f{self._v}gcd->f{self._x}gstbc", dp, k_planes))

    def product_to_kernel(self, x_planes: jax.Array, dp: jax.Array) -> jax.Array:
        planes = multiply(f"f{self._x}gstbc,f{self._p}gstbd->f{self._v}gcd", x_planes, dp)
        return self.packed(planes, f"f{self._v}g")


def _grid_first(x_BxHxWxC: jax.Array, turned: bool) -> jax.Array:
    return x_BxHxWxC.transpose(2, 1, 0, 3) if turned else x_BxHxWxC.transpose(1, 2, 0, 3)


def _batch_first(x: jax.Array, turned: bool) -> jax.Array:
    return x.transpose(2, 1, 0, 3) if turned else x.transpose(2, 0, 1, 3)


def _turned(kernel: jax.Array, h: Axis, w: Axis) -> tuple[bool, jax.Array, Axis, Axis]:
    """Whether the grid axes change places, so that rows run along the shorter one; and what belongs
    to them."""
    return (True, kernel.swapaxes(0, 1), w, h) if h.size > w.size else (False, kernel, h, w)


def forward(x: jax.Array, kernel: jax.Array, h: Axis, w: Axis, ordered: bool) -> jax.Array:
    """x (B, H, W, C), kernel (k, k, C, D) -> y (B, H, W, D), of x's type.

    ordered: give the compiler the memory order of large arrays.
    """
    turned, kernel, h, w = _turned(kernel, h, w)
    maps = Transforms(h, w, x.shape[0], kernel.shape[2:], ordered)
    products = maps.product(maps.planes_of_x(_grid_first(x, turned)), maps.planes_of_kernel(kernel))
    # (H, tiles, step, B, D)
    y = maps.apply("y_rows", maps.apply("y_columns", products, BETWEEN), x.dtype)
    return _batch_first(y.reshape(h.size, -1, *y.shape[3:])[:, : w.size], turned)


def backward(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, h: Axis, w: Axis, ordered: bool
) -> tuple[jax.Array, jax.Array]:
    """(dx, dkernel) of `forward` for dy (B, H, W, D)."""
    turned, kernel, h, w = _turned(kernel, h, w)
    maps = Transforms(h, w, x.shape[0], kernel.shape[2:], ordered)
    x, dy = _grid_first(x, turned), _grid_first(dy, turned)
    dy = jnp.pad(dy, ((0, 0), (0, w.tiles * w.step - w.size), (0, 0), (0, 0)))
    dy = dy.reshape(h.size, w.tiles, w.step, *dy.shape[2:])
    dz = maps.order(maps.apply("y_rows", dy, BETWEEN, transposed=True), "fpjstbd", "tjbspfd")
    dp = written(maps.apply("y_columns", dz, SPECTRUM, transposed=True))
    dk_planes = maps.product_to_kernel(maps.planes_of_x(x), dp)
    dkernel = maps.gradient_of_kernel(dk_planes, kernel.dtype)
    # The kernel's gradient first, then its planes, made anew, then the next convolution: a compiler
    # that is free would hold both sets of planes, those of all forward passes, and gradients put
    # off (docs/PERFORMANCE.md). The planes of x are smaller and cost more to make again.
    dkernel, dp, kernel = lax.optimization_barrier((dkernel, dp, kernel))
    dx_planes = maps.product_to_x(dp, maps.planes_of_kernel(kernel))
    dx = maps.planes_of_x_transposed(dx_planes, x.dtype)
    dx, dkernel = lax.optimization_barrier((dx, dkernel))
    return _batch_first(dx, turned), dkernel.swapaxes(0, 1) if turned else dkernel


def steps(
    h: Axis, w: Axis, batch: int, c: int, d: int, gradient: bool
) -> list[tuple[float, float]]:
    """(multiply-accumulates, bytes) of every matrix product of `forward` or `backward`, and of the
    copies between them."""
    h, w = (w, h) if h.size > w.size else (h, w)
    f, k, tiles = h.t // 2 + 1, h.kernel, batch * h.tiles * w.tiles
    frequencies = f * w.t
    wide_x, wide_k = (4, 2) if form_of(h, w, batch, d) == WIDE_DATA else (2, 4)
    lanes_c, lanes_d = padded(c, 128), padded(d, 128)
    kernel = min(padded(c, 8) * lanes_d, padded(d, 8) * lanes_c)
    # Positions of the data, of its tiles, and of half-transformed tiles; planes times tiles.
    x, y = batch * h.size * w.size, batch * h.size * w.tiles * w.step
    cuts = 0 if w.tiles == 1 else batch * h.size * w.tiles * w.width
    zx, zy = (2 * f * h.tiles * batch * w.tiles * width for width in (w.width, w.step))
    px, pk, py = wide_x * frequencies * tiles, wide_k * frequencies, 2 * frequencies * tiles
    of_x = [
        (zx * h.size * c, (2 * (cuts or x) + 4 * zx) * lanes_c),
        (px * 2 * w.width * c, (4 * zx + 2 * px) * lanes_c),
    ]
    of_y = [
        (zy * 2 * w.t * d, (2 * py + 4 * zy) * lanes_d),
        (zy * h.size * d, (4 * zy + 2 * y) * lanes_d),
    ]
    of_kernel = [(pk * k * k * c * d, (4 * k * k + 2 * pk) * kernel)]
    product = [(4 * frequencies * tiles * c * d, 2 * (px * lanes_c + pk * kernel + py * lanes_d))]
    copies = [(0, 2 * (3 * x + 2 * cuts) * lanes_c)] if cuts else []
    if w.tiles * w.step > w.size:
        copies += [(0, 4 * y * lanes_d)]
    if not gradient:
        return of_x + of_kernel + of_y + product + copies
    overlap = [(0, 6 * (x + cuts) * lanes_c)] if cuts else []
    return 2 * (of_x + of_kernel + product) + of_y + copies + overlap


def direct_bytes(positions: int, c: int, d: int) -> float:
    """Bytes of data that the direct method moves; there the kernel adds nothing worth counting."""
    return 2.0 * positions * (padded(c, 8) + padded(d, 8))
