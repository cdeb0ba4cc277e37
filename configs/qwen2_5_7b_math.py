"""The paper's math setting: LoRAs of Qwen2.5-7B-Instruct from 16 prompts of 4608 tokens
(docs/SETTINGS.md).

    dnd train --config=configs/qwen2_5_7b_math.py --suite=SUITE --workdir=RUN \\
        --config.train.checkpoints=LORAS

LORAS holds DATASET/*/ PEFT folders of rank 16 on all seven projections, 80 of each of 6 datasets.
4928 tokens of 18 x 514; a generator of 1936.5M parameters; 52.77 TFLOP a sample forward by the
direct method; 5000 steps of 48. The embeddings of one text take 3.5 MB on the disk: with thousands
of texts add --config.condition.in_graph=True, which encodes them inside the train step and keeps
none (the operations above, and docs/SCALING.md, are without the encoder).
"""

from dnd_jax.configs import qwen2_5_7b_code


def get_config():
    """The code setting on the other base, with shorter texts."""
    config = qwen2_5_7b_code.get_config()
    config.base.path = "Qwen/Qwen2.5-7B-Instruct"
    config.base.max_length = 8192
    config.lora.update(steps=705, checkpoints=80)
    config.condition.max_text_length = 4608
    config.evaluate.max_new_tokens = 2048
    return config
