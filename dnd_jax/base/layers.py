"""All layers of a base as one loop: its program is as large, and compiled as fast, as that of one.

Their parameters are stacked, (layers, ...). So are, for the loop, the matrices of a LoRA, which has
one for each layer under PEFT's keys.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.base.attention import Attend

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")  # of a LoRA's tensor
EVERYTHING = 2**30  # tokens of an attention window that no text fills
PRODUCT = "product"
# What the backward pass has of each layer unless all is computed anew: a loop would keep whatever
# its body computes on the way, several times as much, which takes little time to compute.
KEPT = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def by_layer(lora: Mapping[str, jax.Array], layers: int) -> dict[str, jax.Array]:
    """A LoRA's matrices by their names inside a layer, those of all layers in one array (layers, r,
    d_in) or (layers, d_out, r). Layers without an entry, and those of a lower rank, are filled up
    with zeros, which add nothing."""
    found: dict[str, dict[int, jax.Array]] = {}
    for name, matrix in lora.items():
        if match := LAYER.fullmatch(name):
            found.setdefault(match[2], {})[int(match[1])] = matrix

    def stacked(of: Mapping[int, jax.Array]) -> jax.Array:
        shape = tuple(map(max, *(m.shape for m in of.values()), (0, 0)))

        def filled(matrix: jax.Array | None) -> jax.Array:
            if matrix is None:
                return jnp.zeros(shape, next(iter(of.values())).dtype)
            return jnp.pad(matrix, [(0, n - m) for n, m in zip(shape, matrix.shape, strict=True)])

        return jnp.stack([filled(of.get(i)) for i in range(layers)])

    return {name: stacked(of) for name, of in found.items()}


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
