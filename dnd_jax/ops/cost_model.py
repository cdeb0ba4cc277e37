"""What a convolution costs by each method and tiling: a model over its shapes, type and platform.

The model counts, for every way to cut the grid into tiles, the operations and bytes of
dnd_jax/ops/dft.py and divides them by rates (dnd_jax/ops/rates.py); a gradient counts the
transposed maps too. A method other than the direct one must promise a gain of MARGIN, since a wrong
guess costs more than a missed one. dnd_jax/ops/choice.py asks it; dnd_jax/ops/tune.py measures
instead.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp

from dnd_jax.ops import dft_tpu
from dnd_jax.ops.dft import Arithmetic
from dnd_jax.ops.rates import RATES, Rates
from dnd_jax.ops.tiles import Axis

Tiling = tuple[int, int]  # tiles along each grid axis
MARGIN = 1.15  # predicted gain below which the direct method stays
LARGEST_TRANSFORM = 64  # points
LOOP_BYTES = 4 << 30  # of planes, beyond which a GPU makes them one row frequency at a time
MOST_CHUNKS = 64
CHUNK_BYTES = 128 << 20  # of half-transformed kernel held at once on a CPU
MOST_TERMS = 72  # of the sum that SHIFTED writes out
SHIFTED = "shifted"
Way = Tiling | str | None  # tile by tile in the Fourier domain; SHIFTED; directly


@dataclasses.dataclass(frozen=True)
class ConvPlan:
    """How one convolution's output and both its gradients are computed. SHIFTED as a way of the
    gradients is that of x; the kernel's is computed directly then."""

    forward: Way
    backward: Way
    platform: str
    looped: bool = True
    chunks: int = 1
    ordered: bool = False  # give a TPU's compiler the memory order of large arrays

    @property
    def direct(self) -> bool:
        """Whether all is left to the compiler."""
        return self.forward is None and self.backward is None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution's shapes: grid (height, width), kernel k, channels C -> D, of a type on a
    platform."""

    batch: int
    height: int
    width: int
    channels_in: int
    channels_out: int
    kernel: int
    dtype: str
    platform: str

    @classmethod
    def of(cls, x, kernel, axis: int, platform: str) -> "Problem":
        """From arrays or shapes as `convolve` takes them."""
        height, width = (x.shape[a] for a in (1, 2, 3) if a != axis)
        k, _, channels_in, channels_out = kernel.shape
        return cls(
            x.shape[0],
            height,
            width,
            channels_in,
            channels_out,
            k,
            jnp.dtype(x.dtype).name,
            platform,
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the direct method."""
        grid = self.batch * self.height * self.width
        return grid * self.kernel**2 * self.channels_in * self.channels_out

    def axes(self, tiling: Tiling) -> tuple[Axis, Axis]:
        return Axis(self.height, self.kernel, tiling[0]), Axis(self.width, self.kernel, tiling[1])


def arithmetic(dtype, platform: str) -> Arithmetic:
    """The types inside a transform.

    float64 and float32 stay what they are. 16-bit data: a CPU computes in float32; a GPU in
    float16, scaled, whose 11 bits lose nothing that bfloat16's 8 would show; a TPU does as
    dnd_jax/ops/dft_tpu.py says.
    """
    dtype, f32 = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    if dtype.itemsize >= 4:
        return Arithmetic(dtype, dtype, dtype)
    if platform == "gpu":
        return Arithmetic(jnp.dtype(jnp.float16), jnp.dtype(jnp.float16), f32, scaled=True)
    return Arithmetic(f32, f32, f32)


def on_tpu(dtype, platform: str) -> bool:
    """Whether the algorithm is that of dnd_jax/ops/dft_tpu.py."""
    return platform == "tpu" and jnp.dtype(dtype).itemsize == 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiply-accumulates and bytes of one tiling, by direction."""

    products: float
    transforms: float
    bytes: float
    planes: float  # bytes of all planes at once
    kernel_rows: float  # bytes of the half-transformed kernel
    turns: int

    def seconds(self, rates: Rates) -> float:
        """Time by the platform's rates."""
        return (
            2 * self.products / rates.product
            + 2 * self.transforms / rates.transform
            + self.bytes / rates.memory
            + self.turns * rates.turn
        )


