"""The convolutions of the paper's first setting at batch 1 in float32, one by one, for a CPU.

    dnd bench --layers --config=configs/bench_layers.py

Its second and third stage only: those whose direct gradients take seconds rather than minutes.
"""

from dnd_jax.configs import qwen2_5_0_5b_commonsense


def get_config():
    """The common-sense setting cut down to two stages."""
    config = qwen2_5_0_5b_commonsense.get_config()
    config.generator.features = ((128, 200, 300), (128, 100, 256), (256, 50, 200))
    config.train.update(batch_size=1, dtype="float32")
    return config
