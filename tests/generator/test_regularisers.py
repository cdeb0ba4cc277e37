"""What is added to the loss: the size of BA by the checkpoints', and two sets of prompts a task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline import random_loras, tiny_suite

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.pairs import Pairs
from dnd_jax.generator.regularisers import regularised, squared_sizes, tuned_sizes
from dnd_jax.generator.train import train
from dnd_jax.loop.metrics import read_metrics
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.targets import Target, from_statistics
from tests.generator.test_pairs import N, asked, questions

RANK = 2
# Matrices of three layers alike, and of a module outside of them; a last chunk with padding.
MODULES = {f"model.layers.{i}.self_attn.q_proj": (10, 4) for i in range(3)} | {"lm_head": (6, 4)}


def target_of(kind: str) -> Target:
    shapes = {}
    for module, (wide, narrow) in MODULES.items():
        shapes |= {f"{module}.lora_A.weight": (RANK, wide), f"{module}.lora_B.weight": (narrow, 2)}
    layout, rng = LoraLayout.from_shapes(shapes, 4), np.random.default_rng(1)
    mean = 0.1 * rng.normal(size=(layout.num_tokens, *layout.chunk_shape)).astype(np.float32)
    scale = rng.uniform(0.1, 0.5, layout.num_tokens).astype(np.float32)
    return from_statistics(kind, layout, {"mean": mean, "scale": scale})


def checkpoints(target: Target, count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    shapes = {m.key: m.shape for m in target.layout.matrices}
    return [{k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}] + [
        {k: 0.3 * rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        for _ in range(count - 1)
    ]


def norms_of(tensors: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        m: np.linalg.norm(tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"])
        for m in MODULES
    }


def train_settings(**changes):
    return dataclasses.replace(freeze(load_file("tests/tiny.py")).train, **changes)


@pytest.mark.parametrize("kind", ["element", "chunk"])
def test_the_size_of_a_lora_is_the_norm_of_its_product(kind):
    """By the mean over checkpoints, whose padding counts for nothing."""
    target = target_of(kind)
    loras = checkpoints(target)
    tokens = [target.encode(lora) for lora in loras]
    assert np.isnan(tokens[0]).any()
    frozen = tuned_sizes(target, tokens)
    expected = {m: np.mean([norms_of(lora)[m] for lora in loras]) for m in MODULES}
    found = frozen["sizes"]
    of_layers = [expected[f"model.layers.{i}.self_attn.q_proj"] for i in range(3)]
    np.testing.assert_allclose(found["self_attn.q_proj"], of_layers, rtol=1e-4)
    np.testing.assert_allclose(found["lm_head"], expected["lm_head"], rtol=1e-4)

    config = train_settings(size_weight=0.5)
    output = np.stack([np.nan_to_num(of) for of in tokens])
    added, numbers = jax.jit(lambda x: regularised(config, x, frozen))(output)
    ratios = [[norms_of(lora)[m] / expected[m] for m in MODULES] for lora in loras]
    np.testing.assert_allclose(numbers["size"], np.mean(ratios, 1), rtol=1e-3)
    losses = np.mean((np.array(ratios) - 1) ** 2, 1)
    np.testing.assert_allclose(numbers["size_loss"], losses, rtol=1e-3)
    np.testing.assert_allclose(added, 0.5 * losses, rtol=1e-3)
    assert "wording_loss" not in numbers


def test_a_lora_that_adds_nothing_has_a_size_of_0_and_a_gradient():
    """lora_B = 0, where collecting starts: its root would have none."""
    target = target_of("element")
    zero = {k: x * (".lora_A" in k) for k, x in checkpoints(target)[0].items()}
    tokens = jnp.nan_to_num(target.encode(zero))[None]
    assert max(float(jnp.max(x)) for x in squared_sizes(target, tokens).values()) < 1e-10
    frozen = tuned_sizes(target, [target.encode(lora) for lora in checkpoints(target)])
    config = train_settings(size_weight=1.0)
    gradient = jax.grad(lambda x: jnp.sum(regularised(config, x, frozen)[0]))(tokens)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["element", "chunk"])
def test_modules_that_no_checkpoint_has_trained_are_left_out(kind):
    """lora_B of one is 0 in all: whatever is made of it has no size to come near to."""
    target = target_of(kind)
    tuned = [
        {k: x * (k != "lm_head.lora_B.weight") for k, x in lora.items()}
        for lora in checkpoints(target)
    ]
    frozen = tuned_sizes(target, [target.encode(lora) for lora in tuned])
    assert frozen["sizes"]["lm_head"] == 0 < frozen["sizes"]["self_attn.q_proj"].min()
    config = train_settings(size_weight=1.0)
    output = jnp.nan_to_num(target.encode(checkpoints(target)[0]))[None]
    loss, numbers = regularised(config, output, frozen)
    ratios = [norms_of(checkpoints(target)[0])[m] / np.mean([norms_of(t)[m] for t in tuned])
              for m in MODULES if m != "lm_head"]  # fmt: skip
    np.testing.assert_allclose(numbers["size"], [np.mean(ratios)], rtol=1e-3)
    gradient = jax.grad(lambda x: jnp.sum(regularised(config, x, frozen)[0]))(output)
    assert np.isfinite(loss).all() and np.isfinite(gradient).all()


def test_two_sets_of_prompts_are_to_lead_to_one_lora():
    rng = np.random.default_rng(0)
    output = rng.normal(size=(6, 5, 2, 4)).astype(np.float32)
    output[3] = output[2]
    added, numbers = regularised(train_settings(wording_weight=2.0), output, {})
    apart = [np.mean((output[i] - output[i + 1]) ** 2) / 2 for i in (0, 2, 4)]
    np.testing.assert_allclose(numbers["wording_loss"], np.repeat(apart, 2), rtol=1e-5)
    np.testing.assert_allclose(added, 2 * np.repeat(apart, 2), rtol=1e-5)
    assert apart[1] == 0 and 0.5 < apart[0] < 2  # about 1 of tokens that have nothing in common


def test_two_samples_differ_in_their_prompts_alone():
    more = {"taught_at": lambda step: ("answers",), "rows": 5}
    pairs = Pairs([asked(40), asked(40)], 16, N, 0, wordings=2, **more)
    others = 0
    for step in range(10):
        drawn, rows = pairs.draw(step), pairs.rows_at(step)["rows"]
        assert len(drawn) == 16
        for i in range(0, 16, 2):
            assert drawn[i][:2] == drawn[i + 1][:2]
            prompts = [set(drawn[k][2].tolist()) for k in (i, i + 1)]
            others += prompts[0] != prompts[1]
            np.testing.assert_array_equal(rows["ids"][i], rows["ids"][i + 1])
            assert not set(questions(rows)[i]) & (prompts[0] | prompts[1])
    assert others == 80 and len({d for d, *_ in drawn}) == 2


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"batch_size": 4, "micro_batches": 4},
            "train.batch_size / train.micro_batches = 1 is odd",
        ),
        ({"pairing": "fixed"}, "which train.pairing = fixed has one of; must be 0"),
        ({"wording_weight": -1.0}, "config.train.wording_weight = -1.0 must not be negative"),
        ({"size_weight": -1.0}, "config.train.size_weight = -1.0 must not be negative"),
    ],
)
def test_what_contradicts_two_sets_of_prompts(changes, said):
    raw = load_file("tests/tiny.py")
    raw.train.update({"wording_weight": 0.1, **changes})
    with pytest.raises(InputError, match=said):
        freeze(raw)


@pytest.mark.slow
def test_a_run_writes_both_and_its_sizes_come_nearer_to_the_checkpoints(tmp_path):
    raw = load_file("tests/tiny.py")
    raw.train.update(steps=8, batch_size=8, learning_rate=1e-2)
    raw.train.update(checkpoints=str(tmp_path / "loras"), wording_weight=0.1, size_weight=1.0)
    raw.generator.update(features=((0, 0, 0), (0, 0, 0)), target="element")
    suite = tiny_suite(tmp_path / "suite")
    random_loras(tmp_path / "loras", suite, freeze(raw))
    suite = load_suite(suite, raw.condition.num_prompts)
    train(freeze(raw), suite, tmp_path / "with")
    rows = read_metrics(tmp_path / "with/generator")
    assert {"size", "size_loss", "wording_loss"} <= rows[0].keys()
    assert rows[-1]["size_loss"] < rows[0]["size_loss"]
    assert all(row["wording_loss"] > 0 for row in rows)
    raw.train.update(wording_weight=0.0, size_weight=0.0, steps=1)
    train(freeze(raw), suite, tmp_path / "without")
    plain = read_metrics(tmp_path / "without/generator")
    assert not {"size", "size_loss", "wording_loss"} & plain[0].keys()


def test_sizes_are_of_checkpoints_which_must_be_there(tmp_path):
    raw = load_file("tests/tiny.py")
    raw.train.update(objective="answers", size_weight=0.1, batch_size=8)
    assert freeze(raw).train.from_loras
    suite = load_suite(tiny_suite(tmp_path / "suite"), raw.condition.num_prompts)
    with pytest.raises(InputError, match="loras"):
        train(freeze(raw), suite, tmp_path)
