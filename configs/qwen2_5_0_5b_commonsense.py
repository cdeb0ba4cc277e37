"""The paper's common-sense setting: LoRAs of Qwen2.5-0.5B-Instruct from 128 prompts
(docs/SETTINGS.md).

    dnd train --config=configs/qwen2_5_0_5b_commonsense.py --suite=SUITE --workdir=RUN \\
        --config.train.checkpoints=LORAS

LORAS holds DATASET/*/ PEFT folders of rank 8 on all seven projections, 50 of each of 6 datasets;
`dnd collect` makes them. 4296 tokens of 10 x 130; a generator of 1113.2M parameters; 8.26 TFLOP a
sample forward by the direct method; 4000 steps of 64.
"""

from dnd_jax.configs import default


def get_config():
    """default.py with the decoder's stages; its other defaults are this setting's already."""
    config = default.get_config()
    config.base.path = "Qwen/Qwen2.5-0.5B-Instruct"
    config.generator.features = (
        (128, 384, 384),
        (128, 200, 300),
        (128, 100, 256),
        (256, 50, 200),
        (512, 50, 200),
        (1024, 25, 200),
        (1024, 10, 200),
        (2048, 10, 200),
        (4296, 10, 130),
    )
    config.train.dtype = "bfloat16"
    return config
