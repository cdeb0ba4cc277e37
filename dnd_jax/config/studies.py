"""Settings of what compares variants: `dnd bench`, `dnd plan` and `dnd ablate`."""

import dataclasses
from typing import Annotated

from dnd_jax.config.choices import AXES, DTYPES, METHODS, REMAT
from dnd_jax.config.constraints import Must, Positive, Rules, some_of, wholes

WHAT = ("forward", "gradient", "train", "generate", "collect", "answers")
TORCH = tuple(
    f"{how}{dtype}" for dtype in ("", " bf16") for how in ("eager", "channels_last", "compile")
)
_CASES = (
    f"must hold (name, settings, one of {', '.join(WHAT)}, batch, one of {', '.join(DTYPES)}[, "
    "first stage, last stage]) each"
)


def _cases(cases: tuple) -> bool:
    return all(
        isinstance(case, tuple)
        and len(case) in (5, 7)
        and all(isinstance(case[i], str) for i in (0, 1))
        and case[2] in WHAT
        and wholes((case[3], *case[5:]), 1, 3)
        and case[4] in DTYPES
        for case in cases
    )


@dataclasses.dataclass(frozen=True)
class Bench:
    """`dnd bench`. cases: those of dnd_jax/costs/bench/case.py, the stages may be left out; none:
    this configuration's own forward, train and generate."""

    cases: Annotated[tuple, Must(_cases, _CASES)]
    methods: Annotated[tuple, some_of(*METHODS)]  # ours, of generator.convolution
    torch: Annotated[tuple, some_of(*TORCH)]
    repeats: Positive  # timed runs in one process
    rounds: Positive  # processes a variant, one variant after the other


STEPS = ("train", "generate", "collect")  # what `dnd plan` compiles


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`dnd plan --sweep`: every combination of these is compiled; an empty list takes the
    configuration's own value."""

    topologies: tuple[str, ...]  # such as "v5p:2x2x2"; none: this machine's devices
    meshes: Annotated[
        tuple,
        Must(
            lambda meshes: all(wholes(mesh, 3, 4) for mesh in meshes),
            "must hold (data, fsdp, tensor) or (slices, data, fsdp, tensor)",
        ),
    ]
    rules: Annotated[tuple, Rules(AXES, several=True)]
    remat: Annotated[tuple[str, ...], some_of(*REMAT)]
    # samples of a step; below 0: of each device
    batches: Annotated[tuple[int, ...], Must(lambda of: 0 not in of, "must not hold 0")]
    micro_batches: Annotated[
        tuple[int, ...], Must(lambda of: all(n >= 1 for n in of), "must be at least 1 each")
    ]
    methods: Annotated[tuple[str, ...], some_of(*METHODS)]
    steps: Annotated[
        tuple[str, ...],
        Must(lambda of: bool(of) and set(of) <= set(STEPS), f"must name some of {STEPS}"),
    ]


@dataclasses.dataclass(frozen=True)
class Ablate:
    """`dnd ablate`: the runs to compare with the configuration's own, in terms of dotted keys such
    as "train.pairing"."""

    axes: tuple  # (key, (value, ...)) each; every combination of their values is a variant
    variants: tuple  # (name, {key: value, ...}) each, after those of the axes
