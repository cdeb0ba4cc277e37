"""The tiles of the algorithm of dnd_jax/ops/dft.py: how an axis of a grid is cut into them, and the
matrices of one tile's transforms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Axis:
    """One grid axis cut into tiles. Each makes `step` outputs from `width` inputs by a transform of
    t points."""

    size: int
    kernel: int
    tiles: int

    @property
    def step(self) -> int:
        return -(-self.size // self.tiles)

    @property
    def t(self) -> int:
        return self.size + self.kernel // 2 if self.tiles == 1 else self.step + self.kernel - 1

    @property
    def width(self) -> int:
        return self.size if self.tiles == 1 else self.t

    @property
    def first(self) -> int:
        """Position of a tile's first input inside its transform."""
        return self.kernel // 2 if self.tiles == 1 else 0


# How a complex product is made of real ones: three (Gauss), or four, with one factor's planes (re,
# im) and the other, the kernel or the data, as the real 2 x 2 matrix of a complex number: a third
# more work, fewer bytes, half the rounding error.
GAUSS, WIDE_KERNEL, WIDE_DATA = "gauss", "wide kernel", "wide data"


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The bilinear algorithm of a tile, float64: A = (x_rows, x_columns), K = (k_rows, k_columns),
    S = (y_columns, y_rows)."""

    x_rows: np.ndarray  # (f, p, width_h)
    x_columns: np.ndarray  # ([o,] q, g, p, width_w)
    k_rows: np.ndarray  # (f, p, k)
    k_columns: np.ndarray  # ([o,] q, g, p, k)
    y_columns: np.ndarray  # (p, step_w, o, g); o is q with Gauss
    y_rows: np.ndarray  # (step_h, f, p)


@functools.lru_cache(maxsize=256)
def matrices(h: Axis, w: Axis, form: str) -> Matrices:
    """The transforms of one tile size. Both ways are scaled by 1/sqrt(t_h t_w), so that planes stay
    as large as the data."""
    f, g = np.arange(h.t // 2 + 1), np.arange(w.t)
    scale_h, scale_w = h.t**-0.5, w.t**-0.5

    def rows(positions, sign):
        angle = 2 * np.pi * np.outer(f, positions) / h.t
        return np.stack([np.cos(angle), sign * np.sin(angle)], axis=1)

    def columns(positions, sign):
        angle = 2 * np.pi * np.outer(g, positions) / w.t
        cos, sin = np.cos(angle), sign * np.sin(angle)
        # real and imaginary part, each (g, p, position)
        return np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)

    out = np.arange(w.step)
    angle = 2 * np.pi * np.outer(out, g) / w.t
    cos, sin = np.cos(angle), np.sin(angle)
    x_re, x_im = columns(w.first + np.arange(w.width), -1)
    k_re, k_im = columns(np.arange(w.kernel), 1)
    if form == GAUSS:  # re = product 0 - product 1, im = product 2 - product 0 - product 1
        re, im = [cos + sin, sin - cos, -sin], [sin - cos, -sin - cos, cos]
        x_columns, k_columns = [x_re, x_im, x_re + x_im], [k_re, k_im, k_re + k_im]
    else:
        re, im = [cos, -sin], [sin, cos]
        x_columns, k_columns = [x_re, x_im], [k_re, k_im]
        if form == WIDE_KERNEL:
            k_columns = [[k_re, -k_im], [k_im, k_re]]
        else:
            x_columns = [[x_re, -x_im], [x_im, x_re]]
    angle = 2 * np.pi * np.outer(np.arange(h.step), f) / h.t
    twice = np.where((f == 0) | (2 * f == h.t), 1.0, 2.0)  # the conjugate half of row frequencies
    return Matrices(
        x_rows=rows(h.first + np.arange(h.width), -1) * scale_h,
        x_columns=np.stack(x_columns) * scale_w,
        k_rows=rows(np.arange(h.kernel), 1),
        k_columns=np.stack(k_columns),
        y_columns=np.stack([np.stack(re, axis=1), np.stack(im, axis=1)]) * scale_w,
        y_rows=np.stack([np.cos(angle) * twice, -np.sin(angle) * twice], axis=2) * scale_h,
    )


def cut(x: jax.Array, axis: int, a: Axis) -> jax.Array:
    """(..., size, ...) -> (..., tiles, width, ...), overlapping by k - 1 and padded with zeros
    outside the grid."""
    if a.tiles == 1:
        return jnp.expand_dims(x, axis)
    pieces = -(-a.t // a.step)  # of a tile: itself and what it borrows from those that follow
    padding = [(0, 0)] * x.ndim
    before = a.kernel // 2
    padding[axis] = (before, (a.tiles + pieces - 1) * a.step - before - a.size)
    x = jnp.pad(x, padding)
    parts = []
    for piece in range(pieces):
        part = lax.slice_in_dim(x, piece * a.step, (piece + a.tiles) * a.step, axis=axis)
        part = part.reshape(*x.shape[:axis], a.tiles, a.step, *x.shape[axis + 1 :])
        parts.append(lax.slice_in_dim(part, 0, min(a.step, a.t - piece * a.step), axis=axis + 1))
    return jnp.concatenate(parts, axis=axis + 1)
