"""`dnd doctor` says what would go wrong later, in the words of the stage that would refuse it."""

import json
import pathlib
import re
import shutil
from collections.abc import Callable

import pytest
from safetensors.numpy import load_file, save_file

from dnd_jax.main import main

MADE = pathlib.Path(__file__).parent.parent / "golden" / "cfc09d1"
TINY = f"--config={pathlib.Path(__file__).parent.parent / 'tiny.py'}"


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
    """A run, its suite and encoder, to plant faults in; the current folder, as it was for the
    run."""
    folder = shutil.copytree(MADE, tmp_path / "made")
    monkeypatch.chdir(folder)
    return folder


def doctor(*more: str, agreement: bool = False) -> int:
    """Asks it of everything in the current folder."""
    more += (f"--config.evaluate.agreement={agreement}",)
    given = ("--workdir=run", "--suite=suite", "--config.condition.encoder=suite/vectors.txt")
    return main(["doctor", TINY, *given, *more])


def rows(out: str) -> dict[str, list[tuple[str, str]]]:
    """{check: [(state, text), ...]} of a printed table."""
    found: dict[str, list[tuple[str, str]]] = {}
    table = out[re.search(r"^base  +", out, re.MULTILINE).start() :].split("\n\n")[0]
    for line in table.splitlines():
        if match := re.match(r"(\w[\w ]*?)  +(ok|note|FAULT)  +(.*)", line):
            found.setdefault(match[1], []).append((match[2], match[3]))
            last = match[1]
        else:
            state, text = found[last][-1]
            found[last][-1] = state, f"{text} {line.strip()}"
    return found


def edit(path: pathlib.Path, change: Callable[[dict], object]) -> None:
    """Changes a JSON object, or the tensors of a safetensors file."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def test_a_sound_run(place, capsys):
    assert doctor(agreement=True) == 0
    out = capsys.readouterr().out
    found = rows(out)
    (chat,) = found["chat"]
    assert chat[1].endswith("<assistant>ANSWER<end>'; an answer ends at '<end>'")
    looked_at = {"base", "chat", "reading", "suite", "questions", "checkpoints", "generator"}
    assert looked_at | {"room"} <= found.keys()
    assert all(state != "FAULT" for lines in found.values() for state, _ in lines), found
    assert "JAX and PyTorch read it alike" in found["reading"][0][1]
    assert out.endswith("nothing found that would stop a run\n")
    assert max(map(len, out.splitlines())) <= 110


def test_planted_faults(place, capsys):
    """One in each kind of file: all are found at once, and each names its file."""
    edit(place / "run/base/config.json", lambda c: c.update(hidden_act="relu"))
    edit(place / "run/base/generation_config.json", lambda c: c.update(eos_token_id=[1, 5000]))
    train = place / "suite/datasets/stone-rank/train.jsonl"
    test = place / "suite/datasets/stone-rank/test.jsonl"
    test.write_text(train.read_text().splitlines()[0] + "\n" + test.read_text())
    lora = place / "run/loras/dish-colon/step_000002"
    edit(lora / "adapter_config.json", lambda c: c.update(lora_alpha=1))
    edit(place / "run/generator/model.safetensors", lambda t: t.pop("decoder/stage_0/conv1w"))
    (place / "suite/vectors.txt").write_text("bird 1 2 3\nbird 1 2\n")
    assert doctor() == 1
    captured = capsys.readouterr()
    found = rows(captured.out)
    faults = {c: " ".join(t for s, t in lines if s == "FAULT") for c, lines in found.items()}
    assert "hidden_act 'relu' is not supported" in faults["base"]
    assert "generation_config.json: eos_token_id [1, 5000] names 5000" in faults["chat"]
    assert "test questions occur in stone-rank's train" in faults["suite"]
    assert f"{lora.relative_to(place)} has alpha 1" in faults["checkpoints"]
    assert "decoder/stage_0/conv1w is missing" in faults["generator"]
    assert "vectors.txt" in faults["encoder"]
    assert captured.err == f"dnd: {captured.out.count('FAULT')} faults found\n"


def test_a_training_that_needs_no_loras(place, capsys):
    """Its room is that of the base's LoRAs, its questions are those that the base is asked."""
    for made in ("loras", "generator"):
        shutil.rmtree(place / "run" / made)
    assert doctor("--config.train.objective=answers", "--config.base.max_length=64") == 0
    found = rows(capsys.readouterr().out)
    assert "checkpoints" not in found
    assert re.fullmatch(
        r"questions and answers have up to \d+ tokens, of 64.*", *found["questions"][0][1:]
    )
    (_, disk), (_, memory) = found["room"]
    assert disk.startswith("disk: tokens 0 kB") and ", and the base " in memory
    assert doctor("--config.train.objective=answers", "--config.base.max_length=8") == 1
    assert "raise the setting" in rows(capsys.readouterr().out)["questions"][0][1]


def test_answered_examples_that_have_no_room(place, capsys):
    distill = "--config.train.objective=distill", "--config.base.max_length=64"
    assert doctor(*distill, "--config.train.shots=5") == 1
    (fault,) = (t for s, t in rows(capsys.readouterr().out)["questions"] if s == "FAULT")
    assert "tokens behind 5 answered examples, more than base.max_length=64; lower" in fault


def test_of_another_base(place, capsys):
    """A generator and LoRAs that are sound, and not of the base that is given."""
    edit(place / "run/base/config.json", lambda c: c.update(num_key_value_heads=1))
    assert doctor() == 1
    (fault,) = (t for s, t in rows(capsys.readouterr().out)["generator"] if s == "FAULT")
    assert "its adapters are of another base than run/base: model.layers.0." in fault
    assert "v_proj.lora_B.weight has shape (8, 2), the base's would be (4, 2)" in fault


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--base=nowhere/at/all", "nowhere/at/all: no such model folder"),
        ("--suite=nowhere.json", "--suite=nowhere.json: no such file or folder"),
        ("--generator=nowhere", "--generator=nowhere: no such file or folder"),
        ("--workdir=nothing_here", "nothing to look at; give --base"),
    ],
)
def test_nothing_to_look_at(flag, said, capsys):
    assert main(["doctor", TINY, flag]) == 2
    assert said in capsys.readouterr().err


def test_copies_on_the_host_want_room(place, capsys, monkeypatch):
    copies = "--config.train.local_dir=copies"
    assert doctor(copies) == 0
    text = next(t for _, t in rows(capsys.readouterr().out)["room"] if "copies" in t)
    assert re.match(r"train.local_dir = copies: 2 copies of the state \S+ [kMG]B, of", text)
    real = shutil.disk_usage

    def full(path):
        return real(path)._replace(free=1000) if path.name == "copies" else real(path)

    (place / "copies").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", full)
    assert doctor(copies) == 1
    (fault,) = (t for s, t in rows(capsys.readouterr().out)["room"] if s == "FAULT")
    assert "train.local_dir" in fault
