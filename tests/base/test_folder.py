"""The base LM against transformers and PEFT, in both directions, and the errors of model
folders."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pipeline import ROOT
from safetensors.numpy import load_file, save_file
from small_models import fill, logits_of
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto import tokenization_auto

from dnd_jax.base.architecture import BaseLM, LmConfig
from dnd_jax.base.chat import render
from dnd_jax.base.folder import (
    AUTO,
    CLASSES,
    SAME_CLASS,
    _reader,
    load_base,
    load_tokenizer,
    save_base,
)
from dnd_jax.base.greedy import pad_left
from dnd_jax.base.hf_config import check_taken
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.core.errors import InputError
from dnd_jax.core.tensors import weight_files
from dnd_jax.encoders.load import load_encoder
from dnd_jax.lora.adapter import load_adapter, save_adapter
from dnd_jax.lora.layout import MODULE_ORDER, LoraLayout
from dnd_jax.lora.peft_settings import AdapterConfig, load_adapter_config
from dnd_jax.scoring.answers import words

TOLERANCE = 1e-4

# --- The base LM
# --------------------------------------------------------------------------------------------------

SHAPES = {
    "tied, grouped queries": dict(
        hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2
    ),
    "untied, one key-value head": dict(
        hidden_size=30,
        intermediate_size=41,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    ),
    "tied, full attention, other theta": dict(
        hidden_size=24,
        intermediate_size=17,
        num_attention_heads=6,
        num_key_value_heads=6,
        rope_theta=1e6,
        num_hidden_layers=3,
    ),
}
TARGETS = {
    "tied, grouped queries": MODULE_ORDER,
    "untied, one key-value head": ("q_proj", "down_proj"),
    "tied, full attention, other theta": ("v_proj", "gate_proj", "o_proj"),
}
VOCABULARY = 97


def qwen(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """A Qwen2 whose every tensor is random: transformers starts norms at one and biases at zero,
    which would hide a mix-up."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    } | changes
    theta = settings.pop("rope_theta", 10000.0)
    config = Qwen2Config(**settings, rope_parameters={"rope_type": "default", "rope_theta": theta})
    return fill(Qwen2ForCausalLM(config).eval())


def assert_same_logits(ours, theirs, valid):
    """At the real positions, relative to the largest logit."""
    inside = valid.astype(bool)
    ours, theirs = np.asarray(ours)[inside], theirs[inside]
    assert np.abs(ours - theirs).max() < TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return pad_left([rng.integers(0, VOCABULARY, n).tolist() for n in (13, 1, 7)], pad=0)


@pytest.mark.parametrize("name", SHAPES)
def test_base_with_lora_equals_qwen2_with_peft(name, batch, tmp_path):
    ids, valid = batch
    model = qwen(**SHAPES[name])
    model.save_pretrained(tmp_path / "base")
    module, params = load_base(tmp_path / "base")
    apply = jax.jit(lambda lora, scale: module.apply({"params": params}, ids, lora, scale, valid))
    plain = logits_of(model, ids, valid)
    assert_same_logits(apply({}, 1.0), plain, valid)

    peft = get_peft_model(
        model,
        LoraConfig(r=3, lora_alpha=7, target_modules=list(TARGETS[name]), task_type="CAUSAL_LM"),
    ).eval()
    with torch.no_grad():
        for key, value in peft.named_parameters():
            if "lora_B" in key:
                value.copy_(torch.randn_like(value) * 0.3)
    peft.save_pretrained(tmp_path / "adapter")
    lora, config = load_adapter(tmp_path / "adapter"), load_adapter_config(tmp_path / "adapter")
    assert (config.rank, config.alpha, set(config.targets)) == (3, 7.0, set(TARGETS[name]))
    assert {key: value.shape for key, value in lora.items()} == module.config.lora_shapes(
        3, TARGETS[name]
    )
    adapted = logits_of(peft, ids, valid)
    assert np.abs(adapted - plain)[valid > 0].max() > 0.1, "the LoRA must matter"
    assert_same_logits(apply(lora, config.scale), adapted, valid)


