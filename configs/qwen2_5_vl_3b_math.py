"""The paper's visual math setting: LoRAs of Qwen2.5-VL-3B-Instruct from 16 prompts of 1536 tokens
(docs/SETTINGS.md).

    dnd train --config=configs/qwen2_5_vl_3b_math.py --suite=SUITE --workdir=RUN \\
        --config.train.checkpoints=LORAS

LORAS holds DATASET/*/ PEFT folders of rank 16 on all seven projections, 100 of one dataset: a
warning says that from one the generator cannot learn what prompts mean. The embeddings of one text
take 1.2 MB on the disk. 7308 tokens of 18 x 258; a generator of 2409.6M parameters; 28.90 TFLOP a
sample forward by the direct method; 5000 steps of 64.
"""

from dnd_jax.configs import default


def get_config():
    """default.py with this setting's sizes."""
    config = default.get_config()
    config.base.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    config.lora.update(rank=16, alpha=32.0, steps=725, checkpoints=100)
    config.condition.update(num_prompts=16, max_text_length=1536)
    config.generator.features = (
        (16, 1536, 384),
        (64, 500, 300),
        (256, 125, 300),
        (1024, 64, 300),
        (2048, 16, 256),
        (7308, 18, 258),
    )
    config.generator.kernel_size = 11
    config.train.update(steps=5000, batch_size=64, dtype="bfloat16")
    config.evaluate.update(max_new_tokens=2048, batch_size=32, free_form=True)
    return config
