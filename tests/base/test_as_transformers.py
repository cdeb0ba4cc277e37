"""A model folder is read as transformers reads it, or refused in one line that names the file:
every field and file that a folder may hold twice, left over or not at all."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import fill
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dnd_jax.base.folder import load_base
from dnd_jax.base.torch_base import load_torch_base
from dnd_jax.core.errors import InputError

TOLERANCE = 1e-4
SIZES = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
IDS = np.random.default_rng(0).integers(0, 48, (1, 20)).astype(np.int32)
ABSENT = object()
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """One folder of each family, every tensor random, nothing tied."""
    root, found = tmp_path_factory.mktemp("bases"), {}
    for kind, (config, model) in CLASSES.items():
        torch.manual_seed(1)
        more = {"head_dim": 8} if kind == "qwen3" else {}
        fill(model(config(**SIZES, **more)).eval()).save_pretrained(root / kind)
        found[kind] = root / kind
    return found


def altered(source: pathlib.Path, target: pathlib.Path, config: dict, weights: Callable | None):
    """A copy of a folder with other keys in its config.json, and other tensors."""
    target.mkdir()
    raw = json.loads((source / "config.json").read_text()) | config
    raw = {key: value for key, value in raw.items() if value is not ABSENT}
    (target / "config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    if weights is not None:
        tensors = weights(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, target / "model.safetensors")
    return target


def ours(folder: pathlib.Path) -> np.ndarray | str:
    """Logits, or the line that refuses the folder."""
    try:
        module, params = load_base(folder)
    except InputError as error:
        return str(error)
    return np.asarray(module.apply({"params": params}, IDS))


def theirs(folder: pathlib.Path) -> np.ndarray | str:
    """Logits, or why transformers gives none."""
    try:
        model = load_torch_base(folder)
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(IDS).long()).logits.numpy()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compare(folder: pathlib.Path, read: bool) -> None:
    """read: whether the folder must be read, not refused."""
    mine = ours(folder)
    if isinstance(mine, str):
        assert not read, mine
        assert str(folder) in mine and "\n" not in mine
        return
    expected = theirs(folder)
    assert not isinstance(expected, str), f"transformers refuses it ({expected}), we do not"
    assert np.abs(mine - expected).max() < TOLERANCE * max(1, np.abs(expected).max())


def rope(**values) -> dict:
    return {"rope_parameters": {"rope_theta": 50.0, **values}}


LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEFAULT = {"rope_type": "default", "rope_theta": 50.0}
OLD = {"rope_parameters": ABSENT, "rope_theta": 50.0}


def without(mapping: dict, *keys: str) -> dict:
    return {key: value for key, value in mapping.items() if key not in keys}


READ, REFUSED, EITHER = True, False, None
# (family, other keys of config.json, whether it is read)
CONFIGS = {
    "as it is": ("qwen2", {}, READ),
    "qwen3 as it is": ("qwen3", {}, READ),
    "llama as it is": ("llama", {}, READ),
    "mistral as it is": ("mistral", {}, READ),
    # rotary positions
    "old rope": ("llama", OLD, READ),
    "no theta": ("llama", {"rope_parameters": ABSENT}, READ),
    "theta null": ("llama", {"rope_parameters": ABSENT, "rope_theta": None}, EITHER),
    "rope null": ("llama", {**OLD, "rope_parameters": None, "rope_scaling": None}, READ),
    "old linear, type": ("llama", {**OLD, "rope_scaling": {"type": "linear", "factor": 3.0}}, READ),
    "both names of the type": (
        "llama", {**OLD, "rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 3.0}},
        READ,
    ),
    "scaling beside parameters": (
        "llama", {"rope_parameters": {**LLAMA3, "rope_theta": 9.0}, "rope_scaling": LINEAR}, READ
    ),
    "default scaling beside linear": (
        "llama", {"rope_parameters": {**LINEAR, "rope_theta": 9.0}, "rope_scaling": DEFAULT}, READ
    ),
    "empty scaling beside linear": (
        "llama", {"rope_parameters": {**LINEAR, "rope_theta": 9.0}, "rope_scaling": {}}, READ
    ),
    "theta at the top and inside": ("llama", {**rope(), "rope_theta": 1e4}, READ),
    "theta at the top alone": (
        "llama", {"rope_parameters": LINEAR, "rope_theta": 50.0}, READ
    ),
    "llama3": ("llama", rope(**LLAMA3), READ),
    "llama3 without its original length": (
        "llama", rope(**without(LLAMA3, "original_max_position_embeddings")), READ
    ),
    "llama3, original length at the top": (
        "llama", {**rope(**LLAMA3), "original_max_position_embeddings": 16}, READ
    ),
    "llama3 without a bound": ("llama", rope(**without(LLAMA3, "low_freq_factor")), REFUSED),
    "llama3 without a factor": ("llama", rope(**without(LLAMA3, "factor")), REFUSED),
    "linear without a factor": ("llama", rope(rope_type="linear"), REFUSED),
    "linear, factor null": ("llama", rope(rope_type="linear", factor=None), REFUSED),
    "yarn": ("qwen2", rope(**YARN), REFUSED),
    "old yarn": ("qwen2", {**OLD, "rope_scaling": without(YARN, "rope_type") | {"type": "yarn"}},
                 REFUSED),
    "dynamic": ("llama", rope(rope_type="dynamic", factor=2.0), REFUSED),
    "longrope": (
        "llama", rope(rope_type="longrope", short_factor=[2.0] * 4, long_factor=[3.0] * 4), REFUSED
    ),
    "proportional": ("llama", rope(rope_type="proportional"), REFUSED),
    "mrope": ("qwen2", {**OLD, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
              REFUSED),
    "partial inside": ("llama", rope(**LINEAR, partial_rotary_factor=0.5), REFUSED),
    "partial at the top": ("llama", {**rope(**LINEAR), "partial_rotary_factor": 0.5}, REFUSED),
    "partial of the default": ("llama", {**rope(rope_type="default"), "partial_rotary_factor": 0.5},
                               EITHER),
    "nested": (
        "qwen2", {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 50.0}}}, REFUSED
    ),
    "a list": ("qwen2", {"rope_parameters": [1]}, REFUSED),
    "an interleaved one": ("llama", {"rope_interleaved": True}, EITHER),
    # heads, biases, norms
    "no key-value heads, llama": ("llama", {"num_key_value_heads": ABSENT}, REFUSED),
    "key-value heads null, mistral": ("mistral", {"num_key_value_heads": None}, REFUSED),
    "head_dim null": ("llama", {"head_dim": None}, READ),
    "head_dim null, qwen3": ("qwen3", {"head_dim": None}, EITHER),
    "head_dim null, qwen2": ("qwen2", {"head_dim": None}, EITHER),
    "head_dim absent, qwen3": ("qwen3", {"head_dim": ABSENT}, REFUSED),
    "another head_dim": ("llama", {"head_dim": 16}, REFUSED),
    "biases that are not there": ("llama", {"attention_bias": True}, REFUSED),
    "mlp biases that are not there": ("llama", {"mlp_bias": True}, REFUSED),
    "a bias that mistral ignores": ("mistral", {"attention_bias": True, "mlp_bias": True}, READ),
    "no bias, that qwen2 ignores": ("qwen2", {"attention_bias": False, "mlp_bias": True}, READ),
    "biases null": ("llama", {"attention_bias": None}, EITHER),
    "a small eps": ("llama", {"rms_norm_eps": 0.3}, READ),
    "no eps": ("llama", {"rms_norm_eps": ABSENT}, READ),
    "eps null": ("llama", {"rms_norm_eps": None}, EITHER),
    "eps under another name": ("llama", {"rms_norm_eps": ABSENT, "layer_norm_eps": 0.3}, READ),
    # windows
    "qwen2's window": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
                  "layer_types": ABSENT}, READ,
    ),
    "a window that is off": ("qwen2", {"sliding_window": 5, "layer_types": ABSENT}, READ),
    "layer_types beside max_window_layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 9,
                  "layer_types": ["sliding_attention", "full_attention"]}, READ,
    ),
    "layer_types without a window": (
        "qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, REFUSED
    ),
    "too few layer_types": ("qwen3", {"layer_types": ["full_attention"]}, REFUSED),
    "old names of layer_types": ("qwen3", {"layer_types": ["attention", "full_attention"]}, EITHER),
    "chunked layer_types": (
        "qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, REFUSED
    ),
    "mistral's window": ("mistral", {"sliding_window": 5}, READ),
    "mistral's window off": ("mistral", {"sliding_window": None}, READ),
    "mistral's window absent": ("mistral", {"sliding_window": ABSENT}, READ),
    "a window of zero": ("mistral", {"sliding_window": 0}, EITHER),
    "layer_types that mistral ignores": (
        "mistral", {"sliding_window": 5, "layer_types": ["full_attention"] * 2}, EITHER
    ),
    "llama with a window": ("llama", {"sliding_window": 5}, EITHER),
    "llama with a window and types": (
        "llama", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2}, EITHER
    ),
    "not causal": ("llama", {"is_causal": False}, REFUSED),
    "causal": ("llama", {"is_causal": True}, READ),
    # what else changes numbers elsewhere
    "swish": ("llama", {"hidden_act": "swish"}, READ),
    "no activation": ("llama", {"hidden_act": ABSENT}, READ),
    "gelu": ("llama", {"hidden_act": "gelu"}, REFUSED),
    "activation null": ("llama", {"hidden_act": None}, REFUSED),
    "granite's multipliers": (
        "llama", {"attention_multiplier": 0.1, "residual_multiplier": 0.2, "logits_scaling": 8.0,
                  "embedding_multiplier": 12.0}, EITHER,
    ),
    "soft caps": (
        "llama", {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0}, EITHER
    ),
    "scalars": ("llama", {"query_pre_attn_scalar": 2, "scale_emb": 12, "dim_model_base": 256},
                EITHER),
    "pretraining_tp": ("llama", {"pretraining_tp": 2}, READ),
    "half the layers": ("llama", {"num_hidden_layers": 1}, EITHER),
    "layers of their own": ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}},
                            REFUSED),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, REFUSED),
    "compressed": ("llama", {"compression_config": {"format": "pack-quantized"}}, EITHER),
    "generation settings": ("llama", {"temperature": 0.1, "top_k": 1, "use_cache": False}, READ),
    # what it is
    "a classifier": ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, REFUSED),
    "a reward model": ("llama", {"architectures": ["LlamaForRewardModel"]}, REFUSED),
    "no architectures": ("qwen2", {"architectures": ABSENT}, READ),
    "architectures null": ("qwen2", {"architectures": None}, READ),
    "the model without its head": ("qwen2", {"architectures": ["Qwen2Model"]}, READ),
    "no model_type": ("qwen2", {"model_type": ABSENT}, REFUSED),
    "a vision-language model": (
        "qwen2", {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}},
        REFUSED,
    ),
    "mixtral": ("mistral", {"model_type": "mixtral"}, REFUSED),
    "code of its own": ("qwen2", {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, EITHER),
    "a tokenizer's code": ("qwen2", {"auto_map": {"AutoTokenizer": "tok.Own"}}, READ),
    "weights elsewhere": ("qwen2", {"transformers_weights": "other.safetensors"}, REFUSED),
    "a window's layers as text": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": "1"},
        REFUSED,
    ),
    "a length as text": ("llama", {"max_position_embeddings": "9", "sliding_window": 5}, REFUSED),
    "lists for layer_types": ("qwen2", {"layer_types": [["full_attention"], []]}, REFUSED),
    "a list for a rope type": ("qwen2", rope(rope_type=["linear"]), REFUSED),
    "a billion layers": ("qwen2", {"num_hidden_layers": 10**9, "layer_types": ABSENT}, REFUSED),
    "numbers as texts": ("qwen2", {"hidden_size": "32"}, REFUSED),
    "a text for a truth": ("qwen2", {"tie_word_embeddings": "false"}, REFUSED),
    "a padding id that embeddings lack": ("qwen2", {"pad_token_id": 48}, EITHER),
    "a padding id of -1": ("llama", {"pad_token_id": -1}, READ),
    "tied": ("qwen2", {"tie_word_embeddings": True}, READ),
    "tie flag absent": ("qwen2", {"tie_word_embeddings": ABSENT}, READ),
    "tie flag null": ("qwen2", {"tie_word_embeddings": None}, EITHER),
    "bfloat16 in the config alone": ("qwen2", {"dtype": "bfloat16"}, READ),
}  # fmt: skip


# Of those that are read, and so computed twice, the ones that every run of the tests computes.
OFTEN = {
    "as it is",
    "old linear, type",
    "theta at the top alone",
    "scaling beside parameters",
    "llama3 without its original length",
    "llama3, original length at the top",
    "qwen2's window",
    "layer_types beside max_window_layers",
    "mistral's window",
    "swish",
    "tied, another head",
    "tied, a copy of the embeddings",
    "tied, the head alone",
    "no prefix, tied, no head",
    "a doubled prefix",
    "shards beside the whole file",
    "an index that misses tensors",
}


def members(table: dict) -> list:
    """Names of a table of members; slow ones but those of OFTEN and the refused."""
    slow = {name for name, of in table.items() if of[-1] is not REFUSED} - OFTEN
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in table]


@pytest.mark.parametrize("name", members(CONFIGS))
def test_keys_of_config_json(name, folders, tmp_path):
    family, config, read = CONFIGS[name]
    folder = altered(folders[family], tmp_path / "base", config, None)
    compare(folder, read is READ)
    if read is REFUSED:
        assert isinstance(ours(folder), str)


def renamed(rule: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda tensors: {rule(name): value for name, value in tensors.items()}


def with_(**changes: Callable[[Weights], torch.Tensor | None]) -> Callable[[Weights], Weights]:
    """More tensors, by names with __ for dots; None takes one away."""

    def change(tensors: Weights) -> Weights:
        made = {name.replace("__", "."): of(tensors) for name, of in changes.items()}
        return {k: v for k, v in (tensors | made).items() if v is not None}

    return change


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED, UNTIED, NO_FLAG = ({"tie_word_embeddings": value} for value in (True, False, ABSENT))
copied_head = with_(lm_head__weight=lambda t: t[EMBED].clone())
no_head = with_(lm_head__weight=lambda t: None)
no_embeddings = with_(model__embed_tokens__weight=lambda t: None)
last_row = with_(lm_head__weight=lambda t: torch.cat([t[EMBED][:-1], t[EMBED][-1:] + 1e-3]))
# (family, other keys of config.json, what becomes of the tensors, whether it is read)
WEIGHTS = {
    "tied, another head": ("qwen2", TIED, None, READ),
    "tied, a head that differs in one row": ("llama", TIED, last_row, READ),
    "tied, a copy of the embeddings": ("llama", TIED, copied_head, READ),
    "tied, a head in bfloat16": (
        "mistral", TIED, with_(lm_head__weight=lambda t: t[EMBED].bfloat16()), READ
    ),
    "tied, no head": ("qwen3", TIED, no_head, READ),
    "tied, the head alone": ("qwen2", TIED, no_embeddings, READ),
    "tied, a head of another size": (
        "qwen2", TIED, with_(lm_head__weight=lambda t: t[HEAD][:40]), REFUSED
    ),
    "untied, no head": ("qwen2", UNTIED, no_head, REFUSED),
    "no flag, no head": ("llama", NO_FLAG, no_head, REFUSED),
    "untied, a copy of the embeddings": ("llama", UNTIED, copied_head, READ),
    "untied, no embeddings": ("llama", UNTIED, no_embeddings, REFUSED),
    "no prefix": ("qwen2", {}, renamed(lambda n: n.removeprefix("model.")), READ),
    "no prefix, tied, no head": (
        "qwen2", TIED, lambda t: no_head({n.removeprefix("model."): v for n, v in t.items()}), READ
    ),
    "a doubled prefix": ("llama", {}, renamed(lambda n: n.replace("model.", "model.model.")), READ),
    "a prefix for all": ("llama", {}, renamed(lambda n: f"model.{n}"), READ),
    "with and without prefix": (
        "llama", {}, with_(norm__weight=lambda t: t["model.norm.weight"] * 2), REFUSED
    ),
    "rotary buffers": (
        "llama", {}, with_(
            model__layers__0__self_attn__rotary_emb__inv_freq=lambda t: torch.ones(4),
            model__rotary_emb__inv_freq=lambda t: torch.ones(4),
        ), READ,
    ),
    "compiled": ("qwen2", {}, renamed(lambda n: f"_orig_mod.{n}"), REFUSED),
    "compiled inside": ("qwen2", {}, renamed(lambda n: n.replace("model.", "model._orig_mod.")),
                        REFUSED),
    "DDP": ("qwen2", {}, renamed(lambda n: f"module.{n}"), REFUSED),
    "FSDP": (
        "qwen2", {}, renamed(lambda n: n.replace("self_attn", "_fsdp_wrapped_module.self_attn")),
        REFUSED,
    ),
    "PEFT": ("qwen2", {}, renamed(lambda n: f"base_model.model.{n}"), REFUSED),
    "TRL's value head": (
        "llama", {}, with_(v_head__summary__weight=lambda t: torch.ones(1, 32)), REFUSED
    ),
    "a classifier's head": ("llama", {}, with_(score__weight=lambda t: torch.ones(2, 32)), REFUSED),
    "float16": ("qwen3", {}, lambda t: {n: v.half() for n, v in t.items()}, READ),
    "bfloat16": ("mistral", {}, lambda t: {n: v.bfloat16() for n, v in t.items()}, READ),
    "float64": ("llama", {}, lambda t: {n: v.double() for n, v in t.items()}, READ),
    "a body in bfloat16": (
        "llama", {}, lambda t: {n: v if n == HEAD else v.bfloat16() for n, v in t.items()}, READ
    ),
    "float8 without scales": (
        "llama", {}, lambda t: {n: v.to(torch.float8_e4m3fn) for n, v in t.items()}, REFUSED
    ),
    "int8": (
        "llama", {}, lambda t: {n: v.to(torch.int8) if "up" in n else v for n, v in t.items()},
        REFUSED,
    ),
    "int8 with scales": (
        "llama", {}, with_(model__layers__0__mlp__up_proj__weight_scale=lambda t: torch.ones(24)),
        REFUSED,
    ),
    "awq": ("llama", {}, renamed(lambda n: n.replace("proj.weight", "proj.qweight")), REFUSED),
    "a bias of its own": (
        "llama", {}, with_(model__layers__0__self_attn__q_proj__bias=lambda t: torch.ones(32)),
        REFUSED,
    ),
    "a lora": (
        "llama", {}, with_(
            model__layers__0__self_attn__q_proj__lora_A__weight=lambda t: torch.ones(2, 32)
        ), REFUSED,
    ),
    "an embedding row too few": (
        "llama", {}, with_(model__embed_tokens__weight=lambda t: t[EMBED][:47]), REFUSED
    ),
    "a norm missing": ("llama", {}, with_(model__norm__weight=lambda t: None), REFUSED),
}  # fmt: skip


@pytest.mark.parametrize("name", members(WEIGHTS))
def test_tensors(name, folders, tmp_path):
    family, config, weights, read = WEIGHTS[name]
    folder = altered(folders[family], tmp_path / "base", config, weights)
    compare(folder, read is READ)
    if read is REFUSED:
        assert isinstance(ours(folder), str)


def shards(folder: pathlib.Path) -> None:
    """The whole file once more, as two shards of other values, with their index."""
    tensors = {name: value * 2 for name, value in load_file(folder / "model.safetensors").items()}
    parts = sorted(tensors)[::2], sorted(tensors)[1::2]
    places = {}
    for i, names in enumerate(parts, 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def sharded(folder: pathlib.Path) -> None:
    shards(folder)
    (folder / "model.safetensors").unlink()


def left_over_shard(folder: pathlib.Path) -> None:
    """Of an earlier save, in three parts, which no index names."""
    sharded(folder)
    one = load_file(folder / "model-00001-of-00002.safetensors")
    save_file({n: v * 3 for n, v in one.items()}, folder / "model-00001-of-00003.safetensors")


def index_of_less(folder: pathlib.Path) -> None:
    """An index that misses tensors of its own files: they are read."""
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places.pop(sorted(places)[0])
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def twice_in_shards(folder: pathlib.Path) -> None:
    """A tensor in two shards, of which the index names one."""
    sharded(folder)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    moved = sorted(load_file(first))[0]
    save_file(load_file(second) | {moved: load_file(first)[moved] * 5}, second)


def adapter(folder: pathlib.Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.fill_(1.0)
    model.save_pretrained(folder)


def torch_beside(folder: pathlib.Path) -> None:
    tensors = {n: v * 2 for n, v in load_file(folder / "model.safetensors").items()}
    torch.save(tensors, folder / "pytorch_model.bin")


def variant(folder: pathlib.Path) -> None:
    tensors = {n: v.half() * 2 for n, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.fp16.safetensors")


FILES = {  # what is done to the folder, whether it is read
    "shards beside the whole file": (shards, READ),
    "shards": (sharded, READ),
    "a shard that is left over": (left_over_shard, READ),
    "an index that misses tensors": (index_of_less, READ),
    "a tensor in two shards": (twice_in_shards, REFUSED),
    "an adapter beside it": (adapter, REFUSED),
    "pytorch_model.bin beside it": (torch_beside, READ),
    "a variant beside it": (variant, READ),
}


@pytest.mark.parametrize("name", members(FILES))
def test_files_that_a_folder_holds_twice(name, folders, tmp_path):
    change, read = FILES[name]
    folder = altered(folders["llama"], tmp_path / "base", {}, None)
    change(folder)
    compare(folder, read is READ)
    if read is REFUSED:
        assert isinstance(ours(folder), str)
