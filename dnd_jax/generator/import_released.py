"""Stage `import-generator`: a generator of the original PyTorch release (.pth) -> a generator
folder like those of `dnd train`.

dnd import-generator X.pth --out=DIR --adapter=PEFT_FOLDER
"""

import dataclasses
import os
import pathlib

import numpy as np

from dnd_jax.base.identity import base_name, one_name
from dnd_jax.base.known import base_sizes
from dnd_jax.config.schema import Config, Features
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import check_free
from dnd_jax.core.stage import Given
from dnd_jax.encoders.cache import PromptEncoder
from dnd_jax.generator.folder import DESCRIPTION, write_generator
from dnd_jax.generator.released import CRITERION_WEIGHT, FIRST, architecture, mapped
from dnd_jax.generator.state_dict import read_state_dict
from dnd_jax.lora.fit import check_fits
from dnd_jax.lora.layout import SCALE_CELLS, LoraLayout
from dnd_jax.lora.peft_settings import (
    AdapterConfig,
    load_adapter_config,
    read_fields,
    read_shapes,
)


def _adapter_layout(
    config: Config, features: Features, adapter: str | os.PathLike
) -> tuple[LoraLayout, AdapterConfig]:
    """The token layout and the adapter settings of a base: from one of its PEFT adapters, or
    (adapter empty) from the base's config.json with config.lora's rank, alpha and targets.

    features: (T, r + 2, w + 2) of the generator's tokens. Raises InputError when the layout does
    not give exactly these.
    """
    width = features[2] - SCALE_CELLS
    if adapter:
        source, shapes = os.fspath(adapter), read_shapes(adapter)
        settings = load_adapter_config(adapter)
        LoraLayout.from_shapes(shapes)  # names whatever is no LoRA
        base = one_name({settings.base: adapter}, config.base.path or None)
        check_fits(shapes, read_fields(adapter), base, f"{adapter}: not an adapter of {base}")
        revision = settings.revision if base == settings.base else ""
        settings = dataclasses.replace(settings, base=base, revision=revision)
    else:
        c, source = (
            config.lora,
            f"{config.base.path} with rank {config.lora.rank} on {', '.join(config.lora.targets)}",
        )
        shapes = base_sizes(config.base.path).lora_shapes(c.rank, c.targets)
        named = base_name(config.base.path)
        settings = AdapterConfig(named, c.rank, c.alpha, tuple(sorted(c.targets)))
    layout = LoraLayout.from_shapes(shapes, width if width > 0 else None)
    if (layout.num_tokens, *layout.token_shape) != features:
        made = (
            f"{features[0]} of {features[1:]} (rank {features[1] - SCALE_CELLS}, chunks of {width})"
        )
        raise InputError(
            f"{source}: a LoRA like this has {layout.num_tokens} tokens of {layout.token_shape}, "
            f"the generator makes {made}; "
            "give an adapter of the base, the rank and the modules that it was trained for"
        )
    return layout, settings


def import_generator(
    path: str | os.PathLike, out: str | os.PathLike, config: Config, adapter: str | os.PathLike = ""
) -> pathlib.Path:
    """A released .pth file -> a generator folder like those of `dnd train`; returns it. One tensor
    is held at a time.

    adapter: a PEFT adapter of the base that the generator was trained for, which gives names and
    order of the tokens; empty: they come from config.base.path's config.json and config.lora.
    config.condition.encoder is the text encoder; config.generator.length_projection says which
    version a length projection is, because both have the same shapes. Raises InputError for what is
    no generator, or does not fit the adapter or the encoder.
    """
    out, source = pathlib.Path(out), os.fspath(path)
    if (out / DESCRIPTION).exists():
        raise InputError(f"{out}: already holds a generator; choose another --out")
    check_free(out, "out")  # files of a model there may have the same names
    state = read_state_dict(path, FIRST)
    found = architecture(state, source)
    projection = config.generator.length_projection
    if found.text_length and not projection:
        raise InputError(
            f"{source}: holds a length projection {found.text_length} -> {found.features[0][1]}, "
            "released in two versions of the "
            "same shapes; say which: --config.generator.length_projection=camera_ready or "
            "first_release"
        )
    if projection and not found.text_length:
        raise InputError(
            f"{source}: holds no length projection; leave out "
            f"--config.generator.length_projection={projection}"
        )
    spec = dataclasses.replace(found, length_projection=projection)
    tensors = mapped(state, spec, source)
    num_prompts, text_length, width = spec.condition_shape
    layout, settings = _adapter_layout(config, spec.token_grid, adapter)
    importance = np.asarray(
        state.get(CRITERION_WEIGHT, np.ones(layout.num_tokens)), np.float32
    ).reshape(-1)
    if importance.size != layout.num_tokens:
        raise InputError(
            f"{source}: {CRITERION_WEIGHT} has {importance.size} values for {layout.num_tokens} "
            "tokens"
        )

    condition = dataclasses.replace(
        config.condition,
        num_prompts=num_prompts,
        max_text_length=text_length,
        in_graph=False,
    )
    encoder = PromptEncoder(condition)
    if encoder.width != width:
        raise InputError(
            f"{condition.encoder}: embeddings are {encoder.width} wide, the generator takes "
            f"{width}; "
            "set --config.condition.encoder to the encoder that it was trained with"
        )
    generator = dataclasses.replace(
        config.generator,
        features=found.features,
        kernel_size=found.kernel_size,
        target="chunk",
        chunk_width=layout.chunk_width,
        importance=True,
    )
    digest = digests.of_file(path)
    write_generator(
        out,
        {key: (value.shape, value.dtype) for key, value in tensors.items()},
        ((key, np.ascontiguousarray(value)) for key, value in tensors.items()),
        {"importance": importance},
        {
            "settings": {
                "seed": config.seed,
                "condition": dataclasses.asdict(condition),
                "generator": dataclasses.asdict(generator),
                "train": dataclasses.asdict(config.train),
                "suite": f"imported from {pathlib.Path(path).name} (sha256 {digest})",
            },
            "features": found.features,
            "layout": layout.to_json(),
            "adapter": settings.to_json(),
            "encoder_fingerprint": encoder.fingerprint,
            "encoder_revision": encoder.revision,
        },
    )
    return out


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("out")
    folder = import_generator(given.argument, given["out"], given.config, given["adapter"])
    print(f"generator: {folder.absolute()}")
