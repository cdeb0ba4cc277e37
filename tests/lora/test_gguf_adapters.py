"""Adapters of a base from a GGUF file: they say on which file they were trained, and another one
under the same name is a note."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from peft import LoraConfig, PeftModel

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

from gguf_files import model_of, write_gguf  # noqa: E402
from pipeline import TINY, tiny_suite  # noqa: E402
from safetensors import safe_open  # noqa: E402

from dnd_jax.base.hf_config import load_base_config  # noqa: E402
from dnd_jax.base.identity import base_weights  # noqa: E402
from dnd_jax.base.torch_base import load_torch_base  # noqa: E402
from dnd_jax.config.load import load_file  # noqa: E402
from dnd_jax.config.validate import freeze  # noqa: E402
from dnd_jax.core import files  # noqa: E402
from dnd_jax.data.suite import Dataset, Suite  # noqa: E402
from dnd_jax.generator.folder import read_description  # noqa: E402
from dnd_jax.lora.adapter import load_adapter, save_adapter  # noqa: E402
from dnd_jax.lora.card import card  # noqa: E402
from dnd_jax.lora.checkpoints import Checkpoints  # noqa: E402
from dnd_jax.lora.peft_settings import (  # noqa: E402
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    adapter_of,
    load_adapter_config,
)
from dnd_jax.lora.verify import verify_on_base  # noqa: E402
from dnd_jax.main import main  # noqa: E402

HUB = {"general.source.repo_url": ("string", "https://huggingface.co/org/Tiny")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(files.CACHE, str(tmp_path / "cache"))


def adapter_on(base: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A LoRA of random numbers, saved as `dnd collect` saves one."""
    lora = dataclasses.replace(freeze(load_file("mini")).lora, rank=2, targets=("q_proj",))
    shapes, rng = load_base_config(base).lora_shapes(2, ("q_proj",)), np.random.default_rng(0)
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    return save_adapter(folder, tensors, adapter_of(base, lora))


def test_an_adapter_says_on_which_file_it_was_trained(tmp_path):
    """In its tensors' file: PEFT warns of settings that it does not know."""
    base = write_gguf(tmp_path / "x.gguf", keys=HUB)
    adapter = adapter_on(base, tmp_path / "adapter")
    config = load_adapter_config(adapter)
    assert config.base == "org/Tiny" and config.weights == base_weights(base)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert json.loads((adapter / CONFIG).read_text()).keys() <= known
    with safe_open(adapter / WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "pt", "base_weights": config.weights}
    PeftModel.from_pretrained(load_torch_base(base), adapter)
    said = card(config, "0" * 16, "1" * 64, ["a"], 0)
    assert "- base: `org/Tiny`\n- its weights: the GGUF file x.gguf (Q4_1, sha256 " in said
    other = AdapterConfig("org/Tiny", 2, 4.0, ("q_proj",))
    assert "its weights" not in card(other, "0" * 16, "1" * 64, ["a"], 0)
    assert "weights" not in other.to_json()


def test_another_file_under_the_same_name_is_a_note(tmp_path):
    base = write_gguf(tmp_path / "x.gguf", keys=HUB)
    other = write_gguf(tmp_path / "y.gguf", keys=HUB, types=("Q8_0",))
    adapter = adapter_on(base, tmp_path / "adapter")
    assert "note" not in verify_on_base(adapter, base)
    said = verify_on_base(adapter, other)
    assert f"note: trained on {base_weights(base)}, and this base is y.gguf (Q4_1" in said
    assert said.splitlines()[-1].startswith("ok: ")
    plain = save_adapter(tmp_path / "plain", load_adapter(adapter), load_adapter_config(adapter))
    config = dataclasses.replace(load_adapter_config(plain), weights="")
    save_adapter(plain, load_adapter(adapter), config)
    assert "note: trained on no GGUF file that is named, and" in verify_on_base(plain, base)


def test_loras_of_several_files_are_a_note(tmp_path, capsys):
    base = write_gguf(tmp_path / "x.gguf", keys=HUB)
    other = write_gguf(tmp_path / "y.gguf", keys=HUB, types=("Q8_0",))
    root = tmp_path / "loras"
    for i, of in enumerate((base, base, other)):
        adapter_on(of, root / "task" / f"step_{i}")
    config = load_file("mini")
    config.train.checkpoints, config.base.path = str(root), str(base)
    suite = Suite("s", root, (), (Dataset("task", (), ()),), (), {}, "")

    def adapter() -> AdapterConfig:
        return Checkpoints(freeze(config), suite, tmp_path / "run").adapter

    both = "; ".join([base_weights(base), base_weights(other)])
    assert (adapter().base, adapter().weights) == ("org/Tiny", both)
    assert f"note: {root}: trained on {both}, and this base is x.gguf" in capsys.readouterr().out
    (root / "task" / "step_2").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert adapter().weights == base_weights(base) and "note" not in capsys.readouterr().out


@pytest.mark.slow
def test_every_stage_on_a_gguf_file(tmp_path, capsys):
    suite = tiny_suite(tmp_path / "suite")
    base = write_gguf(
        tmp_path / "x.gguf", model=model_of("llama", max_position_embeddings=512), keys=HUB
    )
    run = tmp_path / "run"
    settings = {
        "base.path": base,
        "base.max_length": 384,
        "train.batch_size": 8,
        "lora.targets": "('q_proj','v_proj')",
    }
    given = [TINY, f"--suite={suite}", *(f"--config.{key}={of}" for key, of in settings.items())]
    assert main(["quickstart", *given, f"--workdir={run}"]) == 0, capsys.readouterr().err
    loras = sorted((run / "loras").glob("*/step_*"))
    assert loras and all(load_adapter_config(p).weights == base_weights(base) for p in loras)
    description = read_description(run / "generator")
    assert description.adapter.base == "org/Tiny"
    assert description.adapter.weights == base_weights(base)
    made = next(iter(sorted(run.glob("**/README.md"))))
    assert f"the GGUF file {base_weights(base)}" in made.read_text()
    capsys.readouterr()
    assert main(["doctor", *given, f"--workdir={run}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"org/Tiny from {base_weights(base)}: llama, 2 layers of 64" in said
    prompts = next(iter(sorted(suite.glob("**/train.jsonl"))))
    made = [f"--generator={run}", f"--prompts={prompts}", f"--out={tmp_path / 'a'}"]
    merge = ["generate", *made, f"--merge={tmp_path / 'm'}"]
    assert main(merge) == 2
    said = capsys.readouterr().err
    assert f"the LoRAs were trained on {base_weights(base)}; give that file by --base" in said
    assert main([*merge, f"--base={base}"]) == 0
    assert "note" not in capsys.readouterr().err and not base_weights(tmp_path / "m")
    assert f"the GGUF file {base_weights(base)}" in (tmp_path / "m" / "README.md").read_text()
    assert main(["verify-adapter", str(tmp_path / "a"), f"--base={base}"]) == 0
    other = write_gguf(tmp_path / "y.gguf", model=model_of("llama"), keys=HUB, types=("Q8_0",))
    elsewhere = [argument for argument in given if "base.path" not in argument]
    assert main(["doctor", *elsewhere, f"--workdir={run}", f"--base={other}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"its LoRAs were trained on {base_weights(base)}, and this base is y.gguf" in said
