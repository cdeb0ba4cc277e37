"""A decoder of few operations whose parameters and optimiser state do not fit one 16 GiB chip."""

from dnd_jax.configs import default


def get_config():
    config = default.get_config()
    config.generator.features = ((4, 8, 28672), (4, 8, 28672))
    config.generator.kernel_size = 1
    config.train.update(batch_size=4, dtype="bfloat16")
    return config
