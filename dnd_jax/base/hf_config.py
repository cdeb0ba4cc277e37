"""A model folder's config.json <-> our configuration: read as transformers 5 reads it (its
defaults, its choice between two spellings of one thing), or refused by name (docs/FILES.md)."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from dnd_jax.base.architecture import LmConfig
from dnd_jax.base.attention import RopeScaling
from dnd_jax.base.hub import resolve
from dnd_jax.config.validate import fields_of
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json, recover
from dnd_jax.core.whereabouts import flaw, instead_of

transformers = packages.deferred("transformers")

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# model_type -> class in transformers
BASES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
# What transformers takes for a key that is not there.
DEFAULTS = {
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
}
# Keys that transformers does not let be null: of all kinds, and of some.
NOT_NULL = (
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "max_window_layers",
)
NOT_NULL_OF = {"qwen2": ("head_dim",), "qwen3": ("head_dim",), "mistral": ("num_key_value_heads",)}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
COUNTS = ("max_position_embeddings", "max_window_layers")
MOST_LAYERS = 10_000
SILU = ("silu", "swish")
FULL, SLIDING = "full_attention", "sliding_attention"
OLD_TYPES = {"attention": FULL}  # layer_types, as they were called before


def read_config(folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """(file, content) of a folder's config.json. Raises InputError when it is absent (saying what
    is there), no JSON object, of a model_type that is no text, or beside an adapter, which
    transformers would load on top of the model."""
    file, adapter = folder / CONFIG, folder / ADAPTER
    if not file.is_file() and not (recover(folder) and file.is_file()):
        raise InputError(f"{file}: no such file; {instead_of(folder, CONFIG)}")
    if line := flaw(file):
        raise InputError(line)
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(
            f"{file}: not a model's configuration, which is a JSON object; copy the file again"
        )
    if not isinstance(raw.get("model_type"), str | None):
        raise InputError(
            f"{file}: model_type {raw['model_type']!r} is no name of a kind of model; copy the "
            "file again"
        )
    if adapter.is_file():
        raise InputError(
            f"{adapter}: an adapter beside {CONFIG}, which transformers loads on top of the model; "
            "move the adapter's files to a folder of their own, or merge it into the weights"
        )
    return file, raw


def load_base_config(path: str | os.PathLike) -> LmConfig:
    """The base LM's sizes from a folder's config.json. Raises InputError for an architecture that
    is none of BASES, and listing what we do not compute as transformers would."""
    file, raw = read_config(resolve(path, (CONFIG,)))
    kind = raw.get("model_type")
    if kind not in BASES:
        raise InputError(
            f"{file}: model_type {kind!r} is not supported as a base (supported: "
            f"{', '.join(BASES)}); adapters of other bases can "
            "be collected elsewhere and imported: --config.train.checkpoints=FOLDER"
        )
    if faults := _faults(raw, kind):
        raise listed(str(file), faults)
    if isinstance(raw.get("auto_map"), dict) and any("Model" in key for key in raw["auto_map"]):
        _say_own_code(file)
    raw = DEFAULTS[kind] | raw
    if raw["num_key_value_heads"] is None:  # as the first Llamas have it
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    bias = kind in ("llama", "qwen3") and raw.get("attention_bias", False)
    theta, scaling = _rope(file, raw)
    implied = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "qkv_bias": kind == "qwen2" or bias,
        "o_bias": bias,
        "mlp_bias": kind == "llama" and raw.get("mlp_bias", False),
        "qk_norm": kind == "qwen3",
    }
    config = fields_of(LmConfig, raw | implied, file)
    return dataclasses.replace(config, windows=_windows(file, raw, config.num_hidden_layers))


def check_taken(path: str | os.PathLike) -> None:
    """Raises InputError where transformers takes no configuration from a base's files, also of what
    our own reading leaves aside. It imports PyTorch where that is installed."""
    folder = resolve(path, (CONFIG,))
    try:
        transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes of its code
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{folder / CONFIG}: transformers does not take it ({why})") from None


def _faults(raw: Mapping, kind: str) -> list[str]:
    """What a config.json of this kind holds that is not computed here, or that transformers
    refuses."""
    faults = [
        f"{key} is null, which transformers refuses; remove the key"
        for key in (*NOT_NULL, *NOT_NULL_OF.get(kind, ()))
        if key in raw and raw[key] is None
    ]
    faults += [
        f"{key} = {raw[key]!r} should be true or false"
        for key in FLAGS
        if not isinstance(raw.get(key), bool | None)
    ]
    faults += [
        f"{key} = {raw[key]!r} should be a whole number"
        for key in COUNTS
        if not (type(raw.get(key, 0)) is int or raw[key] is None)
    ]
    if type(layers := raw.get("num_hidden_layers")) is int and layers > MOST_LAYERS:
        faults.append(f"num_hidden_layers = {layers} is more than any model has")
    act = raw.get("hidden_act", "silu")
    if act is not None and act not in SILU:
        faults.append(f"hidden_act {act!r} is not supported; only silu")
    if raw.get("quantization_config") or raw.get("compression_config"):
        faults.append(
            "quantized weights are not supported; use the model's float16, bfloat16 or float32 "
            "version"
        )
    if raw.get("is_causal") is False:
        faults.append("is_causal is false: attention in both directions is not supported")
    if raw.get("per_layer_config"):
        faults.append("per_layer_config: layers of different sizes are not supported")
    if raw.get("transformers_weights"):
        faults.append(
            f"transformers_weights names {raw['transformers_weights']!r}; rename that file to "
            "model.safetensors and remove the key"
        )
    classes = raw.get("architectures") or []
    if not isinstance(classes, list) or not all(_is_lm(name) for name in classes):
        faults.append(
            f"architectures {classes} is no causal language model, such as {BASES[kind]}; its head "
            "is another one"
        )
    return faults + ids_beyond(raw, raw.get("vocab_size"))


def ids_beyond(raw: Mapping, rows: Any) -> list[str]:
    """What a config.json or generation_config.json says of special tokens that embeddings of so
    many rows lack."""
    if type(rows) is not int:
        return []
    ids = {key: raw.get(key) for key in SPECIAL_IDS}
    ids = {key: of if isinstance(of, list) else [of] for key, of in ids.items()}
    return [
        f"{key} {i} is beyond the {rows} rows of the embeddings"
        for key, of in ids.items()
        for i in of
        if type(i) is int and i >= rows
    ]


def _is_lm(architecture: Any) -> bool:
    return isinstance(architecture, str) and bool(
        re.fullmatch(r"\w+(ForCausalLM|LMHeadModel|(?<!Reward)Model)", architecture)
    )


@functools.cache
def _say_own_code(file: pathlib.Path) -> None:
    """Once a process."""
    print(
        f"note: {file}: auto_map names code of its own, which is run neither here nor by "
        "transformers; the model is read as its model_type says",
        flush=True,
    )


def _rope(file: pathlib.Path, raw: Mapping) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of rope_scaling, as it was written before, else of rope_parameters; what
    they lack stands at the top of the file."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file}: rope_parameters {rope!r} should be a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (
        kind not in ("default", "linear", "llama3")
        or any(isinstance(value, dict) for value in rope.values())
        or rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1)
    ):
        raise InputError(
            f"{file}: rope type {rope} is not supported; only default, linear and llama3 over "
            "whole heads, alike in all layers, are"
        )
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    if theta is None:
        raise InputError(f"{file}: rope_theta is null, which transformers refuses; remove the key")
    if kind == "default":
        return theta, None
    if kind == "llama3":
        original = "original_max_position_embeddings"
        rope = {original: raw["max_position_embeddings"]} | rope
        rope[original] = raw.get(original, rope[original])
        missing = [f for f in ("low_freq_factor", "high_freq_factor") if rope.get(f) is None]
        if missing:
            raise listed(str(file), [f"rope_parameters: {name} is missing" for name in missing])
    return theta, fields_of(RopeScaling, {**rope, "rope_type": kind}, file)


def _windows(file: pathlib.Path, raw: Mapping, layers: int) -> tuple[int | None, ...]:
    """Each layer's attention window; () when none slides."""
    kind = raw["model_type"]
    size = raw.get("sliding_window", None if kind == "llama" else 4096)  # transformers' defaults
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"{file}: sliding_window = {size!r} should be a number of tokens, or null")
    slides = size is not None and (kind == "mistral" or raw.get("use_sliding_window", False))
    first = 0 if kind == "mistral" else raw.get("max_window_layers", 28)
    implied = [SLIDING if slides and i >= first else FULL for i in range(layers)]
    given = raw.get("layer_types")
    if given is not None and not (
        isinstance(given, list) and all(isinstance(name, str) for name in given)
    ):
        raise InputError(f"{file}: layer_types = {given!r} should be a list of names")
    types = [OLD_TYPES.get(t, t) for t in given] if given else implied
    if kind == "llama":  # transformers' own Llama slides while it generates, and only then
        slides = size is not None and size < raw["max_position_embeddings"]
        if slides or set(types) != {FULL}:
            raise InputError(
                f"{file}: model_type llama with sliding windows (sliding_window, layer_types) is "
                "not supported; remove the keys, or say mistral"
            )
        return ()
    known = len(types) == layers and set(types) <= {FULL, SLIDING}
    if not known or (SLIDING in types and not slides) or (kind == "mistral" and types != implied):
        raise InputError(
            f"{file}: layer_types {given} do not fit {layers} layers with sliding_window = {size} "
            f"and use_sliding_window = {raw.get('use_sliding_window', False)}"
        )
    return tuple(size if t == SLIDING else None for t in types) if SLIDING in types else ()


def config_json(config: LmConfig) -> dict:
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
            raw["layer_types"] = [SLIDING if w else FULL for w in windows]
    return raw