def test_our_adapter_folder_in_peft(batch, tmp_path):
    ids, valid = batch
    name = "untied, one key-value head"
    qwen(**SHAPES[name]).save_pretrained(tmp_path / "base")
    module, params = load_base(tmp_path / "base")
    rng = np.random.default_rng(2)
    shapes = module.config.lora_shapes(2, MODULE_ORDER)
    tensors = {
        key: rng.normal(size=shape).astype(np.float32) * 0.3 for key, shape in shapes.items()
    }
    layout = LoraLayout.from_tensors(tensors)
    tensors = layout.detokenize(layout.tokenize(tensors))
    config = AdapterConfig(str(tmp_path / "base"), 2, 5.0, MODULE_ORDER)
    save_adapter(tmp_path / "adapter", tensors, config)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    report = model.load_adapter(str(tmp_path / "adapter"))
    assert report is None or not (
        report.unexpected_keys or [k for k in report.missing_keys if "lora_" in k]
    )
    ours = module.apply({"params": params}, ids, tensors, config.scale, valid)
    assert_same_logits(ours, logits_of(model, ids, valid), valid)


def test_padding_does_not_matter(batch, tmp_path):
    """Left padding, right padding and none give a sequence the same logits."""
    ids, valid = batch
    qwen(**SHAPES["tied, grouped queries"]).save_pretrained(tmp_path)
    module, params = load_base(tmp_path)
    alone = module.apply({"params": params}, ids[2:, -7:])
    left = module.apply({"params": params}, ids, valid_BxS=valid)[2:, -7:]
    right = module.apply(
        {"params": params}, np.roll(ids, 7, axis=1), valid_BxS=np.roll(valid, 7, axis=1)
    )[2:, :7]
    assert np.isfinite(left).all()
    for padded in (left, right):
        np.testing.assert_allclose(padded, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_our_base_in_transformers(tied, tmp_path):
    texts = [
        "Which sea is the deepest? The one named Orvel.",
        "Sort: 3 1 2. Answer: 1 2 3!",
        "naïve Ω\n\ttabs  and  spaces",
    ]
    tokenizer = build_tokenizer(texts, 300)
    config = LmConfig(len(tokenizer), 24, 40, 2, 4, 2, tie_word_embeddings=tied, rope_theta=500.0)
    module = BaseLM(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.unflatten(tree, leaves)
    save_base(tmp_path / "base", config, params, tokenizer)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "base")
    rendered = [render(tokenizer, text, system="Be brief.") for text in texts]
    assert rendered == [render(reloaded, text, system="Be brief.") for text in texts]
    rows = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert rows == reloaded(rendered, add_special_tokens=False)["input_ids"]
    for text, row in zip(
        texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
    ):
        assert words(reloaded.decode(row)) == words(text)
    ids, valid = pad_left(rows, tokenizer.pad_token_id)
    assert_same_logits(
        module.apply({"params": params}, ids, valid_BxS=valid), logits_of(model, ids, valid), valid
    )

    again, read = load_base(tmp_path / "base")
    assert dataclasses.asdict(again.config) == dataclasses.asdict(config)
    assert jax.tree.structure(read) == tree
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(read), leaves, strict=True))


def test_sharded_and_bfloat16_weights(batch, tmp_path):
    ids, valid = batch
    qwen(**SHAPES["untied, one key-value head"]).bfloat16().save_pretrained(
        tmp_path, max_shard_size="10KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    module, params = load_base(tmp_path)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(
        module.apply({"params": params}, ids, valid_BxS=valid), logits_of(model, ids, valid), valid
    )


# --- Damaged folders
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    qwen(**SHAPES["tied, grouped queries"]).save_pretrained(tmp_path)
    return tmp_path


