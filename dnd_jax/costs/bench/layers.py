"""`dnd bench --layers`: every convolution of a configuration by itself, so that the gain of each
step of the method can be seen.

    dnd bench --layers --config=configs/bench_layers.py

Columns: the direct method; of a few channels on a CPU, the sum of shifted inputs; the planned
tiling with all planes at once; the same one row frequency at a time, so that planes stay in the
cache; forward and both gradients. Batch and type are those of config.train.
"""

import dataclasses

from tqdm import tqdm

from dnd_jax.config.schema import Config
from dnd_jax.generator.sizes import spec_of
from dnd_jax.ops.choice import choose
from dnd_jax.ops.cost_model import SHIFTED, ConvPlan, Problem, can_shift, only
from dnd_jax.ops.tune import seconds_of

COLUMNS = ("direct", "shifted", "at once", "looped")


def measure_layer(problem: Problem) -> dict[str, dict[str, float]]:
    """Seconds of one convolution, {"forward" or "gradient": {column: seconds}}, without columns
    that are no way to compute it."""
    looped = dataclasses.replace(choose(problem, "dft"), looped=True)
    plans = {
        "direct": ConvPlan(None, None, problem.platform),
        "at once": dataclasses.replace(looped, looped=False),
        "looped": looped,
    }
    found = {}
    for what, gradient in (("forward", False), ("gradient", True)):
        possible = dict(plans)
        if can_shift(problem, gradient):
            possible["shifted"] = only(problem, SHIFTED, gradient)
        found[what] = {
            column: seconds_of(problem, plan, gradient) for column, plan in possible.items()
        }
    return found


def layers_table(config: Config) -> str:
    """Measures all layers and returns a Markdown table; equal layers are measured once."""
    problems = spec_of(config).convolutions(config.train.batch_size)
    found = {
        problem: measure_layer(problem)
        for problem in tqdm(dict.fromkeys(problems.values()), desc="layers", dynamic_ncols=True)
    }
    head = " | ".join(
        f"{what}, {column}" for what in ("forward", "gradients") for column in COLUMNS
    )
    lines = [
        f"| convolution | grid | channels | tiles | {head} |",
        "|---" * (4 + 2 * len(COLUMNS)) + "|",
    ]
    for name, p in problems.items():
        tiles = choose(p, "dft").forward
        times = " | ".join(
            f"{found[p][what][c] * 1e3:.1f}" if c in found[p][what] else "-"
            for what in ("forward", "gradient")
            for c in COLUMNS
        )
        lines.append(
            f"| {name} | {p.height} x {p.width} | {p.channels_in} -> {p.channels_out} | "
            f"{tiles[0]} x {tiles[1]} | {times} |"
        )
    return "\n".join(lines) + "\n\nmilliseconds"
