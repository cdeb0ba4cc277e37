"""What the tests of LoRA checkpoints share: their shapes for a Qwen2, and a collection of them,
opened."""

import pathlib

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.lora.checkpoints import Checkpoints
from dnd_jax.lora.layout import MODULE_ORDER

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
