"""How the 0.5B setting's train step grows from 8 to 256 TPU v5p chips, by the compiler:
docs/SCALING.md.

dnd plan --sweep --config=configs/scaling.py --workdir=runs/scaling
"""

from dnd_jax.configs import qwen2_5_0_5b_commonsense


def get_config():
    """Data parallel: one batch among more chips (64 samples do not divide among 256), and eight
    samples for each chip."""
    config = qwen2_5_0_5b_commonsense.get_config()
    config.sweep.topologies = ("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x8x8")
    config.sweep.batches = (64, -8)
    return config