def dft_cost(problem: Problem, tiling: Tiling, gradient: bool) -> Cost:
    """The cost of `dft.forward`, or of `dft.backward`, under a tiling."""
    h, w = problem.axes(tiling)
    a = arithmetic(problem.dtype, problem.platform)
    c, d, k = problem.channels_in, problem.channels_out, problem.kernel
    tiles = problem.batch * h.tiles * w.tiles
    f = h.t // 2 + 1
    frequencies = f * w.t
    # Elements of every array, and the multiply-accumulates of every map.
    x_tiles, y_tiles = h.width * w.width * tiles * c, h.step * w.step * tiles * d
    zx, zk, zy = 2 * f * w.width * tiles * c, 2 * f * k * c * d, 2 * f * w.step * tiles * d
    px, pk, py = (3 * frequencies * n for n in (tiles * c, c * d, tiles * d))
    of_x = zx * h.width + 2 * px * w.width
    of_k = zk * k + 2 * pk * k
    of_y = zy * h.step + 2 * py * w.step
    between, spectrum, product = (t.itemsize for t in (a.between, a.spectrum, a.product))
    lanes = RATES[problem.platform].lanes
    padded_c, padded_d = (-(-n // lanes) * lanes / n for n in (c, d))

    def moved(half: int) -> float:  # of data and kernel one way; half: bytes of a number of zx, zk
        of_data = (2 * (x_tiles + zx) * half + 2 * px * spectrum) * padded_c
        return of_data + ((k * k * c * d * 4) + 2 * zk * half + 2 * pk * spectrum) * padded_d

    bytes_y = 2 * (y_tiles + zy + py) * product * padded_d
    every = 2 if gradient else 1
    return Cost(
        products=every * 3 * frequencies * tiles * c * d,
        transforms=every * (of_x + of_k) + of_y,
        bytes=moved(between) + (moved(product) if gradient else 0) + bytes_y,
        planes=(px + pk) * spectrum + py * product,
        kernel_rows=zk * between,
        turns=f,
    )


def dft_work(problem: Problem, tiling: Tiling, gradient: bool) -> list[tuple[float, float]]:
    """(multiply-accumulates, bytes) of what runs one after the other under a tiling: a single entry
    but on a TPU."""
    if on_tpu(problem.dtype, problem.platform):
        return dft_tpu.steps(
            *problem.axes(tiling),
            problem.batch,
            problem.channels_in,
            problem.channels_out,
            gradient,
        )
    cost = dft_cost(problem, tiling, gradient)
    return [(cost.products + cost.transforms, cost.bytes)]


def dft_seconds(problem: Problem, tiling: Tiling, gradient: bool, rates: Rates) -> float:
    """The time of a tiling. A TPU's compiler counts a step as its operations or its bytes,
    whichever take longer."""
    if on_tpu(problem.dtype, problem.platform):
        return sum(
            max(2 * macs / rates.product, moved / rates.memory)
            for macs, moved in dft_work(problem, tiling, gradient)
        )
    return dft_cost(problem, tiling, gradient).seconds(rates)


def direct_seconds(problem: Problem, gradient: bool, rates: Rates) -> float:
    """The time of the direct method."""
    fewest = min(problem.channels_in, problem.channels_out)
    flop = 2 * problem.macs / min(1.0, fewest / rates.full_channels)
    if on_tpu(problem.dtype, problem.platform):
        moved = dft_tpu.direct_bytes(
            problem.batch * problem.height * problem.width,
            problem.channels_in,
            problem.channels_out,
        )
        return (2 if gradient else 1) * max(flop / rates.direct, moved / rates.memory)
    return flop / rates.direct + (_kernel_gradient_seconds(problem, rates) if gradient else 0)


def _kernel_gradient_seconds(problem: Problem, rates: Rates) -> float:
    """The time of the kernel's gradient by the direct method, but on a TPU."""
    fewest = min(problem.channels_in, problem.channels_out)
    flop = 2 * problem.macs / min(1.0, fewest / rates.full_channels_gradient)
    return flop / rates.direct_kernel_gradient


def can_shift(problem: Problem, gradient: bool) -> bool:
    """Whether there is SHIFTED: it is written for CPUs and float32, of few channels in, which for
    the gradient of x are the channels out."""
    channels = problem.channels_out if gradient else problem.channels_in
    wide = jnp.dtype(problem.dtype).itemsize >= 4
    return problem.platform == "cpu" and wide and problem.kernel**2 * channels <= MOST_TERMS


def shifted_seconds(problem: Problem, gradient: bool, rates: Rates) -> float:
    """The time of SHIFTED, inf where there is no such way."""
    if not can_shift(problem, gradient):
        return math.inf
    channels = problem.channels_out if gradient else problem.channels_in
    output = 2 * problem.macs * (1 + channels / rates.shifted_channels) / rates.shifted
    return output + _kernel_gradient_seconds(problem, rates) if gradient else output


def seconds(problem: Problem, way: Way, gradient: bool, rates: Rates) -> float:
    """The time of the output, or of both gradients, computed this way."""
    if way is None:
        return direct_seconds(problem, gradient, rates)
    if way == SHIFTED:
        return shifted_seconds(problem, gradient, rates)
    return dft_seconds(problem, way, gradient, rates)


def _tile_counts(size: int, kernel: int) -> list[int]:
    """Numbers of tiles worth trying along an axis: of different steps, with transforms that are not
    too long."""
    counts = {-(-size // -(-size // n)) for n in range(1, size + 1)}
    fitting = [n for n in counts if Axis(size, kernel, n).t <= LARGEST_TRANSFORM]
    return sorted(fitting) or [max(counts)]


def tilings(problem: Problem) -> list[Tiling]:
    """All tilings worth considering."""
    counts = (_tile_counts(size, problem.kernel) for size in (problem.height, problem.width))
    return list(itertools.product(*counts))


def cheapest_first(problem: Problem, gradient: bool, rates: Rates) -> list[Tiling]:
    """`tilings`, those that promise the least time first."""
    return sorted(
        tilings(problem), key=lambda tiling: (dft_seconds(problem, tiling, gradient, rates), tiling)
    )


def best_way(problem: Problem, gradient: bool, rates: Rates, only_dft: bool) -> Way:
    """The way that promises the least time; only_dft: of all tilings."""
    best = cheapest_first(problem, gradient, rates)[0]
    if only_dft:
        return best
    times = {way: seconds(problem, way, gradient, rates) for way in (best, None, SHIFTED)}
    times[None] /= MARGIN
    return min(times, key=times.get)


def with_memory(problem: Problem, forward: Way, backward: Way) -> ConvPlan:
    """Adds to tilings how their arrays are kept small enough."""
    costs = [
        dft_cost(problem, way, gradient)
        for gradient, way in enumerate((forward, backward))
        if way not in (None, SHIFTED)
    ]
    cpu = problem.platform == "cpu"
    looped = cpu or (problem.platform == "gpu" and any(cost.planes > LOOP_BYTES for cost in costs))
    ordered = problem.platform == "tpu"
    chunks = 1
    if cpu:
        held = max((cost.kernel_rows for cost in costs), default=0)
        divisors = [n for n in range(1, MOST_CHUNKS + 1) if problem.channels_out % n == 0]
        chunks = next((n for n in divisors if held / n <= CHUNK_BYTES), divisors[-1])
    return ConvPlan(forward, backward, problem.platform, looped, chunks, ordered)


def only(problem: Problem, way: Way, gradient: bool) -> ConvPlan:
    """The plan whose output, or whose gradients, are computed this way, and the rest directly."""
    return with_memory(problem, *((None, way) if gradient else (way, None)))
