"""Measured plans: times the likeliest tilings of a convolution on this machine's device and
remembers the fastest.

They are kept where dnd_jax/ops/choice.py reads them.
"""

import functools
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from tqdm import tqdm

from dnd_jax.core.files import read_object, write_json
from dnd_jax.ops import convolution
from dnd_jax.ops.choice import cache_file, key
from dnd_jax.ops.cost_model import SHIFTED, ConvPlan, Problem, Way, can_shift, cheapest_first, only
from dnd_jax.ops.rates import RATES
from dnd_jax.parallel.programs import compiler_options

CANDIDATES = 4  # tilings tried beside the direct method, the cheapest by the model
REPEATS = 3


def _seconds(run: Callable[[], object]) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def seconds_of(problem: Problem, method: ConvPlan, gradient: bool) -> float:
    """The fastest of REPEATS runs of a convolution under a plan: its output, or both gradients."""
    p = problem
    shape_x, shape_k = (
        (p.batch, p.height, p.width, p.channels_in),
        (p.kernel, p.kernel, p.channels_in, p.channels_out),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape_x, p.dtype)
    kernel = jax.random.normal(keys[1], shape_k, jnp.promote_types(p.dtype, jnp.float32))
    dy = jax.random.normal(keys[2], (*shape_x[:3], p.channels_out), p.dtype)
    function = functools.partial(convolution.convolve, axis=3, method=method)
    jit = functools.partial(jax.jit, compiler_options=compiler_options(p.platform))
    if gradient:
        run = jit(lambda x, kernel, dy: jax.vjp(function, x, kernel)[1](dy))
    else:
        run = jit(lambda x, kernel, dy: function(x, kernel))
    return _seconds(functools.partial(run, x, kernel, dy))


def measure(problem: Problem, gradient: bool) -> dict[Way, float]:
    """Seconds of the direct method (None), of SHIFTED where it is one, and of the CANDIDATES
    cheapest tilings, for the output or for both gradients."""
    tried = [None, *cheapest_first(problem, gradient, RATES[problem.platform])[:CANDIDATES]]
    if can_shift(problem, gradient):
        tried.append(SHIFTED)
    return {way: seconds_of(problem, only(problem, way, gradient), gradient) for way in tried}


def tune(problems: Iterable[Problem]) -> None:
    """Measures every problem that the cache does not have. Raises InputError when the cache cannot
    be written."""
    path = cache_file()
    known = read_object(path) if path.is_file() else {}
    todo = {key(p): p for p in problems if key(p) not in known}
    for name, problem in tqdm(
        todo.items(),
        desc="tune convolutions",
        unit="convolution",
        dynamic_ncols=True,
        disable=not todo,
    ):
        fastest = []
        for gradient in (False, True):
            times = measure(problem, gradient)
            fastest.append(min(times, key=times.get))
        known[name] = fastest
        write_json(path, known)
