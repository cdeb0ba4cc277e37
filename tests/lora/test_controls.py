"""LoRAs that generated adapters are compared with: what they are tuned on, what chooses them."""

import json
import shutil

import numpy as np
import pytest
from pipeline import TINY, tiny_suite
from small_models import write_qwen

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import load_suite
from dnd_jax.lora import controls
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.controls import _split, find_controls
from dnd_jax.main import main

pytestmark = pytest.mark.xdist_group("controls")  # one process builds what they share
RATES = "--config.controls.learning_rates=(1e-9,2e-2)"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(suite, base, workdir) of `dnd controls`."""
    root = tmp_path_factory.mktemp("controls")
    suite, base = tiny_suite(root / "suite"), write_qwen(root / "base", max_position_embeddings=128)
    assert main(command(suite, base, root / "w")) == 0
    return suite, base, root / "w"


def command(suite, base, workdir, *more: str) -> list[str]:
    asked = ("multi_task=True", "few_shot=True")
    settings = [f"--config.controls.{setting}" for setting in asked]
    settings += [f"--config.base.path={base}", "--config.base.max_length=128", RATES]
    return ["controls", TINY, f"--suite={suite}", f"--workdir={workdir}", *settings, *more]


def test_one_lora_for_everything_is_chosen_by_rows_of_the_training_datasets(made):
    """The lower loss wins; its steps are those of all LoRAs together, and a tenth of them."""
    suite, _, workdir = made
    found = json.loads((workdir / "controls/controls.json").read_text())["multi_task"]
    assert found["losses"]["0.02"] < found["losses"]["1e-09"]
    assert found["folder"] == "multi_task_0.02" and found["steps"] == [2, 18]
    path = workdir / "controls/multi_task_0.02"
    tenth, whole = (load_adapter(path / f"step_{n:06d}") for n in (2, 18))
    assert any(np.any(tenth[key] != whole[key]) for key in whole)


def test_held_in_rows_are_not_tuned_on(made):
    datasets = load_suite(made[0], 4).train
    rows, held = _split(datasets, 0)
    assert held and not {e.where for e in rows} & {e.where for e in held}
    assert sorted(e.where for e in (*rows, *held)) == sorted(
        e.where for dataset in datasets for e in dataset.train
    )
    assert {e.where for dataset in datasets for e in dataset.train if e in held}


def test_where_they_lie(made):
    suite, base, workdir = made
    raw = load_file("tests/tiny.py")
    raw.controls.update(multi_task=True, few_shot=True, learning_rates=(1e-9, 2e-2))
    raw.base.max_length = 128
    loaded = load_suite(suite, 4)
    found = find_controls(freeze(raw), loaded, str(base), workdir)
    unseen = {dataset.name for dataset in loaded.unseen}
    assert list(found) == ["multi_task_tenth", "multi_task", "few_shot_8", "few_shot_64"]
    for method, folders in found.items():
        assert set(folders) <= unseen and (folders or method == "few_shot_64")
        for folder in folders.values():
            assert load_adapter(folder)
    few, one = (load_adapter(next(iter(found[m].values()))) for m in ("few_shot_8", "multi_task"))
    assert any(np.any(few[key] != one[key]) for key in few)


def test_made_once_and_refused_with_other_settings(made, tmp_path, capsys):
    suite, base, workdir = made
    copy = shutil.copytree(workdir, tmp_path / "w")
    before = (copy / "controls/controls.json").stat().st_mtime_ns
    assert main(command(suite, base, copy)) == 0
    assert (copy / "controls/controls.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(command(suite, base, copy, "--config.lora.steps=7")) == 2
    assert "lora.steps: 6 -> 7" in capsys.readouterr().err


def test_what_is_missing_is_named_and_made_and_what_is_off_is_left_out(made, tmp_path, capsys):
    """The parts that are there stay as they are; the loop of the other alone runs."""
    suite, base, workdir = made
    copy = shutil.copytree(workdir, tmp_path / "w")
    done = copy / "controls/controls.json"
    stored = json.loads(done.read_text())
    done.write_text(json.dumps({k: v for k, v in stored.items() if k != "few_shot"}))
    kept = {p: p.stat().st_mtime_ns for p in (copy / "controls").glob("multi_task_*/*/*")}
    shutil.rmtree(next((copy / "controls").glob("few_shot_8/*")))
    raw = load_file("tests/tiny.py")
    raw.controls.update(multi_task=True, few_shot=True, learning_rates=(1e-9, 2e-2))
    raw.base.max_length = 128
    capsys.readouterr()
    found = find_controls(freeze(raw), load_suite(suite, 4), str(base), copy)
    assert list(found) == ["multi_task_tenth", "multi_task"]
    assert "controls: no few_shot LoRAs, so the table lacks" in capsys.readouterr().out
    assert find_controls(freeze(raw), load_suite(suite, 4), str(base), tmp_path) == {}
    assert "no multi_task LoRAs" in capsys.readouterr().out
    assert main(command(suite, base, copy)) == 0
    assert json.loads(done.read_text()) == stored
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    raw.controls.few_shot = False
    found = find_controls(freeze(raw), load_suite(suite, 4), str(base), workdir)
    assert list(found) == ["multi_task_tenth", "multi_task"]


@pytest.mark.slow
def test_what_is_done_is_on_record_before_the_next_part(made, tmp_path, monkeypatch):
    """So that a failure of the second, such as a full device, does not take the first away."""
    suite, base, workdir = made

    def full(*_):
        raise InputError("no room")

    monkeypatch.setattr(controls, "_few_shot", full)
    assert main(command(suite, base, tmp_path / "w")) == 2
    done, whole = ((f / "controls/controls.json").read_text() for f in (tmp_path / "w", workdir))
    assert json.loads(done) == {k: v for k, v in json.loads(whole).items() if k != "few_shot"}


def test_few_labels_are_as_many_as_the_column_says(made):
    """A pool of fewer has no such column."""
    suite, base, workdir = made
    raw = load_file("tests/tiny.py")
    raw.controls.update(multi_task=False, few_shot=True, learning_rates=(1e-9, 2e-2))
    raw.base.max_length = 128
    loaded = load_suite(suite, 4)
    pools = {dataset.name: len(dataset.pool) for dataset in loaded.unseen}
    found = find_controls(freeze(raw), loaded, str(base), workdir)
    for count in (8, 64):
        having = {name for name, size in pools.items() if size >= count}
        assert set(found[f"few_shot_{count}"]) == having
