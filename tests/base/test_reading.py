"""Our reading of a base is compared with PyTorch's before hours are spent on it: once for the same
files; what differs is an error in numbers, what cannot be measured a note."""

import dataclasses
import importlib.metadata
import json
import os
import sys

import jax
import numpy as np
import pytest
from pipeline import TINY, tiny_suite
from safetensors.torch import load_file, save_file
from small_models import write_qwen

from dnd_jax.base import agreement, reading
from dnd_jax.base.agreement import disagreement
from dnd_jax.base.architecture import BaseLM
from dnd_jax.base.folder import load_base
from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.load import load_file as load_config
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.processes import finished, of_module
from dnd_jax.data.sources import Example
from dnd_jax.main import main
from dnd_jax.parallel import hosts
from dnd_jax.scoring.report import publish_measured


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A small base, measured in this process, and nothing kept from before."""
    monkeypatch.setenv("DND_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "measured", reading.compare)
    return write_qwen(tmp_path / "base")


def misread(folder):
    """As a reader does that takes another epsilon than the file says."""
    module, params = load_base(folder)
    return BaseLM(dataclasses.replace(module.config, rms_norm_eps=0.1)), params


def test_it_is_measured_once_for_the_same_files(base, capsys, monkeypatch):
    reading.check_files(base)
    assert "comparing with PyTorch's reading" in capsys.readouterr().out
    reading.check_files(base)
    assert capsys.readouterr().out == ""

    weights = {name: value * 1.1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    monkeypatch.setattr(reading, "load_base", misread)
    reason = r"reads it otherwise than PyTorch: logits are up to .* next tokens are the same"
    for _ in range(2):
        with pytest.raises(CheckFailed, match=f"{base}: .*{reason}.*evaluate.agreement=False"):
            reading.check_files(base)
    assert capsys.readouterr().out.count("comparing") == 1


def test_a_damaged_result_is_measured_again(base, tmp_path, capsys):
    reading.check_files(base)
    (kept,) = (tmp_path / "cache" / "reading").iterdir()
    kept.write_text('{"largest_logit": 1}')
    reading.check_files(base)
    assert capsys.readouterr().out.count("comparing") == 2
    found = json.loads(kept.read_text())
    assert found["same_tokens"] == found["tokens"] > sum(reading.RANDOM)


def test_what_cannot_be_measured_is_a_note(base, monkeypatch, capsys):
    def note(name: str, value) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(reading, name, value)
            reading.check_files(base)
        return capsys.readouterr().out.splitlines()[-1]

    assert "0 GB of memory, 0 GB are free" in note("free_memory", lambda: 10)
    assert "not compared with PyTorch's reading (x)" in note("measured", lambda f: {"note": "x"})
    with monkeypatch.context() as patch:
        patch.setattr("dnd_jax.core.packages.is_installed", lambda name: name != "torch")
        reading.check_files(base)
    assert "not installed; pip install 'dnd-jax[eval]'" in capsys.readouterr().out


def test_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    """Its result, and what becomes of one that fails, is killed or has no room."""
    folder = write_qwen(tmp_path / "base")
    asked = []

    def child(result):
        monkeypatch.setattr(reading, "finished", lambda *given: asked.append(given) or result)
        return reading.measured(folder)

    assert child((-9, "", ""))["note"] == "no room in memory"
    assert child((1, "", "Traceback\nOSError: boom"))["note"] == "OSError: boom"
    assert child((0, 'noise\n{"note": "full"}\n', "bars")) == {"note": "full"}
    with pytest.raises(InputError, match="a damaged file"):
        child((0, '{"error": "a damaged file"}', ""))
    command, environment, seconds = asked[0]
    assert seconds == 30 * 60
    assert command == of_module("dnd_jax.base.reading", str(folder))
    assert (environment["JAX_PLATFORMS"], environment["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    assert environment["ONEDNN_DEFAULT_FPMATH_MODE"] == "STRICT"
    assert environment["DNNL_DEFAULT_FPMATH_MODE"] == "STRICT"

    capsys.readouterr()
    reading.main(str(folder))
    assert reading.difference(json.loads(capsys.readouterr().out.splitlines()[-1])) == ""
    (folder / "model.safetensors").write_bytes(b"")
    reading.main(str(folder))
    assert "cannot load it" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


@pytest.mark.parametrize("note", [reading.NO_ROOM, reading.SLOW, "OSError: boom"])
def test_what_would_end_so_again_is_not_tried_again(base, tmp_path, monkeypatch, capsys, note):
    """Nor where this process was ended with its own; what failed otherwise is tried again."""
    tried = []

    def child(folder):
        (kept,) = (tmp_path / "cache" / "reading").iterdir()
        tried.append(json.loads(kept.read_text())["note"])
        return {"note": note}

    monkeypatch.setattr(reading, "measured", child)
    for _ in range(2):
        reading.check_files(base)
    again = note not in (reading.NO_ROOM, reading.SLOW)
    assert len(tried) == 1 + again and tried[0] == reading.BEGUN
    assert ("remove" in capsys.readouterr().out.splitlines()[-1]) != again
    assert len(list((tmp_path / "cache" / "reading").iterdir())) == (not again)


def test_a_stopped_measurement_is_begun_again(base, tmp_path, monkeypatch):
    def stopped(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reading, "measured", stopped)
        reading.check_files(base)
    assert "note" not in reading.comparison(base)


def test_room_is_looked_at_before_files_are_hashed(base, monkeypatch):
    """Of tensors that are stored without `model.`, too."""
    needed = reading._no_room
    monkeypatch.setattr(reading, "base_digest", lambda path: pytest.fail("hashed"))
    monkeypatch.setattr(reading, "NEEDED", 10**9)
    monkeypatch.setattr(reading, "free_memory", lambda: 1)
    said = reading.comparison(base)["note"]
    assert "GB of memory" in said
    weights = load_file(base / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, base / "model.safetensors")
    assert needed(base) == said


def test_no_process_and_no_packages_are_notes(base, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", missing)
        assert "torch" in reading.comparison(base)["note"]
    monkeypatch.undo()
    for error, note in ((OSError("no memory"), "no memory"), (TimeoutError(), reading.SLOW)):

        def raises(*given, error=error):
            raise error

        monkeypatch.setattr(reading, "finished", raises)
        assert note in reading.measured(base)["note"]


def test_a_process_that_takes_too_long():
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(TimeoutError):
        finished(sleeps, seconds=0.1)


@pytest.mark.slow
def test_the_process_itself_and_no_torch_beside_it(tmp_path):
    folder = write_qwen(tmp_path / "base")
    program = (
        "import sys; from dnd_jax.base.reading import check_files; "
        f"check_files({str(folder)!r}); assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"DND_JAX_CACHE": str(tmp_path / "cache")}
    code, out, err = finished([sys.executable, "-c", program], environment)
    assert code == 0, err
    assert len(list((tmp_path / "cache" / "reading").iterdir())) == 1, out


def test_collect_and_train_stop_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    def different(path):
        raise CheckFailed(f"{path}: reads it otherwise")

    suite, base = tiny_suite(tmp_path / "suite"), write_qwen(tmp_path / "base")
    monkeypatch.setattr(reading, "check_files", different)
    command = [
        TINY,
        f"--suite={suite}",
        f"--workdir={tmp_path / 'w'}",
        "--config.lora.targets=('q_proj',)",
    ]
    given = f"--config.base.path={base}"
    assert main(["collect", *command, given]) == 1
    assert f"dnd: {base}: reads it otherwise" in capsys.readouterr().err
    assert not (tmp_path / "w" / "loras").exists()

    config = freeze(load_config("tests/tiny.py"))
    there = dataclasses.replace(config.base, path=str(base))
    with hosts.lead_first(), pytest.raises(CheckFailed):  # as `train` does
        reading.check_given(dataclasses.replace(config, base=there))
    with pytest.raises(AssertionError, match="turn"), hosts.lead_first(), hosts.lead_first():
        pass
    reading.check_given(config)  # one that dnd pretrains itself
    off = dataclasses.replace(config.evaluate, agreement=False)
    reading.check_given(dataclasses.replace(config, base=there, evaluate=off))
    nowhere = dataclasses.replace(config.base, path="/nowhere/base")
    monkeypatch.undo()
    reading.check_given(dataclasses.replace(config, base=nowhere))
    assert "note: not compared" in capsys.readouterr().out


# --- Of scores
# --------------------------------------------------------------------------------------------------

FOUND = {
    "questions": 15, "answers": 15, "tokens": 4, "dtype": "float32", "same_answers": 15,
    "largest_logit_difference": 1e-3, "largest_logit": 9.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, False),
        ({"same_answers": 14}, False),
        ({"same_answers": 6}, True),
        ({"largest_logit_difference": 1.96}, True),
        ({"largest_logit_difference": 0.5, "dtype": "bfloat16", "same_answers": 10}, False),
        ({"dtype": "bfloat16", "same_answers": 5}, True),
        ({"answers": 0, "same_answers": 0}, False),
    ],
)
def test_disagreement_of_scores(change, warned):
    line = disagreement(FOUND | change)
    assert bool(line) == warned and "\n" not in line
    assert not warned or line.startswith("WARNING: JAX and PyTorch disagree")


def test_accelerators_compare_in_all_bits_of_float32(base, monkeypatch):
    """Ours is traced as they have it for accuracy, not for speed."""
    made, found = agreement.make_greedy, []

    def traced(module, tokens):
        def greedy(*given):
            found.append(jax.make_jaxpr(made(module, tokens))(*given))
            return np.zeros((len(given[3]), tokens), np.int32)

        return greedy

    monkeypatch.setattr(agreement, "make_greedy", traced)
    torch_base = TorchBase(base, 2, 2)
    questions = [Example("what is iron ?", "yes")]
    shapes = BaseLM(load_base_config(base)).config.lora_shapes(1, ("q_proj",))
    lora = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    monkeypatch.setattr(torch_base, "use", lambda folder: None)
    asked = [agreement.Asked("none", lora, 1.0, questions)]
    assert agreement.agreement(torch_base, asked, 2)["answers"] == 1
    text = str(found[0])
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 0
    assert jax.config.jax_default_matmul_precision is None


def test_results_of_earlier_versions_have_no_largest_logit():
    older = {key: value for key, value in FOUND.items() if key != "largest_logit"}
    assert not disagreement(older) and disagreement(older | {"same_answers": 3})
    assert not disagreement({"note": "Not measured."})


def test_a_disagreement_is_said_first(tmp_path, monkeypatch, capsys):
    results = {
        "agreement": FOUND | {"same_answers": 6}, "overhead": {"note": "none"}, "seconds": {},
        "suite": "s", "seeds": [0], "answers": "greedy", "rule": "r",
    }  # fmt: skip
    for part in ("_scores", "curves", "projection", "_harness"):
        monkeypatch.setattr(f"dnd_jax.scoring.report.{part}", lambda *given: "")

    def written(*given):
        from dnd_jax.scoring.report import write_report

        write_report(tmp_path, results, {})
        return results

    monkeypatch.setattr("dnd_jax.scoring.report._write", written)
    publish_measured({}, None, tmp_path)
    assert capsys.readouterr().out.startswith("WARNING: JAX and PyTorch disagree")
    page = (tmp_path / "report.html").read_text()
    assert page.index("WARNING") < page.index("Every score is") and page.count("<p>") > 1
    assert page.index("<p>") == page.index("<p><b>WARNING")
