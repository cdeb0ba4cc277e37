"""The Fourier method against the direct one: values and gradients on random shapes, every type,
chunks, meshes, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dnd_jax.ops import cost_model
from dnd_jax.ops.choice import choose
from dnd_jax.ops.convolution import convolve, direct
from dnd_jax.ops.cost_model import SHIFTED, ConvPlan, Problem, dft_work, tilings
from dnd_jax.parallel.programs import compiler_options


def relative(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300)


def arrays(shape, axis: int, k: int, out: int, seed: int = 0):
    """float64 (x, kernel, gradient of y) of one convolution."""
    rng = np.random.default_rng(seed)
    kernel = (k, k, shape[axis], out)
    y = tuple(out if a == axis else size for a, size in enumerate(shape))
    return tuple(rng.normal(size=s) for s in (shape, kernel, y))


def value_and_gradients(function, x, kernel, dy, **options):
    def run(x, kernel, dy):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(dy)

    return jax.jit(run, compiler_options=options)(x, kernel, dy)


def exact(values, axis: int):
    """The direct method and its gradients in float64."""
    with jax.enable_x64(True):
        found = value_and_gradients(functools.partial(direct, axis=axis), *map(jnp.asarray, values))
        return tuple(map(np.asarray, found))


@st.composite
def problems(draw):
    """(shape, axis, k, channels out, tiles): grids down to 1 x 1 and smaller than the kernel."""
    axis = draw(st.sampled_from([1, 2, 3]))
    shape = [draw(st.integers(1, 3)), *(draw(st.integers(1, 24)) for _ in range(3))]
    shape[axis] = draw(st.integers(1, 64))
    grid = [size for a, size in enumerate(shape) if a not in (0, axis)]
    tiles = tuple(draw(st.integers(1, size)) for size in grid)
    return (
        tuple(shape),
        axis,
        draw(st.sampled_from([1, 3, 5, 7, 9, 11])),
        draw(st.integers(1, 64)),
        tiles,
    )


@pytest.mark.slow
@settings(max_examples=12)
@given(problems(), st.booleans(), st.integers(0, 2**32 - 1))
@example(((1, 1, 1, 1), 3, 11, 1, (1, 1)), True, 0)
@example(((2, 3, 2, 64), 3, 11, 64, (3, 2)), False, 1)
def test_float32_is_as_exact_as_rounding_allows(problem, looped, seed):
    shape, axis, k, out, tiles = problem
    values = arrays(shape, axis, k, out, seed)
    values32 = [v.astype(np.float32) for v in values]
    chunks = max(n for n in (1, 2, 3) if out % n == 0)
    for plan in (
        ConvPlan(tiles, tiles, "cpu", looped, chunks),
        ConvPlan(tiles, None, "cpu", looped),
    ):
        found = value_and_gradients(
            lambda x, w, plan=plan: convolve(x, w, axis, plan), *map(jnp.asarray, values32)
        )
        expected = exact(values32, axis)
        assert [v.dtype for v in found] == [jnp.float32] * 3
        for actual, right, tolerance in zip(found, expected, (2e-6, 1e-5, 1e-5), strict=True):
            assert actual.shape == right.shape and relative(actual, right) < tolerance


@settings(max_examples=4)
@given(problems(), st.booleans())
def test_float64(problem, looped):
    shape, axis, k, out, tiles = problem
    values = arrays(shape, axis, k, out)
    with jax.enable_x64(True):
        plan = ConvPlan(tiles, tiles, "cpu", looped)
        found = value_and_gradients(
            lambda x, w: convolve(x, w, axis, plan), *map(jnp.asarray, values)
        )
        assert all(relative(a, b) < 1e-13 for a, b in zip(found, exact(values, axis), strict=True))


@settings(max_examples=6)
@given(problems(), st.integers(0, 2**32 - 1))
@example(((2, 1, 3, 5), 3, 3, 4, (1, 1)), 0)
@example(((1, 3, 1, 2), 1, 5, 1, (1, 1)), 1)
def test_the_direct_methods_order_on_a_cpu_changes_nothing(problem, seed):
    shape, axis, k, out, _ = problem
    values = arrays(shape, axis, k, out, seed)
    found = value_and_gradients(
        lambda x, w: convolve(x, w, axis, "direct", "cpu"),
        *(jnp.asarray(v, jnp.float32) for v in values),
    )
    for actual, right in zip(found, exact(values, axis), strict=True):
        assert actual.shape == right.shape and relative(actual, right) < 5e-6


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's convolution on CPUs")
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_no_convolution_in_a_loop_has_an_order_that_is_slow_there(axis):
    """On a CPU XLA turns the order of those alone that stand in no loop; another one in a loop took
    50 times as long."""
    x, kernel, dy = map(jnp.asarray, arrays((2, 8, 16, 12), axis, 3, 6))

    def gradients(x, kernel, dy):
        one = lambda x, dy: jax.vjp(lambda *a: convolve(*a, axis, "direct"), x, kernel)[1](dy)
        return jax.lax.map(lambda parts: one(*(p[None] for p in parts)), (x, dy))

    text = jax.jit(gradients).lower(x, kernel, dy).compile().as_text()
    found = [line for line in text.splitlines() if " convolution(" in line]
    assert len(found) == 2 and " while(" in text
    assert all("dim_labels=b01f_01io->b01f" in line for line in found)


@settings(max_examples=6)
@given(problems(), st.integers(0, 2**32 - 1))
@example(((2, 1, 3, 5), 3, 3, 4, (1, 1)), 0)
@example(((1, 3, 1, 2), 1, 5, 1, (1, 1)), 1)
def test_shifted_is_as_exact_as_rounding_allows(problem, seed):
    """Output and both gradients, for any grid and kernel, of as many channels as it is taken
    for."""
    shape, axis, k, out, _ = problem
    most = max(1, cost_model.MOST_TERMS // k**2)
    shape, out = [min(n, most) if a == axis else n for a, n in enumerate(shape)], min(out, most)
    values32 = [v.astype(np.float32) for v in arrays(tuple(shape), axis, k, out, seed)]
    plan = ConvPlan(SHIFTED, SHIFTED, "cpu")
    found = value_and_gradients(
        lambda x, w: convolve(x, w, axis, plan),
        *map(jnp.asarray, values32),
        **compiler_options("cpu"),
    )
    for actual, right in zip(found, exact(values32, axis), strict=True):
        assert actual.dtype == jnp.float32 and actual.shape == right.shape
        assert relative(actual, right) < 2e-6


BF16_PROBLEM = ((2, 20, 24, 64), 3, 9, 48, (2, 3))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_bfloat16_loses_no_more_than_the_direct_method(platform):
    """Against float64 on the same bfloat16 values: even there, where direct rounds nothing but its
    output. "gpu" is its float16 arithmetic, run here."""
    shape, axis, k, out, tiles = BF16_PROBLEM
    values = [jnp.asarray(v, jnp.bfloat16) for v in arrays(shape, axis, k, out)]
    expected = exact([np.asarray(v).astype(np.float64) for v in values], axis)
    plain = value_and_gradients(functools.partial(direct, axis=axis), *values)
    ours = value_and_gradients(
        lambda x, w: convolve(x, w, axis, ConvPlan(tiles, tiles, platform)), *values
    )
    for one, other, right in zip(ours, plain, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert relative(one, right) <= 1.3 * relative(other, right)


@pytest.mark.parametrize("tiles", [(2, 3), (10, 12)])
def test_bfloat16_of_a_tpu(tiles):
    """A TPU multiplies bfloat16 planes: within 1.3 of the direct method when both start from the
    float32 kernel of training (it is rounded once by either, as a kernel or as planes). The tilings
    have fewer, and more, tiles than output channels."""
    shape, axis, k, out, _ = BF16_PROBLEM
    x, kernel, dy = arrays(shape, axis, k, out)
    values = (
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(kernel, jnp.float32),
        jnp.asarray(dy, jnp.bfloat16),
    )
    expected = exact((x, kernel, dy), axis)

    def run(method):
        # Without this option a CPU skips the very roundings that a TPU makes.
        return value_and_gradients(
            lambda x, w: convolve(x, w, axis, method), *values, xla_allow_excess_precision=False
        )

    ours, plain = run(ConvPlan(tiles, tiles, "tpu", ordered=tiles == (2, 3))), run("direct")
    assert ours[2].dtype == jnp.float32
    for one, other, right in zip(ours, plain, expected, strict=True):
        assert relative(one, right) <= 1.3 * relative(other, right)


@pytest.mark.parametrize(
    ("shape", "axis", "k", "out", "tiles"),
    [
        ((1, 1, 1, 1), 3, 11, 1, (1, 1)),
        # Rows along the second grid axis; more output channels than tiles.
        ((2, 24, 9, 5), 3, 9, 40, (5, 2)),
        ((2, 9, 5, 24), 2, 9, 3, (2, 12)),  # a step of 2: a tile lends to five others
        ((2, 8, 20, 24), 1, 9, 8, (20, 24)),
        ((2, 3, 4, 8), 3, 11, 8, (3, 4)),  # a kernel larger than the grid
    ],
)
def test_the_layout_of_a_tpu(shape, axis, k, out, tiles):
    """The same sums in bfloat16 planes: a misplaced tile would be an error of the order of one."""
    x, kernel, dy = (jnp.asarray(v, jnp.float32) for v in arrays(shape, axis, k, out))
    values = x.astype(jnp.bfloat16), kernel, dy.astype(jnp.bfloat16)
    found = value_and_gradients(
        lambda x, w: convolve(x, w, axis, ConvPlan(tiles, tiles, "tpu", ordered=True)), *values
    )
    expected = exact([np.asarray(v).astype(np.float64) for v in values], axis)
    assert [v.dtype for v in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert all(
        a.shape == b.shape and relative(a, b) < 0.01 for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4])
def test_float16_arithmetic_survives_any_scale(scale):
    """Gradients of a real run are tiny: without scaling they would vanish in float16, and large
    kernels overflow."""
    shape, axis, k, out, tiles = BF16_PROBLEM
    x, kernel, dy = (jnp.asarray(v, jnp.float32) for v in arrays(shape, axis, k, out))
    values = [x.astype(jnp.bfloat16), kernel / 100, (dy * scale).astype(jnp.bfloat16)]
    expected = exact([np.asarray(v).astype(np.float64) for v in values], axis)
    ours = value_and_gradients(
        lambda x, w: convolve(x, w, axis, ConvPlan(tiles, tiles, "gpu")), *values
    )
    assert all(relative(a, b) < 6e-3 for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 3)])
def test_float16_arithmetic_has_room_for_what_all_adds_up(tiles, chunks):
    """All ones, a kernel of 9 x 9 and 1024 channels out: each number of dx is 82,944, beyond
    float16, and so are the sums in the planes; of dkernel one is the number of positions."""
    x = jnp.ones((4, 40, 60, 8), jnp.bfloat16)
    kernel, dy = jnp.ones((9, 9, 8, 1024), jnp.bfloat16), jnp.ones((4, 40, 60, 1024), jnp.bfloat16)
    plan = ConvPlan(tiles, tiles, "gpu", chunks=chunks)
    found = value_and_gradients(lambda x, w: convolve(x, w, 3, plan), x, kernel, dy)
    expected = value_and_gradients(functools.partial(direct, axis=3), *map(_wide, (x, kernel, dy)))
    for actual, right in zip(found, expected, strict=True):
        assert np.isfinite(np.asarray(actual, np.float32)).all()
        assert relative(actual, right) < 6e-3
    assert float(jnp.max(expected[1])) == 82_944


@pytest.mark.parametrize("unequal", ["samples", "outlier"])
def test_float16_arithmetic_keeps_small_gradients_beside_large_ones(unequal):
    """Of samples that differ tenfold each, and beside one number a thousand times as large."""
    x, kernel, dy = (jnp.asarray(v, jnp.bfloat16) for v in arrays((4, 20, 30, 4), 3, 9, 96))
    if unequal == "samples":
        dy = dy * jnp.asarray([1, 0.1, 0.01, 0.001], jnp.bfloat16)[:, None, None, None]
    else:
        dy = dy.at[0, 3, 3, 3].mul(1000)
    plan = ConvPlan((2, 3), (2, 3), "gpu")
    found = value_and_gradients(lambda x, w: convolve(x, w, 3, plan), x, kernel, dy)
    expected = value_and_gradients(functools.partial(direct, axis=3), *map(_wide, (x, kernel, dy)))
    for ours, right in zip(found[1], expected[1], strict=True):  # of each sample by itself
        assert relative(ours, right) < 6e-3
    assert relative(found[2], expected[2]) < 6e-3


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def test_zeros_stay_zeros_in_every_arithmetic():
    for platform in ("cpu", "gpu", "tpu"):
        x, kernel = jnp.zeros((1, 6, 7, 3), jnp.bfloat16), jnp.zeros((3, 3, 3, 2), jnp.bfloat16)
        found = value_and_gradients(
            lambda x, w, p=platform: convolve(x, w, 3, ConvPlan((2, 2), (2, 2), p)),
            x,
            kernel,
            jnp.zeros((1, 6, 7, 2), x.dtype),
        )
        assert all((np.asarray(v) == 0).all() for v in found)


@pytest.mark.parametrize("method", ["direct", "dft", "auto", ConvPlan((2, 3), (2, 3), "tpu")])
def test_under_a_mesh_nothing_changes(method):
    """Batch over data, channels in over fsdp, channels out over tensor: the same numbers, and the
    kernel's gradient sharded."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x, kernel, dy = (jnp.asarray(v, jnp.float32) for v in arrays((4, 6, 20, 16), 1, 5, 8))
    tpu = isinstance(method, ConvPlan)
    if tpu:
        x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)

    def function(x, kernel, dy):
        y, pull = jax.vjp(lambda x, w: convolve(x, w, 1, method), x, kernel)
        return y, *pull(dy)

    expected = function(x, kernel, dy)
    batch, weights = (
        NamedSharding(mesh, PartitionSpec(*axes))
        for axes in ((("data", "fsdp"),), (None, None, "fsdp", "tensor"))
    )
    step = jax.jit(
        function, in_shardings=(batch, weights, batch), out_shardings=(batch, batch, weights)
    )
    found = step(*(jax.device_put(v, s) for v, s in ((x, batch), (kernel, weights), (dy, batch))))
    for actual, right in zip(found, expected, strict=True):
        assert relative(actual, right) < (4e-3 if tpu else 2e-6)  # one rounding of bfloat16


