"""Flax Linen modules: hyper-convolutional decoder, generator, text encoder, base LM; and their Hugging Face weights."""
