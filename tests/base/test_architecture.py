"""Qwen2, Qwen3, Llama and Mistral against transformers; shards on a mesh, and what a host holds
while it reads them."""

import contextlib
import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from peft import LoraConfig, get_peft_model
from rules import assert_one_rule_each
from safetensors.torch import load_file, save_file
from small_models import fill, logits_of
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

from dnd_jax.base import architecture as base_lm
from dnd_jax.base.architecture import BaseLM, LmConfig
from dnd_jax.base.attention import RopeScaling, rotary_frequencies
from dnd_jax.base.folder import load_base, save_base
from dnd_jax.base.greedy import pad_left
from dnd_jax.base.hf_config import _windows, load_base_config
from dnd_jax.base.names import lm_table, part_of
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.weights import StoredWeights
from dnd_jax.config import schema
from dnd_jax.core.errors import InputError
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.rules import shard_by_rules

TOLERANCE = 1e-4
VOCABULARY, LENGTH = 96, 29
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 50.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
FAMILIES = {  # name: (configuration class, model class, changes)
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=True)),
    "qwen2, one sliding layer": (
        Qwen2Config,
        Qwen2ForCausalLM,
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=12)),
    "qwen3, tied, biased": (
        Qwen3Config,
        Qwen3ForCausalLM,
        dict(head_dim=8, tie_word_embeddings=True, attention_bias=True),
    ),
    "llama 2": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=None, rms_norm_eps=1e-5)),
    "llama, linear, biased": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True),
    ),
    "llama 3": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    "mistral, sliding": (MistralConfig, MistralForCausalLM, dict(sliding_window=6, head_dim=10)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=None)),
}


def make(name: str, **more):
    """A model whose every tensor is random."""
    config, model, changes = FAMILIES[name]
    torch.manual_seed(0)
    return fill(
        model._from_config(
            config(**{**SIZES, **changes, **more}), attn_implementation="eager"
        ).eval()
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return pad_left([rng.integers(0, VOCABULARY, n).tolist() for n in (LENGTH, 1, 14)], pad=0)


def assert_same(ours, theirs, valid):
    """At the real positions, relative to the largest logit."""
    ours, theirs = np.asarray(ours)[valid > 0], theirs[valid > 0]
    assert np.abs(ours - theirs).max() < TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_there_and_back(name, batch, tmp_path):
    ids, valid = batch
    model = make(name)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    module, params = load_base(tmp_path / "base")
    expected = logits_of(model, ids, valid)
    assert_same(
        jax.jit(lambda p: module.apply({"params": p}, ids, valid_BxS=valid))(params),
        expected,
        valid,
    )

    save_base(tmp_path / "again", module.config, params, build_tokenizer(["a b"], 300))
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(again) is type(model)
    np.testing.assert_array_equal(logits_of(again, ids, valid), expected)
    assert load_base_config(tmp_path / "again") == module.config


@pytest.mark.parametrize("name", ["qwen3", "llama, linear, biased"])
def test_lora_equals_peft(name, batch, tmp_path):
    ids, valid = batch
    model = make(name)
    model.save_pretrained(tmp_path)
    targets = ("q_proj", "o_proj", "down_proj")
    model = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), task_type="CAUSAL_LM")
    ).eval()
    lora = {}
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn_like(value) * 0.3)
                lora[key.removeprefix("base_model.model.").replace(".default", "")] = value.numpy()
    module, params = load_base(tmp_path)
    assert {key: value.shape for key, value in lora.items()} == module.config.lora_shapes(
        3, targets
    )
    assert_same(
        jax.jit(lambda p: module.apply({"params": p}, ids, lora, 2.0, valid))(params),
        logits_of(model, ids, valid),
        valid,
    )


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("llama 3", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama, linear, biased", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("mistral, sliding", {"sliding_window": None}),
        (
            "qwen2, one sliding layer",
            {"sliding_window": None, "use_sliding_window": False, "layer_types": None},
        ),
    ],
)
def test_scaling_and_windows_matter_in_these_tests(name, without, batch):
    """Else the comparisons above could not fail."""
    ids, valid = batch
    with_it, without_it = (
        logits_of(make(name), ids, valid),
        logits_of(make(name, **without), ids, valid),
    )
    assert np.abs(with_it - without_it)[valid > 0].max() > 0.1


def test_llama3_frequencies_have_all_three_ranges():
    scaling = RopeScaling(**{key: value for key, value in LLAMA3.items() if key != "rope_theta"})
    frequency, scaled = (np.asarray(rotary_frequencies(32, 50.0, how)) for how in (None, scaling))
    share = scaled / frequency
    kept, mixed, slow = (
        np.isclose(share, 1),
        (share > 0.126) & (share < 0.999),
        np.isclose(share, 1 / 8),
    )
    assert kept.any() and mixed.any() and slow.any() and (kept | mixed | slow).all()


def test_config_json_as_it_was_written_before(tmp_path):
    """rope_theta and rope_scaling at the top, "type" for "rope_type", no layer_types, nothing for
    defaults; rotary buffers."""
    make("llama 3").save_pretrained(tmp_path)
    expected = load_base_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": {**rope, "type": rope.pop("rope_type")},
    }
    for key in ("attention_bias", "mlp_bias", "head_dim"):
        raw.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert expected.head_dim == expected.head_width == 8
    assert expected.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert load_base_config(tmp_path) == dataclasses.replace(expected, head_dim=None)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    load_base(tmp_path)