def test_loops_and_chunks_hold_less_memory():
    """By the compiler's own count: the planes of one frequency instead of all, and a part of the
    output channels at a time."""
    x, kernel, dy = (
        jax.ShapeDtypeStruct(v.shape, jnp.float32) for v in arrays((1, 10, 30, 64), 3, 9, 256)
    )

    def temporaries(gradient: bool, **how) -> int:
        plan = ConvPlan((1, 3), (1, 3), "cpu", **how)

        def run(x, kernel, dy):
            y, pull = jax.vjp(lambda x, w: convolve(x, w, 3, plan), x, kernel)
            return pull(dy) if gradient else y

        compiled = (
            jax.jit(run, compiler_options=compiler_options("cpu")).lower(x, kernel, dy).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    for gradient in (False, True):
        once, looped = temporaries(gradient, looped=False), temporaries(gradient, looped=True)
        chunked = temporaries(gradient, looped=True, chunks=8)
        assert chunked < 0.6 * looped and looped < 0.6 * once


SHAPE, KERNEL = (1, 4, 5, 6), (3, 3, 6, 2)


@pytest.mark.parametrize(
    ("x", "kernel", "axis", "match"),
    [
        ((0, 4, 5, 6), KERNEL, 3, "a batch has at least 1"),
        (SHAPE, (2, 2, 6, 2), 3, "must be equal and odd"),
        (SHAPE, (3, 5, 6, 2), 3, "must be equal and odd"),
        (SHAPE, KERNEL, 2, "5 channels on axis 2, the kernel takes 6"),
        (SHAPE, KERNEL, 0, "axis 1, 2 or 3"),
        (SHAPE[1:], KERNEL, 3, "x of 4 dimensions"),
    ],
)
def test_bad_arguments(x, kernel, axis, match):
    with pytest.raises(ValueError, match=match):
        convolve(jnp.zeros(x), jnp.zeros(kernel), axis)


def test_unknown_method():
    with pytest.raises(ValueError, match="'fft' is none of auto, direct, dft, tuned"):
        convolve(jnp.zeros(SHAPE), jnp.zeros(KERNEL), 3, "fft")


def test_the_model_chooses_what_measurements_showed():
    """On two cores: nine by nine over hundreds of channels gains several times in the Fourier
    domain, three by three over few channels loses there, and over very few gains as a sum."""
    large = choose(Problem(1, 128, 384, 384, 300, 9, "float32", "cpu"))
    assert large.forward and large.backward and large.looped
    small = choose(Problem(16, 24, 96, 8, 16, 3, "float32", "cpu"))
    assert small.forward is None and small.backward is None
    few = Problem(16, 128, 64, 4, 4, 3, "float32", "cpu")
    assert (choose(few).forward, choose(few).backward) == (SHIFTED, SHIFTED)
    for other in ({"dtype": "bfloat16"}, {"platform": "tpu"}, {"channels_in": 40}):
        assert choose(dataclasses.replace(few, **other)).forward != SHIFTED
    assert choose(Problem(1, 128, 384, 384, 300, 9, "float32", "cpu"), "direct").forward is None


def test_every_tiling_covers_the_grid():
    for size in (1, 2, 7, 10, 130, 384):
        problem = Problem(1, size, 5, 3, 4, 9, "float32", "cpu")
        for tiling in tilings(problem):
            h, _ = problem.axes(tiling)
            assert h.step * (h.tiles - 1) < size <= h.step * h.tiles and h.t >= 1
            assert h.t <= max(cost_model.LARGEST_TRANSFORM, h.step + 8)


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_cost_counts_what_the_compiler_counts(platform, dtype):
    """The model's operations are those of the compiled program (all row frequencies at once, so
    that nothing hides in a loop)."""
    problem = Problem(2, 40, 36, 64, 48, 9, dtype, platform)
    for gradient in (False, True):
        tiling = (3, 2)
        plan = ConvPlan(tiling, tiling, platform, looped=False)
        x, kernel, dy = (
            jax.ShapeDtypeStruct(v.shape, dtype) for v in arrays((2, 40, 36, 64), 3, 9, 48)
        )

        def run(x, kernel, dy, plan=plan, gradient=gradient):
            y, pull = jax.vjp(lambda x, w: convolve(x, w, 3, plan), x, kernel)
            return pull(dy) if gradient else y

        counted = jax.jit(run).lower(x, kernel, dy).compile().cost_analysis()["flops"]
        assert counted == pytest.approx(
            2 * sum(macs for macs, _ in dft_work(problem, tiling, gradient)), rel=0.1
        )
        assert counted < 2 * problem.macs * (2 if gradient else 1) / (4 if platform == "cpu" else 2)


def test_auto_does_not_go_by_rates_that_nobody_measured():
    """A GPU convolves directly, unless it is told otherwise or has measured itself."""
    large = Problem(8, 256, 256, 300, 300, 9, "bfloat16", "gpu")
    assert choose(large).direct and choose(large, "tuned").direct
    assert not choose(large, "dft").direct
    assert not choose(dataclasses.replace(large, platform="tpu")).direct
