"""`dnd evaluate` on imported adapters of small bases: what is kept and what is made anew, and a base that only PyTorch runs."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from pipeline import tiny_suite
from small_models import fill, write_encoder
from transformers import GemmaConfig, GemmaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dnd_jax import evaluate as stage
from dnd_jax.adapters import AdapterConfig, save_adapter
from dnd_jax.config import freeze, load_file
from dnd_jax.errors import InputError
from dnd_jax.harness import lm_eval_stage
from dnd_jax.lm_data import build_tokenizer
from dnd_jax.main import main
from dnd_jax.suite import load_suite
from dnd_jax.train import train

MODULES = ("down_proj", "q_proj")
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """3 training tasks, 3 unseen ones of 5 questions; it keeps its folder."""
    return load_suite(tiny_suite(tmp_path_factory.mktemp("suite") / "towns"), 4)


def write_base(folder: pathlib.Path, family: str, suite) -> pathlib.Path:
    """A small model of random weights with a tokenizer of the suite's words."""
    words = build_tokenizer([e.prompt for e in suite.corpus], 500)
    settings, model = FAMILIES[family]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    end = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
    torch.manual_seed(5)
    fill(model(settings(vocab_size=len(words), head_dim=4, max_position_embeddings=128, **sizes, **end))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_loras(root: pathlib.Path, base: pathlib.Path, suite, alpha: float, seed: int = 0) -> pathlib.Path:
    """Three random LoRA checkpoints of each training task and one of the first unseen task."""
    rng = np.random.default_rng(seed)
    sides = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (24, 16)}
    for dataset in (*suite.train, suite.unseen[0]):
        for step in range(3):
            tensors = {}
            for layer in range(2):
                for module, (inputs, outputs) in sides.items():
                    path = f"model.layers.{layer}.{module}"
                    tensors[f"{path}.lora_A.weight"] = rng.standard_normal((2, inputs), np.float32)
                    tensors[f"{path}.lora_B.weight"] = rng.standard_normal((outputs, 2), np.float32)
            save_adapter(root / dataset.name / f"checkpoint-{step}", tensors, AdapterConfig(str(base), 2, alpha, MODULES))
    return root


def run_of(root: pathlib.Path, family: str, suite, **evaluate):
    """A base, imported adapters of another scale than config.lora's, and a trained generator: (config, workdir)."""
    base = write_base(root / "base", family, suite)
    changes = {
        "suite": str(suite.root),
        "base": {"path": str(base)},
        "lora": {"rank": 16, "alpha": 1.0, "steps": 2, "checkpoints": 1},
        "condition": {"encoder": str(write_encoder(root / "encoder"))},
        "generator": {"features": ((0, 0, 0), (0, 0, 0)), "chunk_width": 8},
        "train": {"checkpoints": str(write_loras(root / "loras", base, suite, 3.0)), "batch_size": 8, "steps": 2},
        "evaluate": {"samples": 2, "max_new_tokens": 3, "batch_size": 16, **evaluate},
    }
    (root / "config.py").write_text(
        "from dnd_jax.config import load_file\n\n\ndef get_config():\n    config = load_file('tests/tiny.py')\n"
        f"    config.update({changes!r})\n    return config\n"
    )
    config = freeze(load_file(str(root / "config.py")))
    train(config, suite, root / "w")
    return config, root / "w"


def test_agreement_is_at_the_scale_of_the_adapters_and_on_a_sample(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "COMPARED", 3)
    monkeypatch.setattr(stage, "TIMED", 1)
    config, workdir = run_of(tmp_path, "qwen2", suite, batch_size=2)
    result = stage.evaluate(config, suite, config.base.path, workdir)
    agreement = result["agreement"]
    assert (agreement["questions"], agreement["answers"], agreement["same_answers"]) == (15, 9, 9)
    assert agreement["largest_logit_difference"] < 1e-3
    assert (result["overhead"]["steps"], result["overhead"]["timed_steps"]) == (2, 1)


