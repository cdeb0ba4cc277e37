"""The paper's math setting trained through the base instead of on LoRAs (docs/METHOD.md section 9).

    dnd train --config=configs/qwen2_5_7b_math_answers.py --suite=SUITE --workdir=RUN

No LoRA is collected: each generated one answers 2 questions of its task, of up to 2048 tokens,
through the base in bfloat16. The decoder is that of qwen2_5_7b_math.py.
"""

from dnd_jax.configs import qwen2_5_7b_math


def get_config():
    """qwen2_5_7b_math.py with the objective "answers"."""
    config = qwen2_5_7b_math.get_config()
    config.base.max_length = 2048
    config.lora.update(dtype="bfloat16", remat=True)
    config.train.update(objective="answers", answer_rows=2, batch_size=16)
    return config
