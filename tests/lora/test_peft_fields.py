"""Every field of PEFT's LoraConfig: the change of each weight is PEFT's own, or the adapter is
refused by name."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from small_models import write_qwen
from transformers import AutoModel, AutoModelForCausalLM

from dnd_jax.core.errors import InputError
from dnd_jax.lora import peft_fields
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.fit import check_fits
from dnd_jax.lora.found import CONFIG
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.peft_fields import NO_NUMBER, READ, REFUSED, is_targeted
from dnd_jax.lora.peft_settings import load_adapter_config, read_fields, read_shapes


def test_each_field_stands_in_one_table():
    """A version of PEFT with a new field fails here: what it does is to be looked up."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= {*READ, *NO_NUMBER, *REFUSED}
    assert len({*READ, *NO_NUMBER, *REFUSED}) == len(READ) + len(NO_NUMBER) + len(REFUSED)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    return write_qwen(tmp_path_factory.mktemp("base"))


def by_peft(
    base: pathlib.Path, folder: pathlib.Path, loader=AutoModelForCausalLM, **changes
) -> dict[str, np.ndarray]:
    """Saves an adapter of random numbers; {module: the change of its weight} as PEFT computes."""
    model = loader.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]} | changes
    peft = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if ".lora_" in name:
                value.copy_(torch.randn_like(value))
    peft.save_pretrained(folder, save_embedding_layers=False)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in peft.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
    }


