"""Which method and which tiles a convolution uses: a cost model over its shapes, type and platform,
or what was measured here.

The model counts, for every way to cut the grid into tiles, the operations and bytes of
dnd_jax/ops/dft.py and divides them by the rates of the platform (`RATES`, measured or the
compiler's); a gradient counts the transposed maps too. A method other than the direct one must
promise a gain of MARGIN, since a wrong guess costs more than a missed one. dnd_jax/ops/tune.py
measures instead.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dnd_jax.config.choices import METHODS
from dnd_jax.core.files import cache_folder, read_object
from dnd_jax.ops import dft_tpu
from dnd_jax.ops.dft import Arithmetic
from dnd_jax.ops.tiles import Axis

Tiling = tuple[int, int]  # tiles along each grid axis
MARGIN = 1.15  # predicted gain below which the direct method stays
LARGEST_TRANSFORM = 64  # points
LOOP_BYTES = 4 << 30  # of planes, beyond which a GPU makes them one row frequency at a time
MOST_CHUNKS = 64
CHUNK_BYTES = 128 << 20  # of half-transformed kernel held at once on a CPU


@dataclasses.dataclass(frozen=True)
class ConvPlan:
    """How one convolution is computed. None: directly; else the tiling of the output's or of both
    gradients' transforms."""

    forward: Tiling | None
    backward: Tiling | None
    platform: str
    looped: bool = True
    chunks: int = 1
    ordered: bool = False  # give a TPU's compiler the memory order of large arrays

    @property
    def direct(self) -> bool:
        """Whether nothing is transformed."""
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


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a platform achieves: operations and bytes a second."""

    direct: float  # convolution, and its input gradient
    direct_kernel_gradient: float
    product: float  # batched matrix products over channels
    transform: float  # products with the small DFT matrices
    memory: float  # bytes a second
    # Channels from which on the direct convolution reaches its rate; below, in proportion.
    full_channels: int
    full_channels_gradient: int  # the same of its kernel's gradient
    lanes: int = 1  # the innermost dimension of an array takes a multiple of this
    turn: float = 0.0  # seconds for one turn of the loop over row frequencies


# cpu: two cores of a Zen 4 server, fitted to `dnd bench` and, for 3 x 3 kernels on small grids, to
# `dnd bench --layers` of mini and smollm2_135m_skills; only ratios matter, which are those of
# float32, in which a CPU computes 16-bit data too. tpu: v5p, bfloat16, by the compiler's estimate.
# gpu: guessed from an H100's data sheet, bfloat16; "auto" does not go by them.
GUESSED = ("gpu",)
RATES = {
    "cpu": Rates(170e9, 33e9, 110e9, 60e9, 10e9, 40, 20, turn=1e-4),
    "gpu": Rates(400e12, 350e12, 400e12, 60e12, 2.4e12, 64, 64),
    "tpu": Rates(394e12, 394e12, 394e12, 100e12, 2.35e12, 1, 1, lanes=128),
}


def compiler_options(platform: str, deterministic: bool = False) -> dict[str, Any] | None:
    """Options for jax.jit of a program made of convolutions. A CPU runs them one after the other:
    each uses all cores anyway, and side by side their arrays took half as much memory again (`dnd
    bench`). deterministic: a GPU then adds in one order, and chooses no algorithm by measuring."""
    return {
        "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
        "gpu": {"xla_gpu_deterministic_ops": True} if deterministic else None,
    }.get(platform)


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


def dft_seconds(problem: Problem, tiling: Tiling, gradient: bool) -> float:
    """The time of a tiling. A TPU's compiler counts a step as its operations or its bytes,
    whichever take longer."""
    rates = RATES[problem.platform]
    if on_tpu(problem.dtype, problem.platform):
        return sum(
            max(2 * macs / rates.product, moved / rates.memory)
            for macs, moved in dft_work(problem, tiling, gradient)
        )
    return dft_cost(problem, tiling, gradient).seconds(rates)


def direct_seconds(problem: Problem, gradient: bool) -> float:
    """The time of the direct method."""
    rates = RATES[problem.platform]
    fewest = min(problem.channels_in, problem.channels_out)
    flop = 2 * problem.macs / min(1.0, fewest / rates.full_channels)
    if on_tpu(problem.dtype, problem.platform):
        moved = dft_tpu.direct_bytes(
            problem.batch * problem.height * problem.width,
            problem.channels_in,
            problem.channels_out,
        )
        return (2 if gradient else 1) * max(flop / rates.direct, moved / rates.memory)
    if not gradient:
        return flop / rates.direct
    of_kernel = 2 * problem.macs / min(1.0, fewest / rates.full_channels_gradient)
    return flop / rates.direct + of_kernel / rates.direct_kernel_gradient


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


def best_tiling(problem: Problem, gradient: bool) -> tuple[Tiling, float]:
    """The cheapest tiling by the model and its seconds."""
    seconds, tiling = min(
        (dft_seconds(problem, tiling, gradient), tiling) for tiling in tilings(problem)
    )
    return tiling, seconds


def choose(problem: Problem, method: str = "auto") -> ConvPlan:
    """The plan of a convolution. Raises ValueError for an unknown method."""
    if method == "tuned":
        found = tuned(problem)
        return found if found is not None else choose(problem)
    return _by_model(problem, method)


@functools.lru_cache(maxsize=1024)
def _by_model(problem: Problem, method: str) -> ConvPlan:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if problem.platform not in RATES:
        raise ValueError(f"platform {problem.platform!r} is none of {', '.join(RATES)}")
    if method == "direct" or (method == "auto" and problem.platform in GUESSED):
        return ConvPlan(None, None, problem.platform)
    found = {}
    for gradient in (False, True):
        tiling, seconds = best_tiling(problem, gradient)
        wins = method == "dft" or seconds * MARGIN < direct_seconds(problem, gradient)
        found[gradient] = tiling if wins else None
    return with_memory(problem, found[False], found[True])


def with_memory(problem: Problem, forward: Tiling | None, backward: Tiling | None) -> ConvPlan:
    """Adds to tilings how their arrays are kept small enough."""
    costs = [
        dft_cost(problem, tiling, gradient)
        for gradient, tiling in enumerate((forward, backward))
        if tiling
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


def describe(problems: Iterable[Problem], method: str) -> str:
    """How many convolutions are computed which way, output / gradients: "3 dft / dft, 2 direct /
    dft"."""
    names = {True: "dft", False: "direct"}
    plans = [choose(problem, method) for problem in problems]
    counts = Counter(
        f"{names[p.forward is not None]} / {names[p.backward is not None]}" for p in plans
    )
    return ", ".join(f"{count} {way}" for way, count in counts.most_common())


def cache_file() -> pathlib.Path:
    """Where measurements are kept."""
    return cache_folder() / "convolutions.json"


def key(problem: Problem) -> str:
    """A problem's name in the cache, this device and JAX version included."""
    p = problem
    shape = (
        f"{p.batch}x{p.height}x{p.width} {p.channels_in}->{p.channels_out} k{p.kernel} {p.dtype}"
    )
    return f"{jax.devices()[0].device_kind} jax {jax.__version__} {shape}"


def tuned(problem: Problem) -> ConvPlan | None:
    """The measured plan, or None when this device has not measured the problem."""
    path = cache_file()
    fastest = (read_object(path) if path.is_file() else {}).get(key(problem))
    if fastest is None:
        return None
    return with_memory(problem, *(tuple(tiling) if tiling else None for tiling in fastest))
