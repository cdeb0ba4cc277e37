"""The sizes of a run from its configuration alone, without a suite, weights or a network: for
plans, benchmarks and training."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.base.architecture import sizes_to_pretrain
from dnd_jax.base.known import base_sizes
from dnd_jax.config import schema
from dnd_jax.config.schema import Features
from dnd_jax.core.errors import InputError
from dnd_jax.encoders.bert import Bert, BertConfig
from dnd_jax.encoders.load import load_module
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.targets import token_grid

# The paper's encoder, known without a download.
MINILM_L12_ID = "sentence-transformers/all-MiniLM-L12-v2"
MINILM_L12 = Bert(BertConfig(30522, 384, 1536, 12, 12))


def resolve_features(
    config: schema.Generator, condition: tuple[int, int, int], token_grid: tuple[int, int, int]
) -> tuple[Features, ...]:
    """(N, L, C) of every stage with its zeros filled in: the first stage's from the condition (N,
    L, C), T from the token grid (T, h, w), and any later L and C from h and w.

    Raises InputError naming a given size that contradicts the data.
    """
    expected_first = condition
    if config.length_projection:
        expected_first = (condition[0], config.features[0][1] or condition[1], condition[2])
    stages = [
        tuple(
            given or known for given, known in zip(config.features[0], expected_first, strict=True)
        ),
        *(
            (n or token_grid[0], length or token_grid[1], c or token_grid[2])
            for n, length, c in config.features[1:]
        ),
    ]
    for at, known, what in (
        (0, expected_first, "the condition (N, L, C)"),
        (-1, token_grid, "the token grid (T, h, w)"),
    ):
        if stages[at] != known:
            raise InputError(
                f"config.generator.features[{at}] = {stages[at]} is not {what}, which is {known}; "
                "a 0 takes it over"
            )
    return tuple(stages)


def encoder_module(config: schema.Config) -> nn.Module:
    """The text encoder without its weights. Raises InputError when neither its folder nor, by its
    id, the hub is within reach."""
    c = config.condition
    if c.encoder == MINILM_L12_ID:
        return MINILM_L12.clone(dtype=jnp.dtype(c.dtype))
    return load_module(c.encoder, c.layer, c.dtype)


def layout_of(config: schema.Config) -> LoraLayout:
    """The layout of the configured base's LoRA. Raises InputError when the config.json of a given
    base cannot be had or used."""
    base, lora = config.base, config.lora
    sizes = base_sizes(base.path, text_part=True) if base.path else sizes_to_pretrain(base, 1)
    return LoraLayout.from_shapes(
        sizes.lora_shapes(lora.rank, lora.targets), config.generator.chunk_width or None
    )


def features_of(config: schema.Config) -> tuple[Features, ...]:
    """The decoder's stages with their zeros filled in from the configured sizes. Raises InputError
    when the base is not at hand, which they need."""
    features = config.generator.features
    if all(all(f) for f in features):
        return features
    try:
        layout, condition = layout_of(config), config.condition
    except InputError as error:
        raise InputError(
            f"config.generator.features = {features}, whose zeros take the base's sizes: {error}; "
            "`dnd init-config` writes them out"
        ) from None
    width = encoder_module(config).width
    return resolve_features(
        config.generator,
        (condition.num_prompts, condition.max_text_length, width),
        token_grid(config.generator.target, layout),
    )


def sample_shapes(config: schema.Config, kept: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """What a host gives of a training sample, beside questions: its prompts, and the tokens of its
    LoRA checkpoint, of kept ones the number. Raises InputError as `features_of`."""
    spec, c = spec_of(config), config.train
    if config.condition.in_graph:
        texts = jax.ShapeDtypeStruct(spec.condition_shape[:2], jnp.int32)
        found = {"ids": texts, "valid": texts}
    else:
        found = {"condition": jax.ShapeDtypeStruct(spec.condition_shape, jnp.dtype(c.dtype))}
    of_grid = jax.ShapeDtypeStruct(spec.token_grid, jnp.float32)
    tokens = jax.ShapeDtypeStruct((), jnp.int32) if kept else of_grid
    taught = c.taught_at(c.weights_first)
    return found | {key: tokens for part, key in c.of_loras.items() if part in taught}


def spec_of(config: schema.Config) -> DecoderSpec:
    """The configured decoder as it is trained. Raises InputError as `features_of`."""
    c = config.train
    return DecoderSpec.of(
        config.generator, config.condition, c.dtype, c.remat, features_of(config), c.precision
    )
