"""The benchmark of one GPU in bfloat16: the largest batch that fits ours and PyTorch's, and the
latency of one adapter.

dnd bench --config=configs/bench_gpu.py --workdir=runs/bench
"""

from dnd_jax.configs import default

COMMON_SENSE = "qwen2_5_0_5b_commonsense"


def get_config():
    """Train step and generation of the paper's first setting."""
    config = default.get_config()
    config.bench.cases = (
        ("0.5B, train step", COMMON_SENSE, "train", 0, "bfloat16"),
        ("0.5B, generation of many", COMMON_SENSE, "generate", 0, "bfloat16"),
        ("0.5B, generation of one", COMMON_SENSE, "generate", 1, "bfloat16"),
    )
    config.bench.methods = ("direct", "dft")  # auto is direct, until it knows a GPU's rates
    config.bench.torch = ("eager bf16", "channels_last bf16", "compile bf16")
    return config
