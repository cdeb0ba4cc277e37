"""Names of an adapter's tensors: what wrappers made of them is undone where it is known, and what
the base has not is refused before anything is trained."""

import json
import pathlib

import numpy as np
import pytest
import torch
from lora_sets import NAMES, opened
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from small_models import write_qwen
from transformers import AutoModelForCausalLM

from dnd_jax.core.errors import InputError
from dnd_jax.lora.adapter import as_folder, load_adapter, save_adapter
from dnd_jax.lora.fit import check_fits, find_modules
from dnd_jax.lora.found import CONFIG, WEIGHTS
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.names import PEFT_PREFIX, are_pefts, canonical, canonical_name, check_known
from dnd_jax.lora.peft_settings import load_adapter_config, read_fields, read_shapes

LAYER = "model.layers.0.self_attn.q_proj"
NAME = f"{LAYER}.lora_A.weight"
# How tools leave the name of that tensor.
WRAPPED = {
    "PEFT": f"base_model.model.{NAME}",
    "no prefix": NAME,
    "torch.compile of the PEFT model": f"_orig_mod.base_model.model.{NAME}",
    "torch.compile of the base": f"base_model.model._orig_mod.{NAME}",
    "torch.compile of each block": f"base_model.model.{NAME.replace('s.0', 's.0._orig_mod')}",
    "torch.compile of a module": f"base_model.model.{NAME.replace('q_proj', 'q_proj._orig_mod')}",
    "compiled twice": f"_orig_mod._orig_mod.base_model.model.{NAME}",
    "FSDP": f"_fsdp_wrapped_module.base_model.model.{NAME}",
    "FSDP of each block": "_fsdp_wrapped_module.base_model.model.model.layers.0."
    "_fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
    "FSDP and checkpointing": "base_model.model.model.layers.0._fsdp_wrapped_module."
    "_checkpoint_wrapped_module.self_attn.q_proj._fsdp_wrapped_module.lora_A.weight",
    "FSDP of the matrices": f"base_model.model.{LAYER}.lora_A._fsdp_wrapped_module.weight",
    "DDP": f"module.base_model.model.{NAME}",
    "DDP inside PEFT": f"base_model.model.module.{NAME}",
    "DeepSpeed in DDP": f"module.module.base_model.model.{NAME}",
    "DDP of a compiled one": f"module._orig_mod.base_model.model.{NAME}",
    "Lightning": f"model.base_model.model.{NAME}",
    "Lightning without PEFT's": f"model.{NAME}",
    "Lightning Fabric": f"_forward_module.base_model.model.{NAME}",
    "PEFT twice": f"base_model.model.base_model.model.{NAME}",
    "the adapter's name": f"base_model.model.{LAYER}.lora_A.default.weight",
    "another adapter's name": f"base_model.model.{LAYER}.lora_A.my_task.weight",
    "a base without its head": f"base_model.model.{NAME.removeprefix('model.')}",
}


@pytest.mark.parametrize("key", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_that_are_known(key):
    assert canonical_name(key) == NAME
    assert are_pefts([key]) == (key == WRAPPED["PEFT"])


@pytest.mark.parametrize(
    "name",
    [
        NAME,
        "model.language_model.layers.3.mlp.up_proj.lora_B.weight",
        "language_model.model.layers.3.mlp.up_proj.lora_B.weight",
        "transformer.h.0.attn.c_attn.lora_A.weight",
        "gpt_neox.layers.0.attention.query_key_value.lora_A.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.lora_A.weight",
        "visual.blocks.3.attn.qkv.lora_A.weight",
        "lm_head.lora_A.weight",
    ],
)
def test_names_of_other_families_stay(name):
    assert canonical_name(PEFT_PREFIX + name) == name
    check_known([name.rsplit(".lora_")[0]], "an adapter")


@pytest.mark.parametrize(
    "module",
    [
        "_mystery.model.layers.0.self_attn.q_proj",
        "trainer.model.layers.0.self_attn.q_proj",
        "model.stack.0.self_attn.q_proj",
        "model.layers.0.module.self_attn.q_proj",
        "layers.0.attn.q_proj",
        "model.layers.0",
        "q_proj",
        "my model.layers.0.self_attn.q_proj",
    ],
)
def test_names_of_no_known_family_need_a_base(module):
    with pytest.raises(InputError, match=r"give the base by --config.base.path=FOLDER"):
        check_known([module], "an adapter")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.embed_tokens.lora_embedding_A", "a LoRA of an embedding"),
        (f"{LAYER}.lora_magnitude_vector", "DoRA's"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune's own form"),
        (f"{LAYER}.lora_B.bias", "a bias; train with bias='none' and lora_bias=False"),
        ("model.embed_tokens.weight", "a whole weight; train without modules_to_save"),
        ("lm_head.modules_to_save.default.weight", "a whole weight"),
        (f"{LAYER}.base_layer.weight", "a whole weight"),
        (f"{LAYER}._flat_param", "a flat parameter of FSDP"),
        (f"{LAYER}.lora_down.weight", "kohya's or diffusers' form"),
        (f"{LAYER}.lora_E", "AdaLoRA's"),
        (f"{LAYER}.hada_w1_a", "expected ...lora_A.weight or ...lora_B.weight"),
    ],
)
def test_what_is_no_lora_matrix_is_named(key, what):
    with pytest.raises(InputError) as caught:
        LoraLayout.from_shapes({PEFT_PREFIX + key: (2, 8), PEFT_PREFIX + NAME: (2, 8)})
    assert f"{key} is not a LoRA matrix: {what}" in str(caught.value)


