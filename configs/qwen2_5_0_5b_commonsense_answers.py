"""The paper's common-sense setting trained through the base instead of on LoRAs (docs/METHOD.md
section 9).

    dnd train --config=configs/qwen2_5_0_5b_commonsense_answers.py --suite=SUITE --workdir=RUN

No LoRA is collected: each generated one answers 4 questions of its task through the base in
bfloat16. The decoder is that of qwen2_5_0_5b_commonsense.py.
"""

from dnd_jax.configs import qwen2_5_0_5b_commonsense


def get_config():
    """qwen2_5_0_5b_commonsense.py with the objective "answers"."""
    config = qwen2_5_0_5b_commonsense.get_config()
    config.base.max_length = 512
    config.lora.update(dtype="bfloat16", remat=True)
    config.train.update(objective="answers", answer_rows=4, batch_size=32)
    return config