def test_a_window_without_a_size_has_transformers_own(tmp_path):
    raw = {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    }
    theirs = Qwen2Config(**{key: value for key, value in raw.items() if key != "model_type"})
    assert (
        _windows(tmp_path, raw, 3)
        == (None, theirs.sliding_window, theirs.sliding_window)
        == (None, 4096, 4096)
    )


# --- On a mesh
# --------------------------------------------------------------------------------------------------


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(schema.Mesh(1, data, fsdp, tensor, ()))


def shapes_of(config: LmConfig):
    return jax.eval_shape(BaseLM(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))[
        "params"
    ]


REAL = {  # published sizes, with fewer layers
    "Qwen2.5-0.5B": LmConfig(151936, 896, 4864, 2, 14, 2, rope_theta=1e6),
    "Qwen2.5-7B": LmConfig(152064, 3584, 18944, 2, 28, 4, tie_word_embeddings=False),
    "Qwen3-8B": LmConfig(
        151936,
        4096,
        12288,
        2,
        32,
        8,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
        model_type="qwen3",
    ),
    "Llama-3.1-8B, all biases": LmConfig(
        128256, 4096, 14336, 2, 32, 8, o_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "Mistral-7B": LmConfig(
        32000, 4096, 14336, 2, 32, 8, qkv_bias=False, windows=(4096,) * 2, tie_word_embeddings=False
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_every_parameter_has_one_rule_and_one_name(name):
    shapes = shapes_of(REAL[name])
    assert_one_rule_each(base_lm.RULES, shapes)
    shard_by_rules(mesh_of(2, 2, 2), base_lm.RULES, shapes)
    named = [part_of(ours) for _, ours, _ in lm_table(REAL[name])]
    expected = [
        (path, layer)
        for path in traverse_util.flatten_dict(shapes, sep="/")
        for layer in (range(2) if path.startswith("layers/") else (None,))
    ]
    assert sorted(named, key=str) == sorted(expected, key=str)


def test_a_mesh_changes_no_logit(batch, tmp_path):
    ids, valid = batch
    model = make("llama, linear, biased")
    model.save_pretrained(tmp_path)
    module, params = load_base(tmp_path, mesh_of(2, 2, 2))
    kernel = params["layers"]["up_proj"]["dense"]["kernel"]
    shards = {shard.data.shape for shard in kernel.addressable_shards}
    assert kernel.shape == (2, 32, 48) and shards == {(2, 16, 24)}
    assert_same(
        jax.jit(lambda p: module.apply({"params": p}, ids, valid_BxS=valid))(params),
        logits_of(model, ids, valid),
        valid,
    )
    with pytest.raises(
        InputError,
        match=r"layers/k_proj/dense/kernel \(2, 32, 16\) has no rule .*'tensor'\) does not fit",
    ):
        load_base(tmp_path, make_mesh(schema.Mesh(1, 1, 1, 3, ()), jax.devices()[:3]))


def test_bfloat16_stays_bfloat16_on_request(batch, tmp_path):
    ids, valid = batch
    model = make("qwen3").bfloat16()
    model.save_pretrained(tmp_path)
    module, params = load_base(tmp_path, dtype=jnp.bfloat16)
    kernel = params["layers"]["o_proj"]["dense"]["kernel"][1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        kernel.astype(jnp.float32), model.model.layers[1].self_attn.o_proj.weight.detach().float().T
    )
    logits, expected = (
        module.apply({"params": params}, ids, valid_BxS=valid),
        logits_of(model.float(), ids, valid),
    )
    assert logits.dtype == jnp.float32
    error = (
        np.abs(np.asarray(logits) - expected)[valid > 0].max() / np.abs(expected[valid > 0]).max()
    )
    assert 1e-4 < error < 0.1


def test_no_host_holds_the_model(tmp_path, monkeypatch):
    """17 tensors of 4 MiB and some, two layers' in one parameter; every device's shard is read by
    itself, equal ones once, and dropped with its parameter."""
    big = dict(
        hidden_size=1024,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=2,
    )
    make("llama 2", **big).bfloat16().save_pretrained(tmp_path, max_shard_size="8MB")
    mesh = mesh_of(2, 2, 2)
    load_base(tmp_path, mesh)  # whatever is made once
    reads: dict[str, list[int]] = {}
    original = StoredWeights.reader

    @contextlib.contextmanager
    def counting(self, name):
        with original(self, name) as read:

            def count(index):
                value = read(index)
                reads.setdefault(name, []).append(value.nbytes)
                return value

            yield count

    monkeypatch.setattr(StoredWeights, "reader", counting)
    tracemalloc.start()
    try:
        _, params = load_base(tmp_path, mesh)
        kept, peak = tracemalloc.get_traced_memory()  # a CPU device may keep what it was given
    finally:
        tracemalloc.stop()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    total, largest = (
        sum(x.nbytes for x in jax.tree.leaves(params)),
        max(x.nbytes for x in jax.tree.leaves(params)),
    )
    assert total > 56 << 20 and largest == 8 << 20
    assert peak - kept < 2.5 * largest, (
        f"{(peak - kept) / 2**20:.1f} MiB of host memory at once, the model has {total / 2**20:.0f}"
    )
    assert reads["model.layers.0.mlp.up_proj.weight"] == [2 * 512 * 512] * 4, (
        "bfloat16, a quarter each, once for both replicas"
    )
    assert reads["model.norm.weight"] == [2 * 1024]
    assert sum(map(sum, reads.values())) == total // 2
