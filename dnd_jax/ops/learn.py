"""Learns the rates of this machine's processor from convolutions computed by several methods.

`fit` finds, by least squares over logarithms, the rates under which the cost model predicts the
measured times. Each is held, loosely, to the shipped one times what all have in common: a method
that few of these convolutions depend on keeps its usual place among the others.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.optimize
from tqdm import tqdm

from dnd_jax.core.stopping import stop
from dnd_jax.ops.cost_model import (
    SHIFTED,
    Problem,
    Way,
    can_shift,
    cheapest_first,
    only,
    seconds,
)
from dnd_jax.ops.rates import LEARNED, RATES, Rates
from dnd_jax.ops.tune import seconds_of

# (batch, height, width, channels in, channels out, k): few and many channels, small and large
# kernels, each some milliseconds to some tenths of a second.
MEASURED = (
    (16, 64, 64, 4, 4, 3),
    (16, 48, 48, 8, 4, 3),
    (8, 48, 48, 8, 32, 3),
    (8, 32, 32, 24, 48, 3),
    (8, 24, 24, 64, 64, 3),
    (4, 24, 24, 160, 96, 3),
    (2, 24, 24, 256, 256, 3),
    (2, 32, 32, 32, 32, 5),
    (1, 32, 32, 128, 128, 5),
    (1, 48, 48, 48, 64, 9),
    (1, 24, 40, 256, 128, 9),
)
HELD = 0.2  # how much a factor between a rate and the shipped one weighs, a measured one being 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """One convolution computed one way: its output, or both its gradients."""

    problem: Problem
    way: Way
    gradient: bool
    seconds: float


def samples() -> list[Sample]:
    """Measures MEASURED on the default device directly, as SHIFTED where that is a way, and under
    the tiling that is cheapest by the shipped rates and one of at most a third of its tiles, where
    there is one."""
    rates, found = RATES["cpu"], []
    todo = [
        (problem, way, gradient)
        for problem in (Problem(*shapes, "float32", "cpu") for shapes in MEASURED)
        for gradient in (False, True)
        for way in _ways(problem, gradient, rates)
    ]
    for problem, way, gradient in tqdm(todo, "rates", unit="program", dynamic_ncols=True):
        stop.check()
        took = seconds_of(problem, only(problem, way, gradient), gradient)
        found.append(Sample(problem, way, gradient, took))
    return found


def _ways(problem: Problem, gradient: bool, rates: Rates) -> list[Way]:
    cheapest = cheapest_first(problem, gradient, rates)
    fewer = [way for way in cheapest if 3 * np.prod(way) <= np.prod(cheapest[0])]
    shifted = [SHIFTED] if can_shift(problem, gradient) else []
    return [None, *shifted, cheapest[0], *fewer[:1]]


def fit(measured: Sequence[Sample]) -> Rates:
    """The rates of LEARNED under which the model comes closest to the measured times."""
    shipped = RATES["cpu"]
    start = np.log([getattr(shipped, name) for name in LEARNED])

    def rates_of(factors: np.ndarray) -> Rates:
        values = np.exp(start + factors)
        return dataclasses.replace(shipped, **dict(zip(LEARNED, values.tolist(), strict=True)))

    # What all rates share is speed; a turn is a time, and channels are neither.
    speed = np.array([0 if "channels" in name else -1 if name == "turn" else 1 for name in LEARNED])

    def residuals(unknown: np.ndarray) -> np.ndarray:
        factors, common = unknown[:-1], unknown[-1]
        held = HELD * (factors - common * speed)
        return np.concatenate([_wrong(measured, rates_of(factors)), held])

    found = scipy.optimize.least_squares(residuals, np.zeros(len(LEARNED) + 1), loss="soft_l1")
    return rates_of(found.x[:-1])


def _wrong(measured: Sequence[Sample], rates: Rates) -> np.ndarray:
    """The logarithm of each predicted time over the measured one."""
    return np.log([seconds(s.problem, s.way, s.gradient, rates) / s.seconds for s in measured])


def off(measured: Sequence[Sample], rates: Rates) -> float:
    """By which factor the model is off, the median over what was measured, when all its times are
    stretched alike to fit best: choices depend on ratios alone."""
    wrong = _wrong(measured, rates)
    return float(np.exp(np.median(np.abs(wrong - np.median(wrong)))))