def by_us(folder: pathlib.Path) -> dict[str, np.ndarray]:
    config, tensors = load_adapter_config(folder), load_adapter(folder)
    assert load_adapter_config(folder).targets
    return {
        module: config.scale
        * np.asarray(tensors[f"{module}.lora_B.weight"], np.float32)
        @ np.asarray(tensors[f"{module}.lora_A.weight"], np.float32)
        for module in LoraLayout.from_tensors(tensors).modules
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"r": 8, "rank_pattern": {"up_proj": 4, ".*q_proj": 4}},
        {"alpha_pattern": {"up_proj": 8}},
        {"alpha_pattern": {r"model.layers.0.*": 5, "q_proj": 7}, "use_rslora": True},
        {"alpha_pattern": {r"^model.layers.1.mlp.up_proj": 9, "q": 2}},
        {"r": 8, "rank_pattern": {"proj": 3, "q_proj|up_proj": 2}, "use_rslora": True},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(k|v)_proj"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "mlp.up_proj"]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": r".*0.*up_proj"},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"exclude_modules": r"model\.layers\.0\..*"},
        {"lora_dropout": 0.3, "task_type": "CAUSAL_LM", "inference_mode": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"ensure_weight_tying": True},
        {"qalora_group_size": 32},
        {"fan_in_fan_out": False, "modules_to_save": [], "bias": "none"},
    ],
    ids=str,
)
def test_what_is_read_is_what_peft_computes(base, tmp_path, changes):
    theirs = by_peft(base, tmp_path / "a", **changes)
    ours = by_us(tmp_path / "a")
    assert ours.keys() == theirs.keys() and ours
    for module, delta in theirs.items():
        np.testing.assert_allclose(ours[module], delta, rtol=1e-5, atol=1e-5, err_msg=module)
    check_fits(read_shapes(tmp_path / "a"), read_fields(tmp_path / "a"), base, "refused")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"layers\.\d+\.self_attn\.q_proj"},
        {"target_modules": r".*_proj", "exclude_modules": r"layers\.0\..*"},
        {"alpha_pattern": {r"^layers\.1\.mlp\.up_proj": 9}},
        {"r": 8, "rank_pattern": {r"^layers\..*": 4}},
    ],
    ids=str,
)
def test_a_base_without_its_head_has_other_names_in_the_settings_too(base, tmp_path, changes):
    theirs = by_peft(base, tmp_path / "a", loader=AutoModel, **changes)
    ours = by_us(tmp_path / "a")
    assert ours.keys() == {f"model.{module}" for module in theirs} and ours
    for module, delta in theirs.items():
        np.testing.assert_allclose(ours[f"model.{module}"], delta, rtol=1e-5, atol=1e-5)
    check_fits(read_shapes(tmp_path / "a"), read_fields(tmp_path / "a"), base, "refused")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"target_modules": ["embed_tokens"]},
        {"alora_invocation_tokens": [3]},
        {"velora_config": {}},
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused(base, tmp_path, changes):
    by_peft(base, tmp_path / "a", **changes)
    named = next(iter(changes)) if changes != {"target_modules": ["embed_tokens"]} else "embedding"
    with pytest.raises(InputError, match=named) as caught:
        load_adapter_config(tmp_path / "a")
        LoraLayout.from_tensors(load_adapter(tmp_path / "a"))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("plain")
    by_peft(base, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        *[({key: True}, f"{key} = True is not supported") for key in sorted(REFUSED)],
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"init_lora_weights": "LoRA_GA"}, "init_lora_weights = 'LoRA_GA'"),
        ({"init_lora_weights": "of 2027"}, "init_lora_weights = 'of 2027'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"use_new_method": True}, "use_new_method = True is unknown"),
        ({"newlora_config": {"a": 1}}, "newlora_config = {'a': 1} is unknown"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', only LORA"),
        ({"peft_type": None}, "peft_type None, only LORA"),
        ({"fine_tune_type": "lora"}, "an adapter of MLX"),
        ({"lora_alpha": 0}, "lora_alpha = 0: such an adapter changes nothing"),
        ({"lora_alpha": "16"}, "lora_alpha = '16' should be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan should be a number"),
        ({"lora_alpha": None}, "lora_alpha = None should be a number"),
        ({"r": 0}, "r = 0 should be a whole number of at least 1"),
        ({"r": True}, "r = True should be a whole number"),
        ({"r": 4}, "has rank 2, the settings say 4"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern of q_proj = '8' should be a number"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern = \['q_proj'\] should be an object"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern of '\(' is no regular expression"),
        (
            {"alpha_pattern": {"q_proj[": 2}},
            r"alpha_pattern of 'q_proj\[' is no regular expression",
        ),
        ({"alpha_pattern": {"q{99999999999}": 2}}, "alpha_pattern of .* is no regular expression"),
        ({"lora_alpha": 10**400}, "lora_alpha = 10+ should be a number"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, "alpha_pattern of q_proj = -10+ should be a"),
        ({"target_modules": None}, "not a LoRA configuration"),
        ({"target_modules": "("}, "not a LoRA configuration"),
        ({"target_modules": ["q_proj"]}, "target_modules leave out what PEFT then does not load"),
        ({"layers_to_transform": [0]}, "target_modules leave out .*layers.1"),
        ({"exclude_modules": ["up_proj"]}, "target_modules leave out .*up_proj"),
        (
            {"exclude_modules": ["model.layers.1.mlp.up_proj"]},
            "target_modules leave out .*: model.layers.1.mlp.up_proj$",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_do_not_go_with_the_matrices(plain, tmp_path, changes, fault):
    folder = tmp_path / "a"
    folder.mkdir()
    for path in plain.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((plain / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(raw))
    with pytest.raises(InputError, match=fault):
        load_adapter_config(folder)


def test_other_fields_are_noted_once_as_peft_warns(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peft_fields, "_noted", set())
    raw = json.loads((plain / CONFIG).read_text())
    raw |= {"future_group_size": 16, "future_switch": None, "use_future": False, "unsloth": "2026"}
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    assert load_adapter_config(tmp_path) == load_adapter_config(plain)
    load_adapter_config(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[2].split()[0] for line in said] == ["future_group_size", "unsloth"]


MODULES = [
    *(f"model.layers.{i}.{n}" for i in (0, 1, 11) for n in ("self_attn.q_proj", "mlp.up_proj")),
    *("model.layers.1.mlp.experts.0.w1", "transformer.h.1.attn.c_attn", "lm_head", "q_proj"),
    *("model.visual.blocks.1.attn.qkv", "layers.1.self_attn.q_proj"),
]


@pytest.mark.parametrize("targets", [["q_proj"], ["self_attn.q_proj", "w1"], r".*1.*_proj", ["h"]])
@pytest.mark.parametrize("layers", [None, [], 1, [1, 0], [0, 11]])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "blocks", "layers"]])
@pytest.mark.parametrize("exclude", [None, ["up_proj", "lm_head"], r".*\.11\..*"])
def test_modules_that_are_adapted_are_pefts_choice(targets, layers, pattern, exclude):
    if isinstance(targets, str) and (layers is not None or pattern):
        return  # PEFT takes no such settings
    raw = {
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
        "exclude_modules": exclude,
    }
    config = LoraConfig(target_modules=targets, exclude_modules=exclude)
    config.layers_to_transform, config.layers_pattern = layers, pattern
    for module in MODULES:
        found = check_target_module_exists(config, module)
        assert is_targeted(raw, module) == bool(found and not _is_excluded(found)), module


def _is_excluded(found) -> bool:
    return type(found).__name__ == "_ExcludedModule"
