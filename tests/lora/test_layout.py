"""Weight tokens: the original's numbers, our PyTorch reading of the method, exact inverses, one
error that lists every fault."""

import json
import pathlib
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_sets import BLOCK, qwen_shapes

from dnd_jax.core.errors import InputError
from dnd_jax.lora.layout import MODULE_ORDER, LoraLayout
from dnd_jax.lora.moments import Moments, importance_weights
from dnd_jax.lora.names import PEFT_PREFIX
from dnd_jax.lora.targets import ChunkTarget, ElementTarget, from_statistics

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tokens_qwen2_5_0_5b_layer0.npz"


def golden_lora() -> tuple[dict[str, np.ndarray], np.ndarray]:
    with np.load(GOLDEN) as file:
        return {
            key.removeprefix("lora/"): file[key] for key in file if key.startswith("lora/")
        }, file["tokens"]


@st.composite
def loras(draw, least_width: int = 1) -> tuple[dict[str, np.ndarray], int | None]:
    """Random tensors in a random order of keys, and a chunk width that may divide everything,
    something or nothing."""
    rank, unit = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    names = draw(st.lists(st.sampled_from(MODULE_ORDER), min_size=1, max_size=4, unique=True))
    layers = draw(st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors = {}
    for layer in layers:
        for name in names:
            module = f"model.layers.{layer}.{BLOCK[name]}.{name}"
            d_in, d_out = unit * draw(st.integers(1, 5)), unit * draw(st.integers(1, 5))
            tensors[f"{module}.lora_A.weight"] = (
                rng.normal(size=(rank, d_in)) * 0.02 + 1e-3
            ).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (rng.normal(size=(d_out, rank)) * 0.005).astype(
                np.float32
            )
    keys = draw(st.permutations(list(tensors)))
    return {key: tensors[key] for key in keys}, draw(st.none() | st.integers(least_width, 17))


def assert_same_tensors(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == np.float32
        np.testing.assert_allclose(actual[key], value, err_msg=key, **tolerance)


def test_golden_tokens_and_back():
    tensors, tokens = golden_lora()
    layout = LoraLayout.from_tensors(tensors)
    assert (layout.rank, layout.chunk_width, layout.num_tokens) == (8, 128, 179)
    np.testing.assert_allclose(layout.tokenize(tensors), tokens, rtol=0, atol=1e-6)
    assert_same_tensors(layout.detokenize(tokens), tensors, rtol=0, atol=1e-6)


def test_golden_tokens_of_bfloat16_checkpoints_are_those_of_rounded_tensors():
    tensors, tokens = golden_lora()
    layout = LoraLayout.from_tensors(tensors)
    rounded = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    found = layout.tokenize(tensors, bfloat16=True)
    np.testing.assert_array_equal(found, layout.tokenize(rounded))
    assert 1e-4 < np.abs(found - tokens).max() < 0.05, (
        "rounding to 8 bits moves values by up to 0.4%"
    )


@given(loras())
def test_tokens_agree_with_the_torch_reference(lora):
    tensors, width = lora
    layout = LoraLayout.from_tensors(tensors, width)
    expected = torch_reference.tokenize(
        {k: torch.from_numpy(v) for k, v in tensors.items()}, layout.chunk_width
    ).numpy()
    tokens = layout.tokenize(tensors)
    np.testing.assert_array_equal(np.isnan(tokens), np.isnan(expected))
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-4)


@given(loras(), st.integers(0, 2**32 - 1))
def test_predicted_tokens_read_back_as_the_torch_reference(lora, seed):
    """Tokens as a decoder predicts them: no two cells of a scale pair agree, and some standard
    deviations are negative.

    Even widths: docs/METHOD.md leaves open which cells of an odd width's broken pattern count."""
    tensors, width = lora
    layout = LoraLayout.from_tensors(tensors, 2 * (width or 4))
    tokens = (
        np.random.default_rng(seed)
        .normal(size=(layout.num_tokens, *layout.token_shape))
        .astype(np.float32)
    )
    shapes = {key: value.shape for key, value in tensors.items()}
    expected = torch_reference.detokenize(torch.from_numpy(tokens), shapes, layout.chunk_width)
    assert_same_tensors(
        layout.detokenize(tokens), {k: v.numpy() for k, v in expected.items()}, rtol=1e-4, atol=1e-5
    )


@given(loras())
def test_round_trip(lora):
    tensors, width = lora
    layout = LoraLayout.from_tensors(tensors, width)
    assert_same_tensors(layout.detokenize(layout.tokenize(tensors)), tensors, rtol=0, atol=1e-6)
    assert_same_tensors(layout.join(layout.cut(tensors)), tensors, rtol=0, atol=0)


@given(loras())
def test_width_is_derived_and_padding_is_where_a_matrix_ends(lora):
    tensors, width = lora
    layout = LoraLayout.from_tensors(tensors)
    long_axes = [v.shape[1] if ".lora_A." in k else v.shape[0] for k, v in tensors.items()]
    assert layout.chunk_width == np.gcd.reduce(long_axes)
    assert not np.isnan(layout.tokenize(tensors)).any()
    if width is not None:
        padded = LoraLayout.from_tensors(tensors, width)
        real = np.count_nonzero(~np.isnan(padded.cut(tensors)))
        assert real == sum(v.size for v in tensors.values())
        assert padded.num_tokens == sum(-(-d // width) for d in long_axes)


@pytest.mark.parametrize(
    ("sizes", "rank", "tokens", "shape"),
    [
        ((896, 128, 4864, 24), 8, 4296, (10, 130)),
        ((1536, 256, 8960, 28), 16, 4508, (18, 258)),
        ((3584, 512, 18944, 28), 16, 4928, (18, 514)),
        ((2048, 256, 11008, 36), 16, 7308, (18, 258)),
    ],
    ids=["Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-VL-3B"],
)
def test_token_counts_of_the_six_settings(sizes, rank, tokens, shape):
    shapes = qwen_shapes(*sizes, rank)
    layout = LoraLayout.from_tensors(
        {key: jax.ShapeDtypeStruct(s, np.float32) for key, s in shapes.items()}
    )
    assert (layout.num_tokens, layout.token_shape) == (tokens, shape)
    assert layout.cell_mask is None
    assert LoraLayout.from_json(json.dumps(layout.to_json())) == layout


def test_7b_adapter_tokenizes_in_seconds():
    rng = np.random.default_rng(0)
    pool = rng.normal(size=18944 * 16).astype(np.float32)
    tensors = {
        key: pool[: np.prod(s)].reshape(s)
        for key, s in qwen_shapes(3584, 512, 18944, 28, 16).items()
    }
    assert sum(v.size for v in tensors.values()) == 40_370_176
    layout = LoraLayout.from_tensors(tensors)
    start = time.perf_counter()
    tokens = layout.tokenize(tensors)
    assert time.perf_counter() - start < 5
    assert tokens.shape == (4928, 18, 514) and np.isfinite(tokens).all()


def test_keys_with_and_without_the_peft_prefix():
    tensors, _ = golden_lora()
    layout = LoraLayout.from_tensors(tensors)
    prefixed = {PEFT_PREFIX + key: value for key, value in tensors.items()}
    assert LoraLayout.from_tensors(prefixed) == layout
    np.testing.assert_array_equal(layout.tokenize(prefixed), layout.tokenize(tensors))
    assert layout.detokenize(layout.tokenize(prefixed)).keys() == tensors.keys()


def test_order_of_modules():
    def module(path):
        return {
            f"{path}.lora_A.weight": np.zeros((2, 4)),
            f"{path}.lora_B.weight": np.zeros((4, 2)),
        }

    inside = [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    inside += [f"mlp.{n}" for n in ("up_proj", "gate_proj", "down_proj")]
    inside += ["mlp.alpha", "self_attn.beta", "mlp.experts.2.gamma", "mlp.experts.10.gamma"]
    expected = [f"model.layers.{layer}.{path}" for layer in (2, 9, 10) for path in inside] + [
        "lm_head"
    ]
    shuffled = np.random.default_rng(0).permutation(expected)
    layout = LoraLayout.from_tensors(
        {key: value for path in shuffled for key, value in module(path).items()}
    )
    assert list(layout.modules) == expected
    keys = [m.key for m in layout.matrices]
    assert keys == [f"{path}.lora_{side}.weight" for path in expected for side in "AB"]


def test_manifest_round_trip_and_contradiction():
    tensors, _ = golden_lora()
    layout = LoraLayout.from_tensors(tensors, 100)
    manifest = json.loads(json.dumps(layout.to_json()))
    assert manifest["token_shape"] == [10, 102]
    assert LoraLayout.from_json(manifest) == layout == LoraLayout.from_json(json.dumps(manifest))
    for key in ("num_tokens", "rank"):
        with pytest.raises(InputError, match="layout manifest says"):
            LoraLayout.from_json({**manifest, key: manifest[key] + 1})


def test_every_fault_of_an_adapter_in_one_error():
    shapes = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": (4, 8),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (8, 4),
        "model.layers.0.self_attn.k_proj.lora_A.weight": (4, 8),  # no B
        "model.layers.0.self_attn.v_proj.lora_B.weight": (8, 4),  # no A
        "model.layers.0.self_attn.o_proj.lora_A.weight": (2, 8),  # another rank
        "model.layers.0.self_attn.o_proj.lora_B.weight": (8, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 8),  # not a LoRA matrix
        "model.layers.0.mlp.gate_proj.lora_A.weight": (4, 8, 1),  # not a matrix
        "model.layers.0.mlp.gate_proj.lora_B.weight": (8, 4),
        PEFT_PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight": (4, 8),  # twice
    }
    with pytest.raises(InputError) as caught:
        LoraLayout.from_tensors({key: np.zeros(shape) for key, shape in shapes.items()})
    for part in (
        "k_proj.lora_B.weight is missing",
        "v_proj.lora_A.weight is missing",
        "o_proj.lora_A.weight has rank 2, the others 4",
        "up_proj.weight is not a LoRA matrix",
        "gate_proj.lora_A.weight has shape (4, 8, 1)",
        "q_proj.lora_A.weight occurs twice",
    ):
        assert part in str(caught.value), part
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no LoRA matrices"):
        LoraLayout.from_tensors({})


def test_every_deviation_from_a_layout_in_one_error():
    tensors, _ = golden_lora()
    layout = LoraLayout.from_tensors(tensors)
    names = {n: f"model.layers.0.{BLOCK[n]}.{n}.lora_A.weight" for n in MODULE_ORDER}
    bad = {key: value.copy() for key, value in tensors.items()}
    bad[names["q_proj"]][3, 5] = np.nan
    bad[names["k_proj"]][0, 0] = np.inf
    bad[names["v_proj"]] = bad[names["v_proj"]][:, :-1]
    del bad[names["o_proj"]]
    bad["model.layers.1.self_attn.q_proj.lora_A.weight"] = np.zeros((8, 896), np.float32)
    with pytest.raises(InputError) as caught:
        layout.tokenize(bad, source="run7/step3")
    message = str(caught.value)
    assert message.startswith("run7/step3 ")
    assert f"{names['q_proj']} holds NaN" in message and f"{names['k_proj']} holds NaN" in message
    assert f"{names['v_proj']} has shape (8, 895), expected (8, 896)" in message
    assert (
        f"{names['o_proj']} is missing" in message
        and "layers.1.self_attn.q_proj.lora_A.weight is not in the layout" in message
    )
    with pytest.raises(InputError, match="tokens have shape"):
        layout.detokenize(np.zeros((178, 10, 130), np.float32))


def test_constant_chunk_round_trips():
    """A LoRA before its first step has B = 0."""
    tensors, _ = golden_lora()
    tensors = {key: np.zeros_like(v) if ".lora_B." in key else v for key, v in tensors.items()}
    constant = "model.layers.0.mlp.up_proj.lora_A.weight"
    tensors[constant] = np.full_like(tensors[constant], 0.25)
    layout = LoraLayout.from_tensors(tensors)
    tokens = layout.tokenize(tensors)
    assert np.isfinite(tokens).all()
    assert_same_tensors(layout.detokenize(tokens), tensors, rtol=0, atol=1e-6)


def test_predicted_negative_std_counts_as_zero():
    tensors, tokens = golden_lora()
    layout = LoraLayout.from_tensors(tensors)
    tokens = tokens.copy()
    tokens[:, 8:, 1::2] = -0.9  # exp(-2.5) < 0.1
    tokens[:, :, 129] = -0.9
    for key, value in layout.detokenize(tokens).items():
        chunks = np.stack(
            np.split(
                tensors[key].T if ".lora_B." in key else tensors[key],
                max(value.shape) // 128,
                axis=1,
            )
        )
        means = (value.T if ".lora_B." in key else value)[0, ::128]
        np.testing.assert_allclose(means, chunks.mean(axis=(1, 2)), atol=1e-7)
        assert all(
            np.ptp(c) == 0
            for c in np.split(value.T if ".lora_B." in key else value, len(means), axis=1)
        ), key


def importance_of(targets) -> np.ndarray:
    """The weights (T,) of checkpoints' tokens, as `token_array` makes them: one checkpoint after
    the other."""
    moments = Moments()
    for target in targets:
        moments.add(target)
    return importance_weights(moments)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_importance_weights_against_two_passes(count, tokens, width, seed):
    targets = (np.random.default_rng(seed).normal(size=(count, tokens, 3, width)) * 0.1 + 5).astype(
        np.float32
    )
    targets *= np.arange(1, tokens + 1, dtype=np.float32)[:, None, None]
    weights = importance_of(targets)
    std = targets.astype(np.float64).std(axis=0)
    np.testing.assert_allclose(weights, (std / std.sum()).mean(axis=(1, 2)) * std.size, rtol=1e-5)
    assert weights.dtype == np.float32 and weights.mean() == pytest.approx(1.0, abs=1e-5)


def test_importance_weights_leave_padding_out():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(4, 3, 2, 5))
    targets[:, 2, :, 3:] = np.nan
    weights = importance_of(targets)
    std = targets.std(axis=0)  # NaN where padded
    for t in range(3):
        assert weights[t] == pytest.approx(np.nanmean(std[t]) / np.nanmean(std), rel=1e-5)


@pytest.mark.parametrize(
    ("targets", "match"),
    [([np.ones((2, 3, 4))], "at least two"), ([np.ones((2, 3, 4))] * 3, "that differ")],
)
def test_importance_weights_refuse_what_has_no_spread(targets, match):
    with pytest.raises(InputError, match=match):
        importance_of(targets)


@given(loras(), st.integers(1, 4), st.booleans())
def test_targets_encode_and_decode(lora, checkpoints, moving):
    tensors, width = lora
    layout = LoraLayout.from_tensors(tensors, width)
    rng = np.random.default_rng(checkpoints)

    def moved(value: np.ndarray) -> np.ndarray:
        return value + np.float32(0.01 * moving) * rng.normal(size=value.shape).astype(np.float32)

    sets = [{key: moved(value) for key, value in tensors.items()} for _ in range(checkpoints)]
    element = ElementTarget.fit(layout, lambda: ((f"step{i}", s) for i, s in enumerate(sets)))
    chunk = ChunkTarget(layout)
    for target in (
        element,
        chunk,
        from_statistics("element", layout, element.statistics()),
        from_statistics("chunk", layout, {}),
    ):
        for tensors in sets:
            encoded = target.encode(tensors)
            assert encoded.shape == target.shape and encoded.dtype == np.float32
            assert_same_tensors(target.decode(encoded), tensors, rtol=0, atol=1e-6)
    encoded = np.stack([element.encode(s) for s in sets])
    np.testing.assert_allclose(np.nan_to_num(encoded).mean(axis=0), 0, atol=1e-3)
    spread = np.nanmean(encoded.astype(np.float64) ** 2, axis=(0, 2, 3))
    if moving and checkpoints > 1:
        np.testing.assert_allclose(spread, 1, rtol=1e-2)


@settings(max_examples=6)
@given(loras(), st.sampled_from(["element", "chunk"]), st.integers(0, 2**32 - 1))
def test_weights_in_jax_are_those_that_are_exported(lora, kind, seed):
    tensors, width = lora
    layout = LoraLayout.from_tensors(tensors, width)
    sets = [("a", tensors), ("b", {key: 2 * value for key, value in tensors.items()})]
    target = ElementTarget.fit(layout, lambda: sets) if kind == "element" else ChunkTarget(layout)
    tokens = np.random.default_rng(seed).normal(size=target.shape).astype(np.float32)
    exported = target.decode(tokens)
    stacked = layout.stacked(target.chunks(jax.numpy.asarray(np.nan_to_num(tokens))))
    seen = set()
    for stack, values in zip(layout.stacks, stacked, strict=True):
        for key, value in zip(stack.keys, values, strict=True):
            # Exactly those; an exponential is rounded otherwise.
            close = {"rtol": 0, "atol": 0} if kind == "element" else {"rtol": 1e-5, "atol": 1e-6}
            np.testing.assert_allclose(value, exported[key], err_msg=key, **close)
            seen.add(key)
    assert seen == exported.keys()


@settings(max_examples=6)  # each compiles a program
@given(loras(), st.integers(0, 2**32 - 1))
def test_gradient_of_a_matrix_goes_to_its_own_cells(lora, seed):
    """The transpose of `join` is `cut`, and cells beyond a matrix's end get nothing."""
    tensors, width = lora
    layout, rng = LoraLayout.from_tensors(tensors, width), np.random.default_rng(seed)
    towards = {key: rng.normal(size=v.shape).astype(np.float32) for key, v in tensors.items()}

    def product(chunks):
        pairs = zip(layout.stacks, layout.stacked(chunks), strict=True)
        return sum(
            (values[i] * towards[k]).sum() for s, values in pairs for i, k in enumerate(s.keys)
        )

    gradient = jax.grad(product)(jax.numpy.zeros((layout.num_tokens, *layout.chunk_shape)))
    np.testing.assert_array_equal(gradient, np.nan_to_num(layout.cut(towards)))


@pytest.mark.parametrize("kind", ["element", "chunk"])
def test_7b_weights_in_jax_are_a_small_program(kind):
    """A gather for each kind of matrix, not for each of 392 matrices."""
    layout = LoraLayout.from_shapes(qwen_shapes(3584, 512, 18944, 28, 16))
    zeros = {"mean": np.zeros((layout.num_tokens, *layout.chunk_shape), np.float32)}
    target = from_statistics(kind, layout, {**zeros, "scale": np.ones(layout.num_tokens)})
    tokens = jax.ShapeDtypeStruct(target.shape, np.float32)
    made = jax.make_jaxpr(lambda x: layout.stacked(target.chunks(x)))(tokens)
    assert len(layout.matrices) == 392 and len(layout.stacks) == 14
    assert str(made).count(" gather[") == 14 and len(made.eqns) < 250
    shapes = {tuple(value.shape) for value in made.out_avals}
    assert (28, 16, 3584) in shapes and (28, 18944, 16) in shapes
