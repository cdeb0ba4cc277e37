"""Folders that commit cfc09d1 made (tests/golden/cfc09d1, by its `dnd quickstart` on the suite
beside it, in the folder that held both) are taken as they are: nothing in them is made again but
scores, which were made by another rule for answers."""

import json
import pathlib
import shutil

import pytest
import tiny

from dnd_jax.base.found import find_base
from dnd_jax.base.pretrain import DONE as PRETRAINED
from dnd_jax.base.pretrain import make_base
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.folder import DESCRIPTION
from dnd_jax.generator.generate import generate_adapter
from dnd_jax.generator.train import train
from dnd_jax.lora.collect import DONE as COLLECTED
from dnd_jax.lora.collect import collect
from dnd_jax.scoring import evaluate as evaluation

GOLDEN = pathlib.Path(__file__).parent / "golden" / "cfc09d1"


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """The folders in another place; the current folder is theirs, as it was."""
    folder = shutil.copytree(GOLDEN, tmp_path / "moved")
    monkeypatch.chdir(folder)
    return folder


def config(folder: pathlib.Path, **sections):
    """The settings of that run, with paths of now."""
    c = tiny.get_config()
    c.base.update(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_length=128, vocab_size=400
    )
    c.pretrain.update(steps=3, save_every=8)
    c.lora.update(steps=3, checkpoints=2, save_every=8, targets=("q_proj", "v_proj"))
    c.condition.encoder = str(folder / "suite" / "vectors.txt")
    c.generator.update(kernel_size=3, features=((0, 0, 0), (4, 4, 8), (0, 0, 0)))
    c.train.update(steps=3, save_every=8)
    c.evaluate.update(samples=1, max_new_tokens=2)
    for name, values in sections.items():
        c[name].update(values)
    return freeze(c)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def never(*args, **kwargs):
    raise AssertionError("this was made already")


def test_base_loras_and_generator_are_kept(moved, monkeypatch):
    for name in ("base.pretrain", "lora.tuning", "generator.train"):
        monkeypatch.setattr(f"dnd_jax.{name}.run_loop", never)
    monkeypatch.chdir(moved.parent)  # every path is spelled otherwise than it was
    suite, run = load_suite(moved / "suite"), moved / "run"
    before = files(run)
    # What changes no number may change too.
    now = config(
        moved,
        pretrain={"save_every": 1},
        lora={"save_every": 1},
        train={"micro_batches": 2, "keep_last": 5, "trackers": ("tensorboard",)},
    )
    base = make_base(now, suite, run)
    assert base == str(run / "base")
    assert collect(now, suite, base, run) == run / "loras"
    assert train(now, suite, run) == run / "generator"
    assert files(run) == before
    with pytest.raises(InputError, match=r"base/pretrain.json .*--allow=pretrain.steps .*3 -> 4"):
        make_base(config(moved, pretrain={"steps": 4}), suite, run)
    with pytest.raises(InputError, match=r"collect.json .*--allow=base .*'run/base' -> '\w{64}'"):
        other = shutil.copytree(run / "base", moved / "other")
        collect(now, suite, str(other), run)


def test_loras_that_are_being_replaced_are_not_whole(moved, monkeypatch):
    """A continued run that stops has some of the new ones beside some of the old."""

    def stopped(training, options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dnd_jax.lora.tuning.run_loop", stopped)
    suite, run = load_suite(moved / "suite"), moved / "run"
    with pytest.raises(KeyboardInterrupt):
        more = config(moved, lora={"steps": 4})
        collect(more, suite, str(run / "base"), run, ["lora.steps"])
    assert not (run / "loras" / COLLECTED).exists()


def test_replaced_loras_and_encoders_are_noticed(moved):
    suite, run = load_suite(moved / "suite"), moved / "run"
    with open(moved / "suite" / "vectors.txt", "a") as file:
        file.write("more 1 2 3 4 5 6\n")
    with pytest.raises(InputError, match=r"generator.json was made with other .*: encoder: '"):
        train(config(moved), suite, run)


def test_generate(moved):
    prompts = ["bird one", "bird two", "bird three", "bird four"]
    out = generate_adapter("run", prompts, moved / "adapter")
    assert {path.name for path in out.iterdir()} >= {"adapter_model.safetensors", "README.md"}


def test_scores_are_made_anew_once(moved, monkeypatch, capsys):
    """Answers had other ends then, so those scores are not mixed with new ones, nor shown as new.
    From then on those of every adapter that is still the same are kept."""
    pytest.importorskip("peft")
    suite, run = load_suite(moved / "suite"), moved / "run"
    asked, answers_to = [], evaluation.answers_to

    def counted(base, datasets, how, shots):
        asked.append([d.name for d in datasets])
        return answers_to(base, datasets, how, shots)

    monkeypatch.setattr(evaluation, "answers_to", counted)
    now = config(moved, evaluate={"batch_size": 3})
    stored = json.loads((run / "evaluation.json").read_text())
    result = evaluation.evaluate(now, suite, find_base(now, run), run)
    said = "evaluation.json: its scores are by an earlier version's rule for answers, all is scored"
    assert said in capsys.readouterr().out
    assert result["unseen"].keys() == stored["result"]["unseen"].keys()
    kept = json.loads((run / "evaluation.json").read_text())["scores"]
    assert sum(map(len, asked)) == sum(map(len, kept.values())) > 3
    asked.clear()
    assert evaluation.evaluate(now, suite, find_base(now, run), run) == result
    assert not asked and "anew" not in capsys.readouterr().out
    # One adapter more for each of 3 datasets: generated, of wrong prompts, of ridge.
    more = config(moved, evaluate={"samples": 2})
    evaluation.evaluate(more, suite, find_base(now, run), run)
    assert sum(map(len, asked)) == 9
    assert json.loads((run / "evaluation.json").read_text())["format"] == 1
    evaluation.evaluate(now, suite, find_base(now, run), run)  # fewer again
    assert sum(map(len, asked)) == 9
    with pytest.raises(InputError, match=r"--allow=evaluate.max_new_tokens .* 2 -> 3"):
        longer = config(moved, evaluate={"max_new_tokens": 3})
        evaluation.evaluate(longer, suite, find_base(now, run), run)


@pytest.mark.parametrize(
    "name",
    [f"base/{PRETRAINED}", f"loras/{COLLECTED}", f"generator/{DESCRIPTION}", "evaluation.json"],
)
def test_a_later_format_is_refused(moved, name):
    suite, run = load_suite(moved / "suite"), moved / "run"
    path, now = run / name, config(moved)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(InputError, match=rf"{name}: format 99, this version of dnd reads 0 to 1;"):
        base = make_base(now, suite, run)
        collect(now, suite, base, run)
        train(now, suite, run)
        evaluation.evaluate(now, suite, base, run)
