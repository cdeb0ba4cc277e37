"""All layers of a base as one loop: its program is as large, and compiled as fast, as that of one.

Their parameters are stacked, (layers, ...). So are, for the loop, the matrices of a LoRA: under
PEFT's keys without its prefix there is one for each layer ("model.layers.0.mlp.up_proj.lora_A.
weight"), under their names inside a layer ("mlp.up_proj.lora_A.weight") those of all layers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.base.attention import Attend

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")  # of a LoRA's tensor
BLOCKS = "self_attn.", "mlp."  # what names inside a layer begin with
EVERYTHING = 2**30  # tokens of an attention window that no text fills
PRODUCT = "product"
# What the backward pass has of each layer unless all is computed anew: a loop would keep whatever
# its body computes on the way, several times as much, which takes little time to compute.
KEPT = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def common_name(keys: Sequence[str]) -> str:
    """What matrices are called inside a layer that are those of the layers 0, 1, ...; empty for any
    others."""
    name = keys[0].removeprefix("model.layers.0.")
    wanted = [f"model.layers.{layer}.{name}" for layer in range(len(keys))]
    return name if list(keys) == wanted else ""


def stacked(lora: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A LoRA's matrices, those stacked that are alike in the layers 0, 1, ...; the others stay."""
    alike: dict[tuple, dict[int, str]] = {}
    for key, matrix in lora.items():
        match = LAYER.fullmatch(key)
        layer, name = (int(match[1]), match[2]) if match else (0, key)
        alike.setdefault((name, matrix.shape), {})[layer] = key
    found = {}
    for of in alike.values():
        keys = [of[layer] for layer in sorted(of)]
        if name := common_name(keys):
            found[name] = jnp.stack([lora[key] for key in keys])
        else:
            found |= {key: lora[key] for key in keys}
    return found


def of_each_layer(lora: Mapping[str, Any]) -> dict[str, Any]:
    """What `stacked` makes of a LoRA -> the matrix of each layer under its own key."""
    found = {}
    for name, matrix in lora.items():
        if name.startswith(BLOCKS):
            found |= {f"model.layers.{layer}.{name}": one for layer, one in enumerate(matrix)}
        else:
            found[name] = matrix
    return found


def by_layer(lora: Mapping[str, jax.Array], layers: int) -> dict[str, jax.Array]:
    """A LoRA's matrices by their names inside a layer, (layers, r, d_in) or (layers, d_out, r).
    Layers without an entry, and those of a lower rank, are filled up with zeros, which add
    nothing."""
    found: dict[str, list[jax.Array]] = {}
    for name, matrix in lora.items():
        match = LAYER.fullmatch(name)
        if name.startswith(BLOCKS):
            first, inside = 0, name
        elif match:
            matrix, first, inside = matrix[None], int(match[1]), match[2]
        else:
            continue  # of what is no layer's
        found.setdefault(inside, []).append((first, matrix))

    def whole(parts: list[tuple[int, jax.Array]]) -> jax.Array:
        if len(parts) == 1 and len(parts[0][1]) == layers:
            return parts[0][1]
        shape = tuple(map(max, *(part.shape[1:] for _, part in parts), (0, 0)))
        value = jnp.zeros((layers, *shape), parts[0][1].dtype)
        for first, part in parts:
            value = jax.lax.dynamic_update_slice(value, part, (first, 0, 0))
        return value

    return {name: whole(parts) for name, parts in found.items()}


def through(
    layer: nn.Module,
    layers: int,
    windows: Sequence[int | None],
    x: jax.Array,
    attend: Attend,
    positions: jax.Array,
    lora: Mapping[str, jax.Array] | None = None,
    lora_scale: float = 1.0,
    remat: bool = False,
    unroll: bool = False,
) -> jax.Array:
    """Tokens (..., D) behind so many layers, each called as architecture.Layer is. windows: of
    attention, one for each layer, or none. remat, unroll: as of BaseLM. The backward pass has the
    layers' inputs and, without remat, what they call PRODUCT."""
    if not layers:
        return x
    own, common = None, windows[0] if windows else None
    if len(set(windows[:layers])) > 1:
        sizes = [EVERYTHING if window is None else window for window in windows[:layers]]
        own = jnp.array(sizes)

    def one(layer: nn.Module, x: jax.Array, of_layer: tuple) -> tuple[jax.Array, None]:
        matrices, own = of_layer
        window = common if own is None else own
        return layer(x, attend, positions, lora_scale, matrices, window), None

    loop = nn.scan(
        # Nothing that a loop computes can serve both passes, which is what prevent_cse is against.
        nn.remat(one, prevent_cse=unroll, policy=None if remat else KEPT),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=layers,
        unroll=layers if unroll else 1,
    )
    return loop(layer, x, (by_layer(lora or {}, layers), own))[0]
