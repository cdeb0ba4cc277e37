"""`choose`: which plan a convolution has: the cheapest by the cost model, what was measured here,
or what was chosen before.

Measurements (dnd_jax/ops/tune.py) lie in $DND_JAX_CACHE/convolutions.json (default
~/.cache/dnd_jax), one entry a device, JAX version and problem.
"""

import functools
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from dnd_jax.config.choices import METHODS
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import cache_folder, read_object
from dnd_jax.ops.cost_model import SHIFTED, ConvPlan, Problem, best_way, can_shift, with_memory
from dnd_jax.ops.rates import GUESSED, RATES, Rates, processor


def choose(problem: Problem, method: str = "auto", rates: Rates | None = None) -> ConvPlan:
    """The plan of a convolution. rates: those of RATES unless others are given. Raises ValueError
    for an unknown method or platform, InputError for a damaged file of measurements."""
    if method == "tuned":
        found = tuned(problem)
        return found if found is not None else choose(problem, rates=rates)
    return _by_model(problem, method, rates)


@functools.lru_cache(maxsize=1024)
def _by_model(problem: Problem, method: str, rates: Rates | None) -> ConvPlan:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if problem.platform not in RATES:
        raise ValueError(f"platform {problem.platform!r} is none of {', '.join(RATES)}")
    if method == "direct" or (method == "auto" and problem.platform in GUESSED):
        return ConvPlan(None, None, problem.platform)
    rates, only_dft = rates or RATES[problem.platform], method == "dft"
    ways = (best_way(problem, gradient, rates, only_dft) for gradient in (False, True))
    return with_memory(problem, *ways)


def describe(plans: Iterable[ConvPlan]) -> str:
    """How many convolutions are computed which way, output / gradients: "3 dft / dft, 2 direct /
    dft"."""
    names = {None: "direct", SHIFTED: SHIFTED}
    counts = Counter(
        " / ".join(names.get(way, "dft") for way in (p.forward, p.backward)) for p in plans
    )
    return ", ".join(f"{count} {way}" for way, count in counts.most_common())


def shapes_of(problem: Problem) -> str:
    """A problem's shapes and type as text."""
    p = problem
    return f"{p.batch}x{p.height}x{p.width} {p.channels_in}->{p.channels_out} k{p.kernel} {p.dtype}"


def to_json(problem: Problem, plan: ConvPlan) -> dict:
    """What a record says of a choice."""
    of = f"{shapes_of(problem)} {problem.platform}"
    return {"of": of, "output": plan.forward, "gradients": plan.backward}


def from_json(problem: Problem, said: Any, where: str) -> ConvPlan | None:
    """The plan of what `to_json` wrote; None where it wrote of another problem. Raises InputError,
    which begins with `where`, for anything else."""
    if not isinstance(said, Mapping) or not {"of", "output", "gradients"} <= said.keys():
        raise InputError(f"{where}: {said!r} is no choice that dnd has written; move it away")
    if said["of"] != f"{shapes_of(problem)} {problem.platform}":
        return None
    return _plan(problem, (said["output"], said["gradients"]), where)


def _plan(problem: Problem, said: Any, where: str) -> ConvPlan:
    """The plan of two ways as JSON has them."""
    found = said if isinstance(said, list | tuple) else ()
    ways = [tuple(way) if isinstance(way, list) else way for way in found]
    if len(ways) != 2 or not all(_is_way(problem, *way) for way in enumerate(ways)):
        raise InputError(
            f"{where}: {said!r} are no two ways to compute {shapes_of(problem)}; move it away"
        )
    return with_memory(problem, *ways)


def _is_way(problem: Problem, gradient: int, way: Any) -> bool:
    """Whether a value is a way to compute a problem's output, or its gradients."""
    if isinstance(way, tuple) and len(way) == 2:
        most = problem.height, problem.width
        return all(type(n) is int and 1 <= n <= m for n, m in zip(way, most, strict=True))
    return way is None or (way == SHIFTED and can_shift(problem, bool(gradient)))


def cache_file() -> pathlib.Path:
    """Where measurements are kept."""
    return cache_folder() / "convolutions.json"


def key(problem: Problem) -> str:
    """A problem's name in the cache, this device and JAX version included."""
    device = processor() if problem.platform == "cpu" else jax.devices()[0].device_kind
    return f"{device} jax {jax.__version__} {shapes_of(problem)}"


def tuned(problem: Problem) -> ConvPlan | None:
    """The measured plan, or None when this device has not measured the problem. Raises InputError
    for a damaged file."""
    path = cache_file()
    fastest = (read_object(path) if path.is_file() else {}).get(key(problem))
    if fastest is None:
        return None
    return _plan(problem, fastest, f"{path}: {key(problem)!r}")
