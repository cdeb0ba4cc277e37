"""A half-done pretraining goes on only with the tokens that it began with, and nothing that others
made is replaced."""

import dataclasses

import pytest
from pipeline import tiny_suite

from dnd_jax.base import pretrain
from dnd_jax.config.load import load_file
from dnd_jax.config.records import check_same_run
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import load_suite


@pytest.mark.parametrize("version", [None, pretrain.VERSION - 1, pretrain.VERSION + 1])
def test_steps_of_another_tokenizer_are_never_gone_on_with(tmp_path, monkeypatch, version):
    """Whatever is allowed. version: None is what 0.2.0 recorded."""

    def resumes(training, options):  # as the loop does from a checkpoint
        then = {key: value for key, value in training.record.items() if key != "tokenizer"}
        then |= {"tokenizer": version} if version else {}
        assert check_same_run("x", training.record, training.record, (), options.older)
        check_same_run("x", then, training.record, options.allowed, options.older)

    monkeypatch.setattr(pretrain, "run_loop", resumes)
    config = freeze(load_file("tests/tiny.py"))
    suite, run = load_suite(tiny_suite(tmp_path / "suite")), tmp_path / "run"
    for allowed in ((), ("tokenizer",), ("tokenizer", "pretrain")):
        with pytest.raises(InputError) as error:
            pretrain.pretrain(config, suite, run, allowed)
        line = f"another --workdir, or remove {run / 'pretrain'}"
        assert str(error.value).endswith(line) and "--allow" not in str(error.value)
    assert not (run / "base").exists()


def test_what_others_put_into_a_workdir_is_not_replaced(tmp_path, monkeypatch):
    """A model, or a suite that has no suite.json yet, in the place of what would be made there."""
    monkeypatch.setattr(pretrain, "run_loop", lambda *_: pytest.fail("hours were spent first"))
    config = freeze(load_file("tests/tiny.py"))
    suite = load_suite(tiny_suite(tmp_path / "suite"))
    for name in ("base/config.json", "suite/datasets/mine/train.jsonl"):
        mine = tmp_path / "run" / name
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        folder = tmp_path / "run" / name.split("/")[0]
        with pytest.raises(InputError, match=f"^{folder}: the .* in the place of what is there"):
            if folder.name == "base":
                pretrain.pretrain(config, suite, tmp_path / "run")
            else:
                open_suite(dataclasses.replace(config, suite=""), tmp_path / "run")
        assert mine.read_text() == "mine"
