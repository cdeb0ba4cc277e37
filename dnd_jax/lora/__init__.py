"""LoRA adapters: their layout as weight tokens, PEFT folders, collections of checkpoints, their
training, merging and proof."""
