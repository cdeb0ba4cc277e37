"""How a convolution's plan is chosen: by shipped or learned rates, as measured, as recorded."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_jax.core.errors import InputError
from dnd_jax.ops import choice, convolution, learn, tune
from dnd_jax.ops.choice import choose, from_json, to_json
from dnd_jax.ops.cost_model import MARGIN, SHIFTED, Problem, seconds, tilings
from dnd_jax.ops.rates import LEARNED, RATES, learned, rates_file, remember

SHIPPED = RATES["cpu"]
SLOW_DIRECT = dataclasses.replace(SHIPPED, direct=SHIPPED.direct / 50)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DND_JAX_CACHE", str(tmp_path))


@pytest.mark.slow
def test_tuned_plans_are_measured_once_and_used(monkeypatch):
    problem = Problem(1, 12, 20, 24, 16, 5, "float32", "cpu")
    assert choose(problem, "tuned") == choose(problem, "auto")  # nothing measured yet
    tune.tune([problem, problem])
    stored = json.loads(choice.cache_file().read_text())
    assert list(stored) == [choice.key(problem)]
    plan = choose(problem, "tuned")
    assert [list(t) if t else t for t in (plan.forward, plan.backward)] == stored[
        choice.key(problem)
    ]

    # What the cache says is what is done, and what is there is not measured again.
    choice.cache_file().write_text(json.dumps({choice.key(problem): [[2, 3], None]}))
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured again"))
    tune.tune([problem])
    plan = choose(problem, "tuned")
    assert plan.forward == (2, 3) and plan.backward is None
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=(1, 12, 20, 24)).astype(np.float32),
        rng.normal(size=(5, 5, 24, 16)).astype(np.float32),
    )
    expected = convolution.direct(x, kernel, 3)
    np.testing.assert_allclose(
        convolution.convolve(x, kernel, 3, "tuned"), expected, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize(("channels", "more"), [(4, [SHIFTED]), (40, [])])
def test_measured_times_cover_every_way(channels, more):
    """Directly, by several tilings, and of few channels as a sum, which is kept by its name."""
    times = tune.measure(Problem(1, 6, 9, channels, channels, 3, "float32", "cpu"), gradient=True)
    assert len(times) == 1 + tune.CANDIDATES + len(more) and {None, *more} <= times.keys()
    assert min(times.values()) > 0


def test_a_measured_sum_is_used():
    problem = Problem(1, 6, 9, 4, 3, 3, "float32", "cpu")
    choice.cache_file().write_text(json.dumps({choice.key(problem): [SHIFTED, [2, 3]]}))
    plan = choose(problem, "tuned")
    assert (plan.forward, plan.backward) == (SHIFTED, (2, 3))
    assert choice.describe([plan]) == "1 shifted / dft"


NO_WAYS = (
    *([SHIFTED, None], [None, [2, 99]], [None, [2]], [None], [None, [0, 1]], [None, "x", [2, 3]]),
    *("direct", 5),
)


@pytest.mark.parametrize("ways", NO_WAYS)
def test_measurements_that_are_none_are_named(ways):
    problem = Problem(1, 6, 9, 40, 40, 3, "float32", "cpu")
    choice.cache_file().write_text(json.dumps({choice.key(problem): ways}))
    with pytest.raises(InputError, match=r"convolutions.json: .*no two ways to compute 1x6x9 40"):
        choose(problem, "tuned")


problems = st.builds(
    Problem,
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from((1, 4, 8, 40)),
    st.sampled_from((1, 4, 8, 40)),
    st.sampled_from((3, 9)),
    st.just("float32"),
    st.just("cpu"),
)


@settings(max_examples=50, deadline=None)
@given(problems, st.sampled_from(("auto", "dft", "direct")))
def test_what_a_record_says_is_the_plan(problem, method):
    plan = choose(problem, method)
    said = json.loads(json.dumps(to_json(problem, plan)))
    assert from_json(problem, said, "x") == plan
    assert from_json(dataclasses.replace(problem, batch=problem.batch + 1), said, "x") is None


@settings(max_examples=50, deadline=None)
@given(problems, st.floats(0.02, 50))
def test_the_cheapest_way_is_chosen_by_the_rates_that_are_given(problem, factor):
    rates = dataclasses.replace(SHIPPED, direct=SHIPPED.direct * factor)
    plan = choose(problem, "auto", rates)
    for way, gradient in ((plan.forward, False), (plan.backward, True)):
        mine = seconds(problem, way, gradient, rates)
        others = [seconds(problem, other, gradient, rates) for other in tilings(problem)]
        assert mine <= min(others) * (MARGIN if way is None else 1)
        assert mine <= seconds(problem, SHIFTED, gradient, rates) * (MARGIN if way is None else 1)


def test_learned_rates_are_kept_for_this_processor():
    assert learned("cpu") is None
    remember(SLOW_DIRECT)
    assert learned("cpu") == SLOW_DIRECT and learned("tpu") is None and learned("gpu") is None
    others = json.loads(rates_file().read_text())
    rates_file().write_text(json.dumps({f"another {key}": x for key, x in others.items()}))
    assert learned("cpu") is None
    remember(SHIPPED)
    assert learned("cpu") == SHIPPED and len(json.loads(rates_file().read_text())) == 2


@pytest.mark.parametrize("value", [-1.0, "fast", None, float("inf")])
def test_damaged_rates_are_named(value):
    remember(SHIPPED)
    ours = json.loads(rates_file().read_text())
    for rates in ours.values():
        rates["product"] = value
    rates_file().write_text(json.dumps(ours))
    with pytest.raises(InputError, match=r"rates.json: .*is not what `dnd bench --rates` writes"):
        learned("cpu")


def of_model(rates, noise: float) -> list[learn.Sample]:
    """What would be measured of a processor with these rates."""
    rng, found = np.random.default_rng(0), []
    for shapes in learn.MEASURED:
        problem = Problem(*shapes, "float32", "cpu")
        for gradient in (False, True):
            for way in learn._ways(problem, gradient, SHIPPED):
                took = seconds(problem, way, gradient, rates) * np.exp(noise * rng.normal())
                found.append(learn.Sample(problem, way, gradient, took))
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"direct": 4.0},
        {"direct": 0.25, "direct_kernel_gradient": 0.25},
        {"product": 3.0, "transform": 3.0},
        {"shifted": 0.2},
    ],
)
def test_rates_are_found_in_the_times_that_they_make(changed):
    """Of a processor twice as slow in all, but for what is changed; times vary by a tenth."""
    factors = {name: 0.5 * changed.get(name, 1.0) for name in LEARNED if "channels" not in name}
    factors["turn"] = 2.0
    true = dataclasses.replace(
        SHIPPED, **{name: factor * getattr(SHIPPED, name) for name, factor in factors.items()}
    )
    found = learn.fit(of_model(true, 0.1))
    exact = of_model(true, 0)
    for s in exact:
        took = seconds(s.problem, s.way, s.gradient, found)
        assert took == pytest.approx(s.seconds, rel=0.3), s
    right = [choose(s.problem, "auto", true).direct for s in exact]
    ours = [choose(s.problem, "auto", found).direct for s in exact]
    assert np.mean(np.equal(right, ours)) > 0.9
    assert learn.off(of_model(true, 0.1), found) < 1.15


def test_every_measured_convolution_runs_as_it_is_counted():
    """The shapes are taken as they are meant: channels last."""
    for problem in (Problem(*shapes, "float32", "cpu") for shapes in learn.MEASURED):
        x = jax.ShapeDtypeStruct(
            (problem.batch, problem.height, problem.width, problem.channels_in), "float32"
        )
        k = problem.kernel
        kernel = jax.ShapeDtypeStruct((k, k, problem.channels_in, problem.channels_out), "float32")
        assert Problem.of(x, kernel, 3, "cpu") == problem
