"""Hugging Face folders (config.json, *.safetensors, tokenizer files) <-> our base LM, and their
tokenizers."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dnd_jax.base.architecture import RULES, BaseLM, LmConfig, RopeScaling
from dnd_jax.base.hub import resolve
from dnd_jax.base.names import lm_name, lm_table
from dnd_jax.base.weights import StoredWeights, load_params
from dnd_jax.config.validate import fields_of
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line, listed
from dnd_jax.core.files import read_json, replacing
from dnd_jax.core.tensors import write_safetensors

transformers = packages.deferred("transformers")
CONFIG = "config.json"
# model_type -> class in transformers
BASES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}


def read_config(folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """(file, content) of a folder's config.json. Raises InputError when it is absent or no JSON
    object."""
    file = folder / CONFIG
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(
            f"{file}: not a model's configuration, which is a JSON object; copy the file again"
        )
    return file, raw


def load_base_config(path: str | os.PathLike) -> LmConfig:
    """The base LM's sizes from a folder's config.json. Raises InputError for an architecture that
    is none of BASES."""
    file, raw = read_config(resolve(path, (CONFIG,)))
    kind = raw.get("model_type")
    if kind not in BASES:
        raise InputError(
            f"{file}: model_type {kind!r} is not supported as a base (supported: "
            f"{', '.join(BASES)}); adapters of other bases can "
            "be collected elsewhere and imported: --config.train.checkpoints=FOLDER"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported; only silu")
    if raw.get("quantization_config"):
        raise InputError(
            f"{file}: quantized weights are not supported; use the model's float16, bfloat16 or "
            "float32 version"
        )
    if kind == "llama" and raw.get("num_key_value_heads") is None:  # as the first Llamas have it
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    bias = kind in ("llama", "qwen3") and bool(raw.get("attention_bias"))
    theta, scaling = _rope(file, raw)
    implied = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        # False is transformers' default for all of BASES.
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "head_dim": raw.get("head_dim", 128 if kind == "qwen3" else None),
        "qkv_bias": kind == "qwen2" or bias,
        "o_bias": bias,
        "mlp_bias": kind == "llama" and bool(raw.get("mlp_bias")),
        "qk_norm": kind == "qwen3",
    }
    config = fields_of(LmConfig, raw | implied, file)
    return dataclasses.replace(config, windows=_windows(raw, config.num_hidden_layers))


def _rope(file: pathlib.Path, raw: Mapping) -> tuple[float | None, RopeScaling | None]:
    """(theta, scaling) as transformers 5 writes them, in rope_parameters, or as before, in
    rope_theta and rope_scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file}: rope_parameters {rope!r} should be a JSON object")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (
        kind not in ("default", "linear", "llama3")
        or rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1
    ):
        raise InputError(
            f"{file}: rope type {rope} is not supported; only default, linear and llama3 over "
            "whole heads are"
        )
    if kind == "default":
        return theta, None
    return theta, fields_of(RopeScaling, {**rope, "rope_type": kind}, file)


def _windows(raw: Mapping, layers: int) -> tuple[int | None, ...]:
    """Each layer's attention window; () when none slides."""
    kind = raw["model_type"]
    size = raw.get("sliding_window", 4096)  # transformers' default
    if size is None or kind == "llama" or (kind != "mistral" and not raw.get("use_sliding_window")):
        return ()
    if kind == "mistral":
        return (size,) * layers
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    windows = tuple(size if k == "sliding_attention" else None for k in kinds)
    return windows if any(windows) else ()


def load_base(
    path: str | os.PathLike, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[BaseLM, dict]:
    """(module, parameters) of a base LM from a Hugging Face folder or id; computed and stored in
    `dtype`.

    With a mesh, the parameters are read shard by shard and lie on it by architecture.RULES. Without
    one, they lie whole on the default device.
    """
    folder = resolve(path)
    config = load_base_config(folder)
    module = BaseLM(config, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]

    def rename(stored: str) -> str | None:  # some exporters store the tied head again
        return (
            None if config.tie_word_embeddings and stored == "lm_head.weight" else lm_name(stored)
        )

    return module, load_params(
        StoredWeights(folder, rename), lm_table(config), shapes, RULES, mesh, dtype
    )


def save_base(folder: str | os.PathLike, config: LmConfig, params: Mapping, tokenizer) -> None:
    """Writes a base as a Hugging Face folder that `transformers` loads, float32, in one file: whole
    or not at all."""
    flat = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    weights = {}
    for theirs, ours, transposed in lm_table(config):
        value = np.asarray(flat.pop(ours), np.float32)
        weights[theirs] = np.ascontiguousarray(value.T if transposed else value)
    if flat:
        raise listed("base parameters without a Hugging Face name", sorted(flat))
    raw = {
        "architectures": [BASES[config.model_type]],
        **_config_json(config),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    generation = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    with replacing(folder, directory=True) as temporary:
        (temporary / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
        write_safetensors(temporary / "model.safetensors", weights, {"format": "pt"})
        tokenizer.save_pretrained(temporary)


def _config_json(config: LmConfig) -> dict:
    """config.json's form of a configuration: the inverse of `load_base_config`."""
    raw = dataclasses.asdict(config)
    scaling = raw.pop("rope_scaling") or {"rope_type": "default"}
    windows = raw.pop("windows")
    ours = {key: raw.pop(key) for key in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")}
    if raw["head_dim"] is None:
        del raw["head_dim"]
    raw["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    raw["sliding_window"] = max((w for w in windows if w), default=None)
    if config.model_type in ("llama", "qwen3"):
        raw["attention_bias"] = ours["o_bias"]
    if config.model_type == "llama":
        raw["mlp_bias"] = ours["mlp_bias"]
    if config.model_type in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = bool(windows)
        if windows:
            raw["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return raw


def load_tokenizer(path: str | os.PathLike):
    """The fast tokenizer of a model folder, package or hub id; one without a padding token (Llama)
    pads with its end token.

    Raises InputError when there is none.
    """
    folder = resolve(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever a damaged folder makes of its code
        raise InputError(f"{folder}: no usable tokenizer ({first_line(error)})") from None
    processor = folder / "chat_template.json"  # beside those of some vision-language models
    if tokenizer.chat_template is None and processor.is_file():
        raw = read_json(processor)
        tokenizer.chat_template = raw.get("chat_template") if isinstance(raw, dict) else None
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise InputError(
            f"{folder}: the tokenizer has neither a padding nor an end token; set pad_token in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:  # Llama's; every use of padding here is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