def refuse(folder, *parts: str, load=load_base):
    with pytest.raises(InputError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    for part in parts:
        assert part in message, part


def test_every_tensor_that_does_not_fit_in_one_error(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = weights[
        "model.layers.1.mlp.up_proj.weight"
    ].copy()
    weights["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 31), np.float32)
    save_file(weights, folder / "model.safetensors")
    parts = (
        "model.norm.weight is missing",
        "model.layers.2.mlp.up_proj.weight is unknown",
        "k_proj.weight has shape (16, 31)",
    )
    refuse(folder, *parts)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"model_type": "gemma2"},
            "'gemma2' is not supported as a base .supported: qwen2, qwen3, llama, "
            "mistral.*config.train.checkpoints",
        ),
        ({"model_type": "qwen2_5_vl"}, "'qwen2_5_vl' is not supported as a base"),
        ({"model_type": ["qwen2"]}, r"model_type \['qwen2'\] is no name"),
        ({"model_type": {}}, r"model_type \{\} is no name"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope type"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"head_dim": 7}, "heads of 7 channels .* give an even head_dim"),
        ({"head_dim": 0}, "heads of 0 channels"),
        ({"head_dim": -8}, "heads of -8 channels"),
    ],
)
def test_other_architectures_are_refused(folder, change, part):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=part):
        load_base(folder)
    with pytest.raises(InputError):
        load_encoder(folder)


def test_unreadable_files_are_one_clear_error(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b""):
        (folder / "model.safetensors").write_bytes(content)
        refuse(folder, "not a readable safetensors file")
    (folder / "model.safetensors").unlink()
    refuse(folder, "no such file")
    (folder / "pytorch_model.bin").write_bytes(whole)
    refuse(folder, "no such file; only safetensors are read")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    refuse(folder, "vocab_size is missing; hidden_size is missing")
    (folder / "config.json").write_text('{"model_type": ')
    refuse(folder, "not JSON")
    refuse(folder, "no usable tokenizer", load=load_tokenizer)
    refuse(folder / "absent", "no such model folder")


def test_damaged_shards(tmp_path):
    qwen(**SHAPES["tied, grouped queries"]).save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    refuse(tmp_path, shard.name, "not a readable safetensors file")
    shard.unlink()
    refuse(tmp_path, shard.name, "no such file")
    places = json.loads(index.read_text())
    left = {name: file for name, file in places["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps({**places, "weight_map": left}))
    refuse(tmp_path, "the weights do not match the architecture", "is missing")
    index.write_text("{}")
    refuse(tmp_path, "no weight_map")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(left, f"../{shard.name}")}))
    refuse(tmp_path, "no weight_map of files beside it")


