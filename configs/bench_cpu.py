"""The benchmark of a CPU: ours beside PyTorch, on the paper's first setting and the embedded
default (docs/PERFORMANCE.md).

    dnd bench --config=configs/bench_cpu.py --workdir=runs/bench

About a quarter of an hour on two cores, nearly all of it PyTorch's. Needs 12 GB of memory.
"""

from dnd_jax.configs import default

COMMON_SENSE = "qwen2_5_0_5b_commonsense"


def get_config():
    """Whole decoder forward; its first two stages forward and backward; the quickstart's train step
    and generation."""
    config = default.get_config()
    config.bench.cases = (
        ("0.5B decoder, forward", COMMON_SENSE, "forward", 1, "float32"),
        ("0.5B stages 1-2, forward and backward", COMMON_SENSE, "gradient", 1, "float32", 0, 2),
        ("embedded default, train step", "mini", "train", 16, "float32"),
        ("embedded default, generation", "mini", "generate", 1, "float32"),
    )
    config.bench.rounds = 1
    config.bench.repeats = 5
    return config
