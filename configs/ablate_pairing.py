"""Should a checkpoint meet new prompts each time, or always the same ones?

    dnd ablate --config=configs/ablate_pairing.py --workdir=runs/ablate_pairing [--seeds=0,1,2]

The paper: random pairing beats fixed pairs.
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py with both pairings of dnd_jax/generator/pairs.py."""
    config = mini.get_config()
    config.ablate.axes = (("train.pairing", ("random", "fixed")),)
    return config