def test_names_that_come_to_one():
    with pytest.raises(InputError, match=f"_orig_mod.{NAME} occurs twice, also as {NAME}"):
        canonical({NAME: 1, f"_orig_mod.{NAME}": 2})
    with pytest.raises(InputError, match="the adapters default and other; save one of them"):
        canonical({f"{LAYER}.lora_A.{name}.weight": 1 for name in ("default", "other")})
    with pytest.raises(InputError, match=r"\(0,\), expected two .*ZeRO-3 or FSDP saved it without"):
        LoraLayout.from_shapes({NAME: (0,), NAME.replace("_A", "_B"): (8, 2)})


# --- Of whole checkpoints


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    return write_qwen(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> pathlib.Path:
    """An adapter of PEFT's own, with numbers in every matrix."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value))
    folder = tmp_path_factory.mktemp("adapter")
    peft.save_pretrained(folder)
    return folder


def renamed(adapter: pathlib.Path, folder: pathlib.Path, rename, **changes) -> pathlib.Path:
    """The adapter with other names and settings."""
    folder.mkdir(parents=True)
    tensors = {rename(key): value for key, value in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    raw = json.loads((adapter / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(raw))
    return folder


def wrap(key: str) -> str:
    return f"_orig_mod.{key.replace('lora_A', 'lora_A.x').replace('lora_B', 'lora_B.x')}"


def test_a_wrapped_adapter_is_read_written_and_asked_as_the_plain_one(adapter, base, tmp_path):
    wrapped = renamed(adapter, tmp_path / "w", wrap)
    plain = load_adapter(adapter)
    assert load_adapter_config(wrapped) == load_adapter_config(adapter)
    assert all(np.array_equal(plain[k], v) for k, v in load_adapter(wrapped).items())
    # PEFT alone attaches none of it; through us it does.
    mended = as_folder(wrapped, tmp_path / "mended")
    assert mended == tmp_path / "mended" and as_folder(adapter, tmp_path / "no") == adapter
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), mended)
    attached = {k: v for k, v in model.state_dict().items() if ".lora_B." in k}
    assert len(attached) == 4 and all(v.abs().max() > 0 for v in attached.values())
    # And what is written of it is PEFT's.
    save_adapter(tmp_path / "out", load_adapter(wrapped), load_adapter_config(wrapped))
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(adapter / WEIGHTS).keys()


def fits(folder: pathlib.Path, base: str | pathlib.Path) -> None:
    check_fits(read_shapes(folder), read_fields(folder), base, "an adapter")


def test_a_fitting_adapter(adapter, base):
    fits(adapter, base)
    fits(adapter, "nobody/base-that-is-not-here")
    fits(adapter, "")


@pytest.mark.parametrize(
    ("rename", "changes", "fault"),
    [
        (lambda k: k.replace("model.layers", "model.language_model.layers"), {}, "is no module of"),
        (lambda k: k.replace("layers.1", "layers.2"), {}, "layers.2.mlp.down_proj is no module"),
        (lambda k: k.replace("base_model.model", "base_model.model._odd"), {}, "_odd.model.layers"),
        (
            lambda k: k.replace("down_proj", "up_proj"),
            {"target_modules": ["q_proj", "up_proj"]},
            r"up_proj.lora_B.weight has shape \(16, 2\), the base's would be \(24, 2\)",
        ),
        (
            lambda k: k,
            {"target_modules": ["q_proj", "down_proj", "v_proj"]},
            "target_modules names model.layers.0.self_attn.v_proj, which the file has no tensors",
        ),
    ],
    ids=["a wrapper base", "a layer", "a prefix", "a shape", "no tensors"],
)
def test_what_the_base_has_not(adapter, base, tmp_path, rename, changes, fault):
    with pytest.raises(InputError, match=fault):
        fits(renamed(adapter, tmp_path / "a", rename, **changes), base)


def test_modules_by_the_headers_of_a_base_that_we_cannot_run(base, tmp_path):
    """Of another family, and stored as a part of a model of text and images."""
    other = tmp_path / "other"
    other.mkdir()
    weights = load_file(base / "model.safetensors")
    save_file({f"language_model.{k}": v for k, v in weights.items()}, other / "model.safetensors")
    (other / "config.json").write_text('{"model_type": "gemma9"}')
    ours, theirs = find_modules(base), find_modules(other)
    assert ours.exact and not theirs.exact
    for module, shape in ours.shapes.items():
        assert theirs.shape(module) == shape
    assert theirs.shape(f"model.language_{LAYER}") == ours.shape(LAYER)
    assert not [module for module in theirs.shapes if "norm" in module]
    quantised = {k: v.astype(np.uint8) for k, v in weights.items()}
    save_file(quantised, other / "model.safetensors")
    assert find_modules(other).shape("model.layers.0.mlp.up_proj") is None
    (other / "model.safetensors").unlink()
    assert find_modules(other) is None


def test_training_refuses_what_the_base_has_not(adapter, base, tmp_path):
    for name in NAMES:
        for step in (1, 2):
            renamed(adapter, tmp_path / name / f"step_{step}", wrap)
    found = opened(tmp_path)  # the adapters' own base is there
    assert found.layout.modules[0] == LAYER and found.adapter.base == str(base)
    other = write_qwen(tmp_path / "other", hidden_size=32)
    for name in NAMES:
        for path in (tmp_path / name).iterdir():
            raw = json.loads((path / CONFIG).read_text())
            (path / CONFIG).write_text(json.dumps(raw | {"base_model_name_or_path": str(other)}))
    with pytest.raises(
        InputError, match=r"step_1: not an adapter of .*other: .*, the base's would be"
    ):
        opened(tmp_path)
