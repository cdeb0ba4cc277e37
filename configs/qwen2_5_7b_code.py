"""The paper's code setting: LoRAs of Qwen2.5-Coder-7B-Instruct from 16 prompts of 26624 tokens
(docs/SETTINGS.md).

    dnd train --config=configs/qwen2_5_7b_code.py --suite=SUITE --workdir=RUN \\
        --config.train.checkpoints=LORAS

LORAS holds DATASET/*/ PEFT folders of rank 16 on all seven projections, 100 of each of 7 datasets.
4928 tokens of 18 x 514; a generator of 1936.5M parameters; 52.77 TFLOP a sample forward by the
direct method; 5000 steps of 48. The embeddings of one text take 20 MB on the disk: with thousands
of texts add --config.condition.in_graph=True, which encodes them inside the train step and keeps
none (the operations above, and docs/SCALING.md, are without the encoder).
"""

from dnd_jax.configs import default


def get_config():
    """default.py with this setting's sizes."""
    config = default.get_config()
    config.base.path = "Qwen/Qwen2.5-Coder-7B-Instruct"
    config.base.max_length = 32768
    config.lora.update(rank=16, alpha=32.0, steps=725, checkpoints=100)
    config.condition.update(num_prompts=16, max_text_length=26624)
    config.generator.features = (
        (16, 1000, 384),
        (64, 500, 384),
        (256, 125, 400),
        (512, 64, 400),
        (1024, 64, 400),
        (2048, 32, 400),
        (4928, 18, 514),
    )
    config.generator.kernel_size = 11
    config.generator.length_projection = "camera_ready"
    config.train.update(steps=5000, batch_size=48, dtype="bfloat16")
    config.evaluate.update(max_new_tokens=1024, batch_size=32, free_form=True)
    return config