def test_what_is_of_another_generator_is_made_anew(suite, tmp_path, capsys):
    """The generator is trained on, then the LoRA checkpoints change: never another's numbers, ours or the harness's."""
    config, workdir = run_of(tmp_path, "gemma", suite)
    base, path, name = config.base.path, workdir / stage.EVALUATION, suite.unseen[1].name

    def files() -> dict:
        return {p: p.read_bytes() for p in workdir.glob("*/**/adapter_model.safetensors")}

    def both(config) -> tuple[dict, dict, str]:
        """Results of both stages, and what they print of adapters."""
        result, harness = stage.evaluate(config, suite, base, workdir), lm_eval_stage(config, suite, base, workdir, [name])
        return result, harness, "\n".join(line for line in capsys.readouterr().out.splitlines() if "made anew" in line)

    first, harness, said = both(config)
    made, before = files(), path.stat().st_mtime_ns
    assert not said and both(config)[:2] == (first, harness)
    assert files() == made and path.stat().st_mtime_ns == before

    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    train(config, suite, workdir, allowed=["train.steps"])
    second, own, said = both(config)
    # Two samples of three unseen tasks and of their wrong prompts, and ridge, which the same element target leaves as it was.
    assert "15 adapter(s) were of another generator" in said
    assert len({p for p, old in made.items() if files()[p] != old}) == 12
    assert [e["train_mean"] for e in second["unseen"].values()] == [e["train_mean"] for e in first["unseen"].values()]

    # The same generator, other LoRAs of the same names and sizes: the competitors are theirs.
    write_loras(tmp_path / "loras", pathlib.Path(base), suite, 3.0, seed=1)
    third, own, said = both(config)
    assert "4 adapter(s) were of another generator" in said
    fresh = tmp_path / "fresh"
    shutil.copytree(workdir / "generator", fresh / "generator")
    assert third == stage.evaluate(config, suite, base, fresh), "as where there never were others"
    assert own["unseen"][name]["generated"] == lm_eval_stage(config, suite, base, fresh, [name])["unseen"][name]["generated"]


def test_a_finished_generator_knows_its_checkpoints(suite, tmp_path):
    config, workdir = run_of(tmp_path, "qwen2", suite)
    train(config, suite, workdir)
    nowhere = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoints="/nowhere"))
    with pytest.raises(InputError, match="/nowhere: expected DATASET"):
        train(nowhere, suite, workdir)
    others = write_loras(tmp_path / "others", pathlib.Path(config.base.path), suite, 5.0)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoints=str(others)))
    with pytest.raises(InputError, match=r"allow them by --allow=checkpoints .*checkpoints: '\w+' -> '\w+'"):
        train(other, suite, workdir)
    path = workdir / "generator" / "generator.json"
    stored = json.loads(path.read_text())
    del stored["checkpoints"]
    path.write_text(json.dumps(stored))
    assert train(other, suite, workdir) == workdir / "generator"  # an earlier version's folder does not say


def test_a_base_that_only_pytorch_runs(suite, tmp_path, capsys):
    """Gemma: all is scored and reported but what needs our own base."""
    _, workdir = run_of(tmp_path, "gemma", suite, answers="likelihood")
    assert main(["evaluate", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]) == 0
    results = json.loads((workdir / "results.json").read_text())
    page = (workdir / "report.html").read_text()
    for name, entry in results["unseen"].items():
        methods = {"base", "train_mean", "train_best", "mean_adapter", "nearest", "ridge", "generated", "wrong_prompts"}
        assert methods <= entry.keys() and ("tuned" in entry) == (name == suite.unseen[0].name)
    for part in ("agreement", "overhead"):
        assert results[part].keys() == {"note"} and "model_type 'gemma' is not supported" in results[part]["note"]
    assert page.count("Not measured, because only PyTorch runs this base.") == 2
    assert "the likeliest label" in page and "greedy decoding" not in page
    assert "Not measured, because only PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "lm-eval", "quickstart"])
def test_a_suite_without_unseen_datasets_is_refused_where_it_is_scored(suite, tmp_path, command, capsys):
    bare = shutil.copytree(suite.root, tmp_path / "bare")
    description = json.loads((bare / "suite.json").read_text())
    (bare / "suite.json").write_text(json.dumps({**description, "unseen": []}))
    assert main([command, "--config=tests/tiny.py", f"--suite={bare}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert capsys.readouterr().err == f"dnd: {bare}: names no unseen dataset, so there is nothing to score; add one\n"
