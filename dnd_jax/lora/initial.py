"""What LoRAs of a base start from, in place of LoRA checkpoints where none are collected."""

import jax
import numpy as np

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.hub import resolve
from dnd_jax.config.schema import Config
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.peft_settings import adapter_of
from dnd_jax.lora.targets import ChunkTarget, ElementTarget, Target
from dnd_jax.lora.task_step import init_lora

SPREAD = 0.03  # of a weight around its start, of the order that tuning moves one


class Initial:
    """The layout, settings and statistics of LoRAs that `dnd collect` would begin to tune."""

    def __init__(self, config: Config, base_path: str, base_name: str = ""):
        """base_name: what the generated adapters call their base. Raises InputError for a base that
        cannot be read or lacks one of config.lora.targets."""
        c = config.lora
        self._config = config
        self._shapes = load_base_config(resolve(base_path)).lora_shapes(c.rank, c.targets)
        self.layout = LoraLayout.from_shapes(self._shapes, config.generator.chunk_width or None)
        self.adapter = adapter_of(base_path, c, base_name)

    def target(self) -> Target:
        """The tokens that a decoder learns: an "element" target's are the weights' distances from
        the start of `dnd collect` (A random, B = 0), in units of SPREAD."""
        if self._config.generator.target == "chunk":
            return ChunkTarget(self.layout, self._config.generator.bfloat16_checkpoints)
        key = jax.random.fold_in(jax.random.key(self._config.seed), 1)
        start = {name: np.asarray(x) for name, x in init_lora(key, self._shapes).items()}
        mean = np.nan_to_num(self.layout.cut(start))
        return ElementTarget(self.layout, mean, np.full(self.layout.num_tokens, SPREAD, np.float32))
