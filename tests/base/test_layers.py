"""All layers of a base as one loop: what a LoRA of some of them computes, and how large it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnd_jax.base.architecture import BaseLM, LmConfig
from dnd_jax.base.layers import by_layer, of_each_layer, stacked

CONFIG = LmConfig(40, 16, 24, 4, 4, 2, windows=(3, None, 5, None))
IDS = np.random.default_rng(0).integers(0, 40, (2, 9))


@pytest.fixture(scope="module")
def params():
    return BaseLM(CONFIG).init(jax.random.key(0), IDS)["params"]


def lora_of(shapes: dict) -> dict:
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def matrices(layer: int, rank: int) -> dict[str, tuple[int, int]]:
    name = f"model.layers.{layer}.self_attn.q_proj.lora"
    return {f"{name}_A.weight": (rank, 16), f"{name}_B.weight": (16, rank)}


def test_layers_without_a_lora_and_of_lower_ranks_compute_what_their_sum_does(params):
    """Added to the base's matrices by hand: layer 1 of rank 2, layer 3 of rank 1, two without."""
    lora = lora_of(matrices(1, 2) | matrices(3, 1))
    whole = by_layer(lora, 4)
    assert {name: x.shape for name, x in whole.items()} == {
        "self_attn.q_proj.lora_A.weight": (4, 2, 16),
        "self_attn.q_proj.lora_B.weight": (4, 16, 2),
    }
    merged = jax.tree.map(jnp.copy, params)
    kernel = merged["layers"]["q_proj"]["dense"]
    for layer in (1, 3):
        a, b = (lora[f"model.layers.{layer}.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
        kernel["kernel"] = kernel["kernel"].at[layer].add(0.5 * (b @ a).T)
    module = BaseLM(CONFIG)
    ours = module.apply({"params": params}, IDS, lora, 0.5)
    np.testing.assert_allclose(ours, module.apply({"params": merged}, IDS), atol=2e-5)
    assert np.abs(ours - module.apply({"params": params}, IDS)).max() > 0.1


def test_what_all_layers_have_is_stacked_and_comes_apart_again(params):
    """In the layers' order, whatever that of the keys; what only some have stays as it is."""
    lora = lora_of({k: v for i in range(11, -1, -1) for k, v in matrices(i, 2).items()})
    found = stacked(dict(sorted(lora.items())))
    assert {name: x.shape[0] for name, x in found.items()} == {
        "self_attn.q_proj.lora_A.weight": 12,
        "self_attn.q_proj.lora_B.weight": 12,
    }
    apart = of_each_layer(found)
    assert apart.keys() == lora.keys()
    assert all(np.array_equal(apart[name], x) for name, x in lora.items())
    some = lora_of(matrices(1, 2) | matrices(3, 2))
    assert stacked(some).keys() == of_each_layer(stacked(some)).keys() == some.keys()
    first = lora_of(matrices(0, 2) | matrices(1, 2))  # of four layers
    module = BaseLM(CONFIG)
    logits = [module.apply({"params": params}, IDS, x) for x in (first, stacked(first))]
    np.testing.assert_allclose(*logits, atol=1e-6)


@pytest.mark.parametrize(
    "how", [{"remat": True}, {"unroll": True}, {"remat": True, "unroll": True}]
)
def test_how_layers_are_computed_changes_no_gradient(params, how):
    lora = lora_of({k: v for i in range(4) for k, v in matrices(i, 2).items()})

    def gradient(**how):
        def loss(lora):
            return jnp.sum(BaseLM(CONFIG, **how).apply({"params": params}, IDS, lora) ** 2)

        return jax.grad(loss)(lora)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()),
        gradient(**how),
        gradient(),
    )


def test_a_program_is_as_large_with_many_layers_as_with_few():
    def lines(layers: int) -> int:
        module = BaseLM(LmConfig(40, 16, 24, layers, 4, 2))
        shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)
        text = jax.jit(jax.grad(lambda p: module.apply(p, IDS).sum())).lower(shapes).as_text()
        return text.count("\n")

    assert lines(40) == lines(2)
