"""The smallest setting that runs every stage for real: for tests of behaviour, not of quality."""

from dnd_jax.configs import mini


def get_config():
    config = mini.get_config()
    config.base.update(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config.pretrain.update(steps=8, batch_size=16, save_every=3)
    config.lora.update(rank=2, alpha=4.0, steps=6, batch_size=4, checkpoints=4, save_every=2)
    config.condition.update(num_prompts=4, max_text_length=16)
    config.generator.features = ((0, 0, 0), (8, 6, 20), (0, 0, 0))
    config.train.update(steps=8, batch_size=4, few_prompts=0.0, save_every=3)
    config.evaluate.update(samples=2, max_new_tokens=4)
    config.controls.update(in_context=0, prompts=False, multi_task=False, few_shot=False)
    return config
