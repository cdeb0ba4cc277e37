"""From scores question by question to results.json, its intervals and its table."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import scipy.stats
from scored_runs import NAMES, candidates, runs_of

from dnd_jax.base.asked_base import AskedBase
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.scoring import evaluate as evaluation
from dnd_jax.scoring import intervals
from dnd_jax.scoring.draws import draw_training
from dnd_jax.scoring.evaluate import by_method, scored_on
from dnd_jax.scoring.report import table
from dnd_jax.scoring.results import METHODS, combine, pack, rule, unpack


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for values in (rng.random(60) < 0.7, rng.random(400) < 0.1, rng.random(25)):
        drawn = intervals.replicates(
            {"a": values.astype(float), "b": 1 - values.astype(float)}, 0, "name"
        )
        assert drawn["a"].shape == (intervals.RESAMPLES,)
        # All methods are asked the same questions.
        np.testing.assert_allclose(drawn["a"] + drawn["b"], 1)
        theirs = scipy.stats.bootstrap(
            (values.astype(float),), np.mean, method="percentile", n_resamples=4000, rng=1
        )
        np.testing.assert_allclose(
            intervals.interval(drawn["a"]), theirs.confidence_interval, atol=0.02
        )
    again = intervals.replicates({"a": values}, 0, "name")["a"]
    np.testing.assert_allclose(again, drawn["a"], atol=1e-12)
    for other in (
        intervals.replicates({"a": values}, 0, "other"),
        intervals.replicates({"a": values}, 1, "name"),
    ):
        assert np.abs(other["a"] - drawn["a"]).max() > 0.01


def test_large_tests_are_drawn_in_parts(monkeypatch):
    values = {"a": (np.random.default_rng(0).random(50) < 0.3).astype(float)}
    whole = intervals.replicates(values, 0, "n")["a"]
    monkeypatch.setattr(intervals, "CELLS_AT_ONCE", 50 * 7)
    np.testing.assert_allclose(intervals.replicates(values, 0, "n")["a"], whole, atol=1e-12)


def test_packing_is_exact():
    values = [0.0, 1.0, 1 / 3, 0.1 + 0.2, 1e-9]
    assert unpack(pack(values)) == values and pack([1.0, 0.0, 0.5]) == "1 0 0.5"


@pytest.fixture(scope="module")
def config():
    return freeze(load_file("configs/mini.py"))


def test_methods_from_scores_question_by_question():
    found, scores = candidates(np.random.default_rng(3), ["x"])
    values, each, training = by_method(found, "x", lambda label: scores[label]["x"])
    mean = {label: statistics.fmean(of["x"]) for label, of in scores.items()}
    assert list(values) == list(METHODS) == list(each)
    assert training == {t: mean[f"loras/{t}"] for t in ("t0", "t1", "t2")}
    assert (
        values["base"] == mean["base"]
        and values["nearest"] == statistics.fmean([mean["loras/t1"], mean["loras/t2"]])
        and values["tuned"] == mean["tuned_x"]
    )
    assert values["train_mean"] == statistics.fmean(training.values()) and values[
        "train_best"
    ] == max(training.values())
    generated = [mean[f"x_{i}"] for i in range(4)]
    assert values["generated"] == {
        "mean": statistics.fmean(generated),
        "std": statistics.pstdev(generated),
        "scores": generated,
    }
    for method, packed in each.items():
        score = values[method]["mean"] if method == "generated" else values[method]
        assert np.mean(unpack(packed)) == pytest.approx(score) and len(unpack(packed)) == 200


def test_intervals_of_means(config):
    """Of one dataset, a kind, all, and over two seeds: against a plain loop that resamples every
    dataset of every seed."""
    for seeds in ((5,), (5, 6)):
        runs = runs_of(seeds)
        results = combine(runs, config)
        counts = {"questions": 2 * len(seeds), "answers": len(seeds), "same_answers": len(seeds)}
        assert results["agreement"] == {**counts, "largest_logit_difference": seeds[-1] / 10}
        rng = np.random.default_rng(9)

        def resampled(names, method, runs=runs, rng=rng):
            def mean_of(seed, name):
                values = np.array(unpack(runs[seed]["questions"][name]["exact"][method]))
                return values[rng.integers(len(values), size=(4000, len(values)))].mean(axis=1)

            return np.quantile(
                np.mean([[mean_of(s, n) for n in names] for s in runs], axis=(0, 1)), [0.025, 0.975]
            )

        for names, entry in (
            (["y"], results["unseen"]["y"]),
            (["x", "y"], results["mean"]["by_kind"]["near"]),
            (list(NAMES), results["mean"]),
        ):
            for measure in (entry, entry["content"]):
                assert list(measure["interval"]) == list(METHODS)
                for method in ("base", "train_mean", "generated", "wrong_prompts"):
                    low, high = measure["interval"][method]
                    score = measure[method]["mean"] if method == "generated" else measure[method]
                    assert low < score < high
                    np.testing.assert_allclose([low, high], resampled(names, method), atol=0.015)


def test_the_same_questions_in_every_seed_are_drawn_once(config):
    """Three seeds on one suite know no more of its questions than one."""
    one = runs_of((5,))
    same = {seed: {**one[5], "fingerprint": "a"} for seed in (5, 6, 7)}
    assert combine(same, config)["mean"]["interval"] == combine(one, config)["mean"]["interval"]
    own = {seed: {**one[5], "fingerprint": str(seed)} for seed in (5, 6, 7)}
    (low, high), (narrow_low, narrow_high) = (
        combine(runs, config)["mean"]["interval"]["base"] for runs in (same, own)
    )
    assert low < narrow_low < narrow_high < high


def test_table_with_a_method_that_some_datasets_lack(config):
    results = combine(runs_of((5,), without_tuned=("x", "z")), config)
    lines = {line[:14].strip(): line for line in table(results).splitlines()}
    assert (
        lines["x"].endswith("  -")
        and lines["mean of far"].endswith("  -")
        and lines[""].endswith("tuned")
    )
    assert lines["y"].endswith(f"{results['unseen']['y']['tuned']:.2f}")
    low, high = results["mean"]["interval"]["base"]
    assert table(results).splitlines()[-1].split()[2] == f"{low:.2f}-{high:.2f}"
    assert "tuned" not in results["mean"]


@pytest.mark.parametrize("drawn", [None, ("t0", "t2"), ()])
def test_train_mean_and_best_are_of_the_drawn_adapters(drawn):
    """Nearest are the adapters of t1 and t2, of two draws of prompts, whether they are drawn here
    or not."""
    found, scores = candidates(np.random.default_rng(3), ["x"])
    found = dataclasses.replace(found, drawn=drawn)
    names = ("t0", "t1", "t2") if drawn is None else drawn
    labels = scored_on(found, "x")
    assert sorted(set(labels) & {f"loras/t{i}" for i in range(3)}) == sorted(
        {"loras/t1", "loras/t2", *(f"loras/{name}" for name in names)}
    )
    assert len(set(labels)) == len(labels)
    values, each, training = by_method(found, "x", lambda label: scores[label]["x"])
    mean = {f"t{i}": np.mean(scores[f"loras/t{i}"]["x"]) for i in range(3)}
    assert values["nearest"] == pytest.approx((mean["t1"] + mean["t2"]) / 2)
    assert list(training) == list(names)
    if not names:
        assert not {"train_mean", "train_best"} & (values.keys() | each.keys())
        return
    assert values["train_mean"] == pytest.approx(np.mean([mean[name] for name in names]))
    assert values["train_best"] == pytest.approx(max(mean[name] for name in names))


def test_a_result_is_of_the_training_adapters_that_are_scored(config, tmp_path, monkeypatch):
    """Also where the only one that is drawn is the nearest, whose scores are there either way."""
    found, scores = candidates(np.random.default_rng(0), ["x", "y"])
    suite = Suite("s", tmp_path, (), (), tuple(Dataset(n, (), ()) for n in "xy"), NAMES, "print")
    packed = {
        label: {
            name: {measure: pack(values) for measure in ("exact", "content", "format")}
            for name, values in of.items()
        }
        for label, of in scores.items()
    }
    made = []

    def opened(*_):
        made.append(1)
        return AskedBase

    monkeypatch.setattr(evaluation, "score_keys", lambda *_: {label: label for label in scores})
    monkeypatch.setattr(evaluation, "open_engine", opened)
    monkeypatch.setattr(evaluation, "with_room_for_shots", lambda candidates, *_: candidates)
    monkeypatch.setattr(evaluation, "score_all", lambda *_: packed)

    def training(drawn) -> list[str]:
        now = dataclasses.replace(found, drawn=drawn)
        monkeypatch.setattr(evaluation, "make_candidates", lambda *_: now)
        entry = evaluation.evaluate(config, suite, "base", tmp_path)["unseen"]["x"]
        assert ("train_mean" in entry) == bool(entry["training"])
        return list(entry["training"])

    for drawn in (("t1",), (), ("t1",), None, None, ("t0", "t1", "t2")):
        assert training(drawn) == list(found.training if drawn is None else drawn)
    assert len(made) == 4
    path = tmp_path / "evaluation.json"  # of an earlier version, which scored all
    kept = json.loads(path.read_text())
    del kept["everywhere"]
    path.write_text(json.dumps(kept))
    assert training(None) == ["t0", "t1", "t2"] and len(made) == 4


def test_the_drawn_adapters_are_fixed_by_the_seed_and_said(config):
    names = [f"t{i}" for i in range(20)]
    assert draw_training(names, 0, 0) is draw_training(names, 20, 0) is None
    assert draw_training(names, -1, 0) == ()
    twelve = draw_training(names, 12, 0)
    assert len(twelve) == 12 and list(twelve) == sorted(twelve, key=names.index)
    assert twelve == draw_training(names, 12, 0) != draw_training(names, 12, 1)
    asked = lambda n: dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, train_adapters=n)
    )
    said = "Train mean and train best are of 12 of the 20 training adapters, drawn by the seed."
    assert said in rule(asked(12), 20) and "Train mean" not in rule(asked(12), 12)
    assert "Train mean" not in rule(asked(0), 20) and "are left out" in rule(asked(-1), 20)


def test_rule_says_what_was_read(config):
    assert rule(config).startswith(
        "No selection: mean of all samples. 5 adapters a dataset from 5 seeded draws of 8 prompts"
    )
    assert "answers" not in rule(config)
    mixed = dataclasses.replace(config, condition=dataclasses.replace(config.condition, form="mix"))
    assert "form 'mix': it reads the answers of the unseen pools" in rule(mixed)
    likely = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, answers="likelihood")
    )
    assert rule(likely).endswith("An answer is the most likely one of a dataset's labels.")


FREE_FORM = ("1_5b_math", "1_5b_code", "7b_math", "7b_code", "vl_3b_math")


@pytest.mark.parametrize("name", FREE_FORM)
def test_settings_with_chains_of_thought_have_room_for_them(name):
    """And say that exact match is not their score."""
    config = freeze(load_file(f"qwen2_5_{name}"))
    assert config.evaluate.max_new_tokens >= 1024
    (line,) = combine(runs_of((5,)), config)["warnings"]
    assert "exact match means little" in line and "dnd lm-eval --tasks=x:TASK" in line


def test_cut_answers_are_averaged_like_scores_and_warned_of(config):
    runs = runs_of((5, 6))
    for share, run in zip((0.0, 0.5), runs.values(), strict=True):
        for entry in run["unseen"].values():
            entry["cut"] = {"base": share, "generated": share / 2}
    results = combine(runs, config)
    assert results["mean"]["cut"] == {"base": 0.25, "generated": 0.125}
    (line,) = results["warnings"]
    assert "x (base 25%, generated 12%)" in line
    assert f"evaluate.max_new_tokens = {config.evaluate.max_new_tokens}" in line
    del next(iter(runs[5]["unseen"].values()))["cut"]  # scored by an earlier version
    assert "cut" not in combine(runs, config)["mean"]
