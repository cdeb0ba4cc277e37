"""A small base, imported adapters of it, and a generator trained on them: what tests of scoring
share."""

import pathlib

import numpy as np
import torch
from small_models import fill, write_encoder
from transformers import GemmaConfig, GemmaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.generator.train import train
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig

MODULES = ("down_proj", "q_proj")
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}


def write_base(folder: pathlib.Path, family: str, suite) -> pathlib.Path:
    """A small model of random weights with a tokenizer of the suite's words."""
    words = build_tokenizer([e.prompt for e in suite.corpus], 500)
    settings, model = FAMILIES[family]
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    end = {
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(5)
    fill(
        model(
            settings(vocab_size=len(words), head_dim=4, max_position_embeddings=128, **sizes, **end)
        )
    ).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_loras(
    root: pathlib.Path, base: pathlib.Path, suite, alpha: float, seed: int = 0
) -> pathlib.Path:
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
            save_adapter(
                root / dataset.name / f"checkpoint-{step}",
                tensors,
                AdapterConfig(str(base), 2, alpha, MODULES),
            )
    return root


def imported_run(root: pathlib.Path, family: str, suite) -> tuple:
    """A base, imported adapters of another scale than config.lora's, and a trained generator:
    (config, its file, run folder)."""
    base = write_base(root / "base", family, suite)
    changes = {
        "suite": str(suite.root),
        "base": {"path": str(base)},
        "lora": {"rank": 16, "alpha": 1.0, "steps": 2, "checkpoints": 1},
        "condition": {"encoder": str(write_encoder(root / "encoder")), "too_long": "cut"},
        "generator": {"features": ((0, 0, 0), (0, 0, 0)), "chunk_width": 8},
        "train": {
            "checkpoints": str(write_loras(root / "loras", base, suite, 3.0)),
            "batch_size": 8,
            "steps": 2,
        },
        "evaluate": {"samples": 2, "max_new_tokens": 3, "batch_size": 16},
    }
    (root / "config.py").write_text(
        "from dnd_jax.config.load import load_file\n\n\ndef get_config():\n    config = "
        "load_file('tests/tiny.py')\n"
        f"    config.update({changes!r})\n    return config\n"
    )
    config = freeze(load_file(str(root / "config.py")))
    train(config, suite, root / "w")
    return config, root / "config.py", root / "w"
