"""How wide should the chunks be into which LoRA matrices are cut? Narrower ones are more tokens.

    dnd ablate --config=configs/ablate_chunk_width.py --workdir=runs/ablate_chunk_width \\
        [--seeds=0,1,2]

0 is the greatest common divisor of all dimensions, 64 here: 128 tokens. 32: 256 tokens, 16: 512,
with as many weights in all.
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py with narrower chunks; the generator's last stage takes its sizes from the tokens."""
    config = mini.get_config()
    config.ablate.axes = (("generator.chunk_width", (0, 32, 16)),)
    return config
