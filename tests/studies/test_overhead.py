"""`dnd overhead` as a user runs it, its counts against transformers and hand-made ones, and what it
refuses."""

import json
import pathlib
import sys

import pytest
import torch
from pipeline import TINY
from small_models import write_encoder, write_qwen
from transformers import AutoModelForCausalLM

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.processes import finished
from dnd_jax.costs.bench import torch_generator
from dnd_jax.data.sources import read_jsonl
from dnd_jax.main import main
from dnd_jax.studies.overhead import compare, measure_tuning

# At the end the tokens of rank 2: 58 chunks of 8, as tests/generator/test_released.py counts them.
FEATURES = [(4, 6, 8), (16, 6, 8), (58, 4, 10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """base/, generator/ (a released one of random weights, imported) and task.jsonl."""
    root = tmp_path_factory.mktemp("made")
    write_qwen(root / "base")
    write_encoder(root / "encoder")
    torch.manual_seed(0)
    torch.save(torch_generator.Generator(FEATURES, 3).state_dict(), root / "x.pth")
    arguments = [
        f"--config.base.path={root / 'base'}",
        "--config.lora.rank=2",
        "--config.lora.alpha=4",
    ]
    arguments += [f"--config.condition.encoder={root / 'encoder'}", f"--out={root / 'generator'}"]
    assert main(["import-generator", str(root / "x.pth"), *arguments]) == 0
    rows = [
        {"prompt": f"where is the {word} ?", "response": "two three"}
        for word in ("bird", "six", "ten", "nine", "one")
    ]
    (root / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def command(made: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    return [
        "overhead",
        TINY,
        f"--generator={made / 'generator'}",
        f"--prompts={made / 'task.jsonl'}",
        f"--workdir={workdir}",
        *more,
    ]


@pytest.mark.slow
def test_measured_printed_and_kept(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    monkeypatch.setenv("XLA_FLAGS", "")  # one device a process, as elsewhere
    assert main(command(made, tmp_path / "run", "--limit=3")) == 0
    printed, result = (
        capsys.readouterr().out,
        json.loads((tmp_path / "run" / "overhead.json").read_text()),
    )
    # The timed adapters are gone.
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["overhead.json"]
    assert (
        result["steps"] == 6
        and result["timed_steps"] == 3
        and "(6 steps of 4 at" in printed
        and "3 of them timed" in printed
    )
    parts = result["encode_seconds"] + result["decode_seconds"] + result["write_seconds"]
    assert (
        result["generate_seconds"] == pytest.approx(parts)
        and result["generate_cold_seconds"] > result["generate_seconds"] > 0
    )
    assert result["tune_cold_seconds"] > result["tune_seconds"] > 0
    assert result["ratio"] == pytest.approx(result["tune_seconds"] / result["generate_seconds"])
    assert (
        f"ratio {result['ratio']:.0f}; the paper's 2,500 to 12,000" in printed
        and result["note"] in printed
    )
    for side in ("tune", "generate"):  # a process with JAX in it
        assert (
            1e8 < result[f"{side}_peak_bytes"] < 4e9
            and f"{result[f'{side}_peak_bytes'] / 2**30:.2f}" in printed
        )
    assert result["memory_of"] == "process" and result["device"] == "cpu"
    model = AutoModelForCausalLM.from_pretrained(made / "base")
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert result["step_flop"] == 4 * weights * result["step_tokens"]
    macs = 0
    # The formula of docs/SETTINGS.md.
    for (n, length, c), (n2, l2, c2) in zip(FEATURES[:-1], FEATURES[1:], strict=True):
        macs += 9 * (
            c * c2 * length * n
            + length * l2 * n * c2
            + length * l2 * n * c
            + c * c2 * l2 * n
            + n * n2 * l2 * c2
        )
    assert result["decode_flop"] == 2 * macs


def test_all_steps_are_timed_without_a_limit(made):
    config, shapes = (
        freeze(load_file("tests/tiny.py")),
        load_base_config(made / "base").lora_shapes(2, ("q_proj",)),
    )
    examples = read_jsonl(made / "task.jsonl")
    tuning = measure_tuning(
        made / "base", examples, shapes, 2.0, config.lora, config.base.max_length
    )
    assert tuning["timed_steps"] == tuning["steps"] == 6


def test_the_note_names_what_dominates():
    tuning = {
        "tune_seconds": 100.0,
        "tune_cold_seconds": 110.0,
        "steps": 50,
        "timed_steps": 50,
        "batch_size": 8,
    }
    tuning |= {"step_tokens": 800, "base_weights": 2_000_000, "step_flop": 4 * 2_000_000 * 800}
    generation = {
        "generate_seconds": 0.05,
        "encode_seconds": 0.01,
        "decode_seconds": 0.036,
        "write_seconds": 0.004,
    }
    generation |= {"generate_cold_seconds": 5.5, "encode_flop": 1e9, "decode_flop": 2e12}
    result = compare(tuning=tuning, generation=generation)
    assert result["ratio"] == pytest.approx(2000) and result["cold_ratio"] == pytest.approx(20)
    said = "50 steps of about 0.0064 TFLOP (4 x 2M weights of the base x 800 tokens)"
    assert said in result["note"]
    assert "one pass of 0.001 TFLOP in the text encoder and 2 in the decoder" in result["note"]
    assert (
        "most of the time goes to the decoder" in result["note"] and "timed" not in result["note"]
    )


def test_peak_memory_is_the_peak():
    """What was held for a while counts, and what another process held does not."""
    held = bytearray(800 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    program = (
        "from dnd_jax.costs.bench.case import peak_memory as p; a = p()[0]; x = bytearray(300 << "
        "20); x[::4096] = b'x' * len(x[::4096]); "
        "del x; print(a, *p())"
    )
    code, out, err = finished([sys.executable, "-c", program])
    del held
    assert code == 0, err
    before, after, whose = out.split()
    assert (
        whose == "process"
        and int(before) < 700 << 20
        and (290 << 20) < int(after) - int(before) < (330 << 20)
    )


def test_what_is_refused(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])

    def refused(*more: str) -> str:
        capsys.readouterr()
        asked = [*command(made, tmp_path / "run"), *more]
        given = {word.split("=")[0]: word for word in asked}  # what is given again counts
        assert main(list(given.values())) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    (tmp_path / "p.txt").write_text("where is the bird ?\n")
    assert f"{tmp_path / 'p.txt'}: tuning needs the task's answers" in refused(
        f"--prompts={tmp_path / 'p.txt'}"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "where is the bird ?"}\n')
    assert f"{tmp_path / 'p.jsonl'}:1: response must be given" in refused(
        f"--prompts={tmp_path / 'p.jsonl'}"
    )
    assert (
        f"{made / 'task.jsonl'}:1: 13 tokens" in (line := refused("--config.base.max_length=5"))
        and "base.max_length=5" in line
    )
    assert "no generator.json" in refused(f"--generator={tmp_path}")
    assert "/nowhere/base: no such model folder" in refused("--base=/nowhere/base")
    (tmp_path / "p.jsonl").write_text('{"prompt": "where is the bird ?", "response": "two"}\n')
    # The process's own message.
    assert "dnd: prompts: 1 prompt(s), this generator takes 4" in refused(
        f"--prompts={tmp_path / 'p.jsonl'}"
    )
    assert not (tmp_path / "run" / "overhead.json").exists()
