"""What counts as the same run: contents and numbers, not spelling, speed or the version."""

import shutil

import pytest
from pipeline import ROOT

from dnd_jax.config.load import load_file
from dnd_jax.config.records import SAME_NUMBERS, check_same_run
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.record import settings_of

CONFIG = freeze(load_file("configs/default.py"))


def record(**sections) -> dict:
    """Every section of the settings, some with other values."""
    full = CONFIG.to_json()
    return full | {name: full[name] | values for name, values in sections.items()}


@pytest.mark.parametrize("key", [key for key in SAME_NUMBERS if "." in key])
def test_a_setting_that_changes_no_number_never_refuses(key):
    section, name = key.split(".")
    assert name in CONFIG.to_json()[section]  # the list names settings that there are
    other = record(**{section: {name: "other"}})
    assert check_same_run("x", record(), other)
    without = record()
    without[section] = {k: v for k, v in without[section].items() if k != name}
    assert check_same_run("x", other, without)  # nor when only one of the two has it
    assert check_same_run("x", without, other)


def test_another_start_is_another_run(tmp_path):
    """train.init_from counts by the parameters that lie there, not by its path."""
    golden = ROOT / "tests" / "golden" / "cfc09d1"
    folders = [shutil.copytree(golden / "run/generator", tmp_path / name) for name in "abc"]
    with open(folders[2] / "model.safetensors", "ab") as file:
        file.write(b"others")
    suite, raw, records = load_suite(golden / "suite"), load_file("configs/default.py"), []
    for start in ("", *map(str, folders)):
        raw.train.init_from = start
        records.append(settings_of(freeze(raw), suite))
    none, first, moved, other = records
    assert check_same_run("x", first, moved)
    for then, now in ((first, other), (none, first), (first, none)):
        with pytest.raises(InputError, match=r"--allow=train\.init_from "):
            check_same_run("x", then, now)


def test_an_absent_setting_has_its_default():
    then = record()
    del then["lora"]["clip"]
    assert check_same_run("x", then, record())
    with pytest.raises(InputError, match=r"lora\.clip: 1\.0 -> 2\.0$"):
        check_same_run("x", then, record(lora={"clip": 2.0}))
    assert "clip" not in then["lora"]  # what was given is left alone


def test_a_setting_that_is_gone_counts_but_at_its_value(monkeypatch):
    monkeypatch.setattr("dnd_jax.config.records.GONE", {"train.speed": 3})
    assert check_same_run("x", record(train={"speed": 3}), record())
    with pytest.raises(InputError, match=r"train\.speed: 4 -> None"):
        check_same_run("x", record(train={"speed": 4}), record())
    with pytest.raises(InputError, match=r"--allow=train\.other .*train\.other: 3 -> None"):
        check_same_run("x", record(train={"other": 3}), record(), ())


def test_what_an_earlier_version_recorded_instead():
    older = {"base": lambda then: then == "runs/m/base"}
    assert check_same_run("x", {"base": "runs/m/base"}, {"base": "4f2a"}, older=older)
    with pytest.raises(InputError, match="base: 'other' -> '4f2a'"):
        check_same_run("x", {"base": "other"}, {"base": "4f2a"}, older=older)


def test_allowed_names_and_sections():
    other = record(train={"steps": 7, "clip": 2.0})
    assert check_same_run("x", record(), other, ["train.steps", "train.clip"]) is False
    assert check_same_run("x", record(), other, ["train"]) is False
    with pytest.raises(InputError, match=r"--allow=train\.clip \(then -> now\): train\.clip: 1\.0"):
        check_same_run("x", record(), other, ["train.steps"])


def test_tuples_are_lists():
    assert check_same_run(
        "x", {"lora": {"targets": ["q_proj"]}}, {"lora": {"targets": ("q_proj",)}}
    )