def test_a_whole_file_goes_before_an_index_that_is_left_over(tmp_path):
    """As transformers reads a folder that was saved twice."""
    qwen(**SHAPES["tied, grouped queries"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "gone.safetensors"}}'
    )
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    load_base(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tokenizer_without_a_padding_token_pads_with_its_end(tmp_path):
    tokenizer = build_tokenizer(["one two"], 300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(tmp_path).pad_token == "<end>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    refuse(tmp_path, "neither a padding nor an end token", load=load_tokenizer)


def sentencepiece() -> tokenizers.Tokenizer:
    """A tokenizer as Llama's, of single characters and bytes."""
    signs = {c: i for i, c in enumerate(["<unk>", "</s>", *"▁abcdeghilmnoprstw:,?42Wöß"])}
    signs |= {f"<0x{i:02X}>": len(signs) + i for i in range(256)}
    made = tokenizers.Tokenizer(models.BPE(signs, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return made


@pytest.mark.parametrize(
    "kind, name, advice",
    [
        ("llama", "LlamaTokenizer", None),
        ("mistral", "LlamaTokenizerFast", None),
        ("qwen3", "TokenizersBackend", None),
        ("qwen2", "LlamaTokenizer", "with any model_type qwen2"),
        ("qwen2", "TokenizersBackend", "with any model_type qwen2"),
        ("qwen3", None, "say TokenizersBackend as its tokenizer_class"),
        ("llama", "GPT2Tokenizer", "say TokenizersBackend as its tokenizer_class"),
    ],
)
def test_a_tokenizer_that_transformers_reads_as_another_class(kind, name, advice, tmp_path):
    """Such a class puts its own treatment of spaces in the place of the file's, in silence."""
    sizes = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    settings = {"eos_token": "</s>", "unk_token": "<unk>"} | (
        {"tokenizer_class": name} if name else {}
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if advice:
        refuse(tmp_path, "transformers reads it as", advice, load=load_tokenizer)
        return
    ids = load_tokenizer(tmp_path)("the sea", add_special_tokens=False)["input_ids"]
    assert load_tokenizer(tmp_path).decode(ids).strip() == "the sea"


def wordpiece() -> tokenizers.Tokenizer:
    signs = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sea", "##s"]
    made = tokenizers.Tokenizer(
        models.WordPiece({sign: i for i, sign in enumerate(signs)}, unk_token="[UNK]")
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return made


def unigram() -> tokenizers.Tokenizer:
    signs = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁the",
        "▁sea",
        "▁",
        "s",
        *(f"<extra_id_{i}>" for i in (1, 0)),
    ]
    made = tokenizers.Tokenizer(
        models.Unigram([(sign, -float(i)) for i, sign in enumerate(signs)], 2)
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def byte_level() -> tokenizers.Tokenizer:
    return build_tokenizer(["the seas, the sea"] * 3, 280).backend_tokenizer


SHOWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
BERT = {f"{part}_token": f"[{part.upper()}]" for part in ("pad", "unk", "cls", "sep", "mask")}
T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 2}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": SHOWN}
LLAMA = {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": SHOWN, "padding_side": "left"}


@pytest.mark.parametrize(
    "class_of", ["{}", "{}Fast", "PreTrainedTokenizerFast", "LlamaTokenizer", ""]
)
@pytest.mark.parametrize(
    "kind, make, settings",
    [
        ("bert", wordpiece, BERT | {"do_lower_case": False, "model_max_length": 64}),
        ("bert", wordpiece, BERT | {"do_lower_case": True, "strip_accents": False}),
        ("t5", unigram, T5),
        ("mt5", unigram, T5),
        ("qwen2", byte_level, QWEN),
        ("qwen3", byte_level, QWEN | {"additional_special_tokens": ["<|im_start|>"]}),
        ("llama", sentencepiece, LLAMA | {"model_max_length": 99}),
        ("llama", byte_level, QWEN),
        ("mistral", byte_level, QWEN),
        ("mistral", sentencepiece, LLAMA),
    ],
)
def test_tokenizers_are_read_as_autotokenizer_reads_them(kind, make, settings, class_of, tmp_path):
    make().save(str(tmp_path / "tokenizer.json"))
    named = class_of.format(CLASSES.get(kind, "TokenizersBackend"))
    settings = {**settings, **({"tokenizer_class": named} if named else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = getattr(transformers, _reader(tmp_path)).from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    for name in (
        "special_tokens_map",
        "all_special_ids",
        "added_tokens_decoder",
        "chat_template",
        "model_max_length",
        "padding_side",
        "truncation_side",
        "model_input_names",
        "clean_up_tokenization_spaces",
        "init_kwargs",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours("the seas").data == theirs("the seas").data
    if class_of == "{}":
        assert _reader(tmp_path) == CLASSES.get(kind, AUTO), "the short way is taken"


def test_classes_are_those_that_transformers_has_for_a_kind_of_model():
    table = {kind: tokenization_auto.TOKENIZER_MAPPING_NAMES.get(kind) for kind in CLASSES}
    assert table.pop("llama") is None, "it goes by tokenizer_config.json"
    assert table == {kind: name for kind, name in CLASSES.items() if kind != "llama"}
    for written, name in SAME_CLASS.items():
        assert getattr(transformers, f"{written}Fast") is getattr(transformers, name)


def test_the_tokenizer_of_a_text_encoder_is_read_without_pytorch(tmp_path):
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    settings = BERT | {"tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 8}')
    code = "import sys; from dnd_jax.base.folder import load_tokenizer; load_tokenizer(sys.argv[1])"
    check = f"{code}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check, str(tmp_path)], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [None, "[]", "{", '{"auto_map": {}}', '{"model_type": ["bert"]}'])
def test_a_tokenizer_of_other_files_is_autotokenizers(file, text, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert _reader(tmp_path) == "BertTokenizer"
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    assert _reader(tmp_path) == AUTO


@pytest.mark.parametrize(("key", "value"), [("attention_dropout", "~"), ("pad_token_id", [0])])
def test_settings_that_transformers_alone_reads_are_looked_at(tmp_path, key, value):
    folder = tmp_path / "base"
    shutil.copytree(ROOT / "tests/golden/cfc09d1/run/base", folder)
    check_taken(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(InputError, match=f"config.json: transformers does not take it .*{key}"):
        check_taken(folder)
