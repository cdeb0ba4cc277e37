"""The frozen base LLM: architecture, folders and weights, chat template, pretraining, and running
it in JAX and PyTorch."""
