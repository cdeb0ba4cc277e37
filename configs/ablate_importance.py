"""Do importance weights in the loss (docs/METHOD.md section 3) help?

dnd ablate --config=configs/ablate_importance.py --workdir=runs/ablate_importance [--seeds=0,1,2]
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py with and without them."""
    config = mini.get_config()
    config.ablate.axes = (("generator.importance", (True, False)),)
    return config
