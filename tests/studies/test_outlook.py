"""What a run begins with: what there is to do, counted from its settings."""

import dataclasses

import pytest
from pipeline import tiny_suite

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import load_suite
from dnd_jax.studies import outlook


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return load_suite(tiny_suite(tmp_path_factory.mktemp("outlook") / "suite"), 4)


@pytest.fixture
def config():
    return freeze(load_file("tests/tiny.py"))


def changed(config, section: str, **values):
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def test_operations_follow_the_settings(config, suite):
    config = changed(config, "controls", multi_task=True, few_shot=True)
    now = outlook.operations(config, suite)
    assert list(now) == ["pretrain", "collect", "controls", "train", "evaluate"]
    assert now["collect"][1] == "6 LoRAs, 6 steps of 4 rows each"
    # Of 12 rows 8 are few labels, 64 are not there.
    assert now["controls"][1] == "ONE LoRA for all tasks, 18 steps; 3 LoRAs on a few labels"
    # 3 x 6 steps of one LoRA and 3 x 6 of those on 8 rows, beside 6 x 6 of collecting.
    assert now["controls"][0] == pytest.approx(now["collect"][0])
    longer = outlook.operations(changed(config, "lora", steps=12), suite)
    assert longer["collect"][0] == pytest.approx(2 * now["collect"][0])
    assert longer["train"] == now["train"]


def test_what_is_given_is_not_counted(config, suite, monkeypatch):
    sizes, spec = outlook.sizes_of(config), outlook.spec_of(config)
    monkeypatch.setattr(outlook, "sizes_of", lambda _: sizes)
    monkeypatch.setattr(outlook, "spec_of", lambda _: spec)
    given = changed(changed(config, "base", path="x"), "controls", multi_task=True, folder="y")
    given = changed(given, "train", checkpoints="z")
    assert list(outlook.operations(given, suite)) == ["train", "evaluate"]


def test_a_suite_without_a_corpus_is_refused_by_who_needs_it(config, suite):
    assert "pretrain" not in outlook.operations(config, dataclasses.replace(suite, corpus=()))


def test_the_lines_add_up(config, suite, monkeypatch):
    """On a machine of one operation an hour."""
    monkeypatch.setattr(outlook, "product_rate", lambda: 1 / 3600)
    monkeypatch.setattr(outlook, "SHARE", 1.0)
    counts = {"pretrain": (1.0, "a base"), "collect": (9.0, "LoRAs"), "train": (2.5, "a generator")}
    monkeypatch.setattr(outlook, "operations", lambda *_: counts)
    assert outlook.outlook(config, suite).splitlines()[0].startswith("about 12:30 ")
    shared = outlook.outlook(config, suite, 3, share=True).splitlines()
    assert shared[0].startswith("about 17:30 ")
    assert shared[1:] == [
        "  pretrain    1:00  a base",
        "  collect     9:00  LoRAs",
        "  train       7:30  a generator for each of 3 seeds",
    ]
    own = outlook.outlook(config, suite, 3).splitlines()
    assert own[0].startswith("about 37:30 ")
