"""The frozen text encoders that turn prompts into a condition, and the cache of what they
computed."""
