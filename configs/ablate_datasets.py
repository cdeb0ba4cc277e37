"""How many training datasets does the generator need?

    dnd ablate --config=configs/ablate_datasets.py --workdir=runs/ablate_datasets [--seeds=0,1,2]

The paper took 2 to 6 of 7 and finds 4 needed; the embedded suite has 30 small ones. Fewer are a
part of more, drawn by the seed.
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py with a part of its 30 training datasets; 0 is all."""
    config = mini.get_config()
    config.ablate.axes = (("train.datasets", (3, 6, 12, 20, 0)),)
    return config
