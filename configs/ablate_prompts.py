"""How many prompts: in training (N, the generator's input) and, with N as it is, how many different
ones at generation?

    dnd ablate --config=configs/ablate_prompts.py --workdir=runs/ablate_prompts [--seeds=0,1,2]

A generator's input are N prompts; fewer at generation are repeated to fill them. Those variants
share the default's generator.
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py (N = 8) with other N, and with 1, 2 and 4 different prompts at generation."""
    config = mini.get_config()
    config.ablate.axes = (("condition.num_prompts", (4, 8, 16, 32)),)
    config.ablate.variants = (
        # Of two prompts there are no fewer different ones.
        ("num_prompts=2", {"condition.num_prompts": 2, "train.few_prompts": 0.0}),
        *((f"generation={k}", {"evaluate.num_prompts": k}) for k in (1, 2, 4)),
    )
    return config
