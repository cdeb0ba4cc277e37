"""What of an example should condition the generator: prompt, response, both, or a mix of prompts
with and without response?

    dnd ablate --config=configs/ablate_condition.py --workdir=runs/ablate_condition [--seeds=0,1,2]

The paper: prompts alone do best on common sense. All but "prompt" read the answers of the unseen
tasks' pools.
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py with the forms of dnd_jax/data/condition_text.py."""
    config = mini.get_config()
    config.ablate.axes = (("condition.form", ("prompt", "response", "both", "mix")),)
    return config
