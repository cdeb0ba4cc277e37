"""The rule by which `dnd init-config` chooses a decoder's stages.

The cascade between the condition (N, L, C) and the tokens follows a rule drawn from the paper's six
settings (docs/METHOD.md section 5), whose decoders it meets within a factor of 1.2 in parameters
and 1.4 in operations:

    N    doubles from the prompts to M and ends with T. M is the power of two in (T/4, T/2];
         with a budget, whatever meets it best. The last convolution, k k M T, is most of all
         parameters, and M is the one number to spend a budget on
    L    shrinks by one factor a stage from the text's to h, which it reaches with M: the grids stay
         equally large while N doubles
    C    goes by one factor a stage from the encoder's width to w
    k    the largest odd number below h, from 3 to 11: 9 for rank 8, 11 for rank 16. Smaller where M
         would have to fall below T/8
"""

import math

from dnd_jax.config.schema import Features
from dnd_jax.core.errors import InputError
from dnd_jax.generator.spec import DecoderSpec

STEP = 8  # sizes between the ends are multiples of it: what meshes divide and matrix units like
KERNELS = (3, 11)


def _stages(first: Features, grid: Features, widest: int) -> tuple[Features, ...]:
    """The rule's stages for an M."""
    (n, length, c), (_, h, w) = first, grid
    steps = max(2, round(abs(math.log2(widest / n))))

    def between(start: int, end: int, share: float) -> int:
        return end if share == 1 else max(STEP, STEP * round(start * (end / start) ** share / STEP))

    middle = (
        (
            between(n, widest, i / steps),
            between(length, h, i / steps),
            between(c, w, i / (steps + 1)),
        )
        for i in range(1, steps + 1)
    )
    return first, *middle, grid


def cascade(
    first: Features, grid: Features, budget: float = 0, kernel_size: int = 0
) -> tuple[tuple[Features, ...], int]:
    """(stages, kernel size) from the decoder's input (N, L, C) to the token grid (T, h, w) by the
    rule above.

    budget: parameters not to exceed, of which as many are used as M <= T allows; 0: the rule's M.
    kernel_size: 0 for the rule's. Raises InputError when no M meets the budget.
    """
    tokens, height, _ = grid
    largest = kernel_size or min(max(height - 1 - height % 2, KERNELS[0]), KERNELS[1])
    if not budget:
        return _stages(first, grid, 2 ** max(0, tokens.bit_length() - 2)), largest
    every = [_stages(first, grid, m) for m in range(STEP, tokens + 1, STEP)] or [
        _stages(first, grid, tokens)
    ]
    for k in (kernel_size,) if kernel_size else range(largest, KERNELS[0] - 1, -2):
        counted = [(DecoderSpec(features, k).num_parameters, features) for features in every]
        count, best = max(((c, f) for c, f in counted if c <= budget), default=(0, None))
        if best and (best[-2][0] >= tokens / 8 or k in (kernel_size, KERNELS[0])):
            return best, k
    raise InputError(
        f"--budget={budget:g}: the smallest decoder from {first} to tokens {grid} has "
        f"{min(counted)[0]:.4g} parameters; "
        "raise it or shorten --max-text-length"
    )
