"""A GGUF file's metadata -> config.json, as llama.cpp reads it. What our base does not compute, and
any key that is not known here, is refused by its name: docs/FILES.md."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dnd_jax.base.gguf.header import ARCHITECTURES, HUB, Gguf
from dnd_jax.core.errors import listed

# Keys of an architecture that change no number of ours, or only say again what another one says.
PASSED = {
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # of scalings that are refused
}
# Keys that change numbers, and the only value of them that is computed here.
ONLY = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
}
# Llama 3's own rope scaling: llama.cpp's converter makes a tensor of factors of it.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CLOSE = 1e-4  # relative; of factors that were computed in float32


def config_of(file: Gguf) -> dict:
    """config.json's content. Raises InputError that lists the keys that are missing, unknown, or of
    what is not computed here."""
    keys = _Keys(file.architecture, file.own())
    heads, width = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head = keys.whole("attention.key_length", width // heads if heads else None)
    embeddings = file.tensors.get("token_embd.weight")
    config = {
        "architectures": [ARCHITECTURES[file.architecture]],
        "model_type": file.architecture,
        "vocab_size": 0 if embeddings is None else int(embeddings.shape[-1]),
        "hidden_size": width,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, keys, head),
        "dtype": "float32",
    }
    if file.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    else:
        config["use_sliding_window"] = False
    if file.architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    _check_others(keys, config)
    if keys.faults:
        raise listed(str(file.path), keys.faults, most=5)
    return config


def _rope(file: Gguf, keys: "_Keys", head: int) -> dict:
    """rope_parameters."""
    if head % 2:
        keys.fault("attention.key_length", f"makes heads of {head}, an odd number, to rotate")
    if keys.whole("rope.dimension_count", head or None) != head:
        keys.fault("rope.dimension_count", f"rotates only a part of heads of {head}")
    rope = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10000.0)}
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
    scaled = factor not in (0.0, 1.0)
    kind = keys.get("rope.scaling.type", "linear" if scaled else "none")
    if kind == "linear" and scaled:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        keys.fault("rope.scaling.type", f"{kind!r} is not computed here; only none and linear are")
    if ROPE_FACTORS not in file.tensors or keys.faults:
        return rope
    factors = file.values(ROPE_FACTORS)
    if np.all(factors == 1.0):
        return rope
    largest = float(factors.max())
    expected = _llama3_factors(rope["rope_theta"], head, largest)
    same = factors.shape == expected.shape and np.allclose(factors, expected, rtol=CLOSE)
    if rope["rope_type"] != "default" or not same:
        keys.faults.append(f"tensor {ROPE_FACTORS} is another rope scaling than Llama 3's; {HUB}")
    return rope | {"rope_type": "llama3", "factor": largest, **LLAMA3}


def _llama3_factors(theta: float, head: int, factor: float) -> np.ndarray:
    """What each frequency (head / 2,) is divided by in Llama 3's rope scaling."""
    waves = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)
    low, high, original = LLAMA3.values()
    between = (original / waves - low) / (high - low)
    smooth = 1 / ((1 - between) / factor + between)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, smooth))


def _check_others(keys: "_Keys", config: Mapping) -> None:
    """Notes keys that are unknown, or of what is not computed here."""
    window, length = keys.get("attention.sliding_window", None), config["max_position_embeddings"]
    if window and not (type(window) is int and window >= length):
        keys.fault("attention.sliding_window", f"{window!r} does not say which layers slide")
    value = keys.get("attention.value_length", config["head_dim"])
    if value != config["head_dim"]:
        keys.fault("attention.value_length", f"{value!r} differs from that of the keys")
    for key, only in ONLY.items():
        if (found := keys.get(key, only)) != only:
            what = "a mixture of experts" if key.startswith("expert") else "not computed here"
            keys.fault(key, f"{found!r} is {what}")
    for key in sorted(keys.own.keys() - keys.asked - PASSED):
        keys.fault(key, "is not known here")


@dataclasses.dataclass
class _Keys:
    """The keys of a file's architecture, which of them were asked for, and what is wrong."""

    architecture: str
    own: dict[str, Any]
    faults: list[str] = dataclasses.field(default_factory=list)
    asked: set[str] = dataclasses.field(default_factory=set)

    def fault(self, key: str, what: str) -> None:
        self.faults.append(f"{self.architecture}.{key} {what}; {HUB}")

    def get(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        return self.own.get(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number, or one for each layer where all are the same; 0 where it is
        missing or another, which is noted."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if value is None:
            self.fault(key, "is missing")
        elif isinstance(value, list):
            self.fault(key, "differs from layer to layer")
        elif type(value) is not int or value < 1:
            self.fault(key, f"{value!r} should be a positive whole number")
        else:
            return value
        return 0

    def real(self, key: str, default: float | None = None) -> float:
        """A number that was stored as float32, by its shortest spelling; 0 where it is missing or
        none, which is noted."""
        value = self.get(key, default)
        if type(value) in (float, int) and math.isfinite(value):
            return float(str(np.float32(value)))
        self.fault(key, "is missing" if value is None else f"{value!r} should be a number")
        return 0.0
