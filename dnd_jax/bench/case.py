"""What one measurement is: the shapes of a case, worked out from a configuration without a suite, a base or a network."""

import dataclasses

from flax import linen as nn

from dnd_jax import config as config_lib
from dnd_jax.layout import LoraLayout
from dnd_jax.models import hf
from dnd_jax.models.bert import Bert, BertConfig
from dnd_jax.models.hyperconv import Features, forward_macs
from dnd_jax.models.text_encoder import load_module
from dnd_jax.train import resolve_features

WHAT = ("forward", "gradient", "train", "generate")
PASSES = {"forward": 1, "gradient": 3, "train": 3, "generate": 1}  # times the forward operations, by the direct method
LONG_ENOUGH = 60.0  # seconds in one process, after which no further repeat is started
MINILM_L12 = Bert(BertConfig(30522, 384, 1536, 12, 12))  # of a hub id, which a benchmark does not download


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of a benchmark.

    what: "forward" (decoder), "gradient" (forward and backward of the loss), "train" (the real train step, optimiser included) or
    "generate" (prompt ids -> adapter tensors). stages: first and last, None for all. batch 0: the largest that every variant fits.
    """

    name: str
    config: str  # file
    what: str
    batch: int
    dtype: str
    stages: tuple[int, int] | None = None

    def load(self) -> config_lib.Config:
        """The configuration with this case's batch and dtype."""
        raw = config_lib.load_file(self.config)
        raw.train.update(batch_size=max(self.batch, 1), dtype=self.dtype)
        return config_lib.freeze(raw)

    def features(self, config: config_lib.Config) -> tuple[Features, ...]:
        """(N, L, C) of the measured stages."""
        every = features_of(config)
        first, last = self.stages or (0, len(every) - 1)
        return every[first : last + 1]

    def flop(self, config: config_lib.Config) -> int:
        """Operations by the direct method."""
        macs = forward_macs(self.features(config), config.generator.kernel_size)
        return 2 * macs * max(self.batch, 1) * PASSES[self.what]


def encoder_module(config: config_lib.Config) -> nn.Module:
    """The text encoder without its weights: that of a package, else MiniLM-L12."""
    c = config.condition
    return load_module(c.encoder, c.layer) if c.encoder.startswith(hf.PACKAGE) else MINILM_L12


def layout_of(config: config_lib.Config) -> LoraLayout | None:
    """The layout of the configured base's LoRA; None for a given base, whose sizes its own folder knows."""
    if config.base.path:
        return None
    shapes = config.base.lm_config(1).lora_shapes(config.lora.rank, config.lora.targets)
    return LoraLayout.from_shapes(shapes, config.generator.chunk_width or None)


def features_of(config: config_lib.Config) -> tuple[Features, ...]:
    """The decoder's stages with their zeros filled in from the configured sizes."""
    features = config.generator.features
    if all(all(f) for f in features):
        return features
    layout, condition = layout_of(config), config.condition
    grid = layout.token_shape if config.generator.target == "chunk" else layout.chunk_shape
    width = encoder_module(config).width
    return resolve_features(config.generator, (condition.num_prompts, condition.max_text_length, width), (layout.num_tokens, *grid))
