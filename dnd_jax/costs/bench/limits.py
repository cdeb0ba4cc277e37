"""`dnd bench --limits`: what the hardware allows for the train step of the paper's settings, by
counting.

    dnd bench --limits

Operations over peak and bytes over bandwidth, a sample, with the training batch shared by DEVICES.
"planned" is what the cost model chooses: its operations, and the bytes that its arrays take when
each is written and read once.
"""

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.chips import CHIPS, Chip
from dnd_jax.generator.sizes import spec_of
from dnd_jax.ops.choice import choose
from dnd_jax.ops.cost_model import dft_work
from dnd_jax.ops.rates import GUESSED

DEVICES = 8
SETTINGS = (
    "qwen2_5_0_5b_commonsense", "qwen2_5_1_5b_code", "qwen2_5_1_5b_math",
    "qwen2_5_7b_code", "qwen2_5_7b_math", "qwen2_5_vl_3b_math",
)  # fmt: skip
SHOWN = ("TPU v5p", "H200")


def limits(setting: str, chip: Chip) -> dict[str, float]:
    """Milliseconds and TFLOP of one sample's train step on one of DEVICES chips."""
    config = freeze(load_file(setting))
    spec, batch = spec_of(config), config.train.batch_size / DEVICES
    operations = moved = 0.0
    for problem in spec.convolutions(round(batch), chip.platform).values():
        plan = choose(problem, "dft" if problem.platform in GUESSED else "auto")
        for gradient, tiling in ((False, plan.forward), (True, plan.backward)):
            if tiling is None:
                operations += 2 * problem.macs * (2 if gradient else 1)
                continue
            work = dft_work(problem, tiling, gradient)
            operations += 2 * sum(macs for macs, _ in work)
            moved += sum(step for _, step in work)
    direct = 6 * spec.forward_macs
    return {
        "direct_tflop": direct / 1e12,
        "planned_tflop": operations / batch / 1e12,
        "direct_ms": direct / chip.peak * 1e3,
        "planned_ms": operations / batch / chip.peak * 1e3,
        "bytes_ms": moved / batch / chip.bandwidth * 1e3,
    }


def limits_table() -> str:
    """All settings on all chips as a Markdown table."""
    lines = [
        "| setting | chip | TFLOP direct | TFLOP planned | direct at peak, ms | planned at peak, "
        "ms | planned bytes, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        for chip in (chip for chip in CHIPS.values() if chip.name in SHOWN):
            r = limits(setting, chip)
            lines.append(
                f"| {setting} | {chip.name} | {r['direct_tflop']:.1f} | {r['planned_tflop']:.2f} "
                f"| {r['direct_ms']:.1f} | "
                f"{r['planned_ms']:.2f} | {r['bytes_ms']:.1f} |"
            )
    return "\n".join(lines)
