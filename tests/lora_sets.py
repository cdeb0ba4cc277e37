"""What the tests of LoRA checkpoints share: their shapes for a Qwen2, a collection of them, opened,
and an adapter of PEFT's."""

import pathlib

import torch
from peft import LoraConfig, get_peft_model

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.lora.checkpoints import Checkpoints
from dnd_jax.lora.layout import MODULE_ORDER

# Of LoraConfig: scales and ranks of modules that differ.
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 3},
    "alpha_pattern": {"k_proj": 5.0, r"layers\.0\.self_attn\.q_proj": 1.0},
}
NAMES = ("birds", "fish")
BLOCK = {
    name: "mlp" if name in ("up_proj", "gate_proj", "down_proj") else "self_attn"
    for name in MODULE_ORDER
}


def qwen_shapes(
    hidden: int, kv: int, intermediate: int, layers: int, rank: int
) -> dict[str, tuple[int, int]]:
    """Of a LoRA on every projection: hidden, key-value and intermediate widths."""
    sizes = {
        **{
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (hidden, hidden),
        },
        **{
            "up_proj": (hidden, intermediate),
            "gate_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        },
    }
    shapes = {}
    for layer in range(layers):
        for name, (d_in, d_out) in sizes.items():
            module = f"model.layers.{layer}.{BLOCK[name]}.{name}"
            shapes[f"{module}.lora_A.weight"], shapes[f"{module}.lora_B.weight"] = (
                (rank, d_in),
                (d_out, rank),
            )
    return shapes


def opened(root: pathlib.Path, **generator) -> Checkpoints:
    """The checkpoints of the datasets NAMES below root, as mini reads them."""
    config = load_file("configs/mini.py")
    config.train.checkpoints = str(root)
    config.generator.update(target="chunk", **generator)
    datasets = tuple(Dataset(name, (), ()) for name in NAMES)
    return Checkpoints(freeze(config), Suite("s", root, (), datasets, (), {}, ""), root)


def random_lora(
    model: torch.nn.Module, folder: pathlib.Path, size: float = 1.0, **settings
) -> pathlib.Path:
    """An adapter that PEFT makes and saves, every matrix random; settings: of LoraConfig, on all
    seven projections unless they say otherwise."""
    torch.manual_seed(2)
    targets = {"r": 2, "lora_alpha": 4, "target_modules": [*MODULE_ORDER]}
    adapted = get_peft_model(model, LoraConfig(**targets | settings))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) * size)
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder
