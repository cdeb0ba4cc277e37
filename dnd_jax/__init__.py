"""Drag-and-Drop LLMs in JAX: task prompts in, LoRA adapters out (arXiv 2506.16406)."""
