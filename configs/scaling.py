"""How the 0.5B setting's train step grows from 8 to 256 TPU v5p chips, by the compiler: docs/SCALING.md.

dnd plan --sweep --config=configs/scaling.py --workdir=runs/scaling                                        # 64 samples a step
dnd plan --sweep --config=configs/scaling.py --workdir=runs/scaling --config.sweep.batches="(-8,)"         # 8 of each chip
"""

from configs import qwen2_5_0_5b_commonsense


def get_config():
    """Data parallel, on four sizes of slice."""
    config = qwen2_5_0_5b_commonsense.get_config()
    config.sweep.topologies = ("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4")
    return config
