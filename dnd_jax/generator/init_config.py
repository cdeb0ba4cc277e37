"""`dnd init-config`: a configuration for a base that configs/ has none for, written as a small diff
over configs/default.py.

    dnd init-config --base=FOLDER_OR_ID --out=configs/NAME.py [--adapter=PEFT] \\
        [--budget=1e9] [--config.lora.rank=16 ...]

The tokens (T, h, w) come from the base's config.json and config.lora, or from an adapter, which
also serves bases that we cannot run. The cascade between condition and tokens follows the
rule of dnd_jax/generator/cascade.py. Besides:

    text longer than 1536 tokens is first squeezed to 1000 by a length projection
    w    the greatest common divisor of all dimensions; chunks of 128 with padding where large ones
         share less than 32
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import textwrap
from collections.abc import Iterator, Mapping

import jax

from dnd_jax.base.known import base_sizes
from dnd_jax.config.load import DEFAULTS, load_file
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.files import replacing
from dnd_jax.core.stage import Given
from dnd_jax.generator.cascade import cascade
from dnd_jax.generator.model import Generator, param_shapes
from dnd_jax.generator.sizes import encoder_module, spec_of
from dnd_jax.lora.fit import check_fits
from dnd_jax.lora.layout import MODULE_ORDER, LoraLayout
from dnd_jax.lora.peft_settings import load_adapter_config, read_fields, read_shapes
from dnd_jax.lora.targets import token_grid

LONGEST_TEXT, SQUEEZED = 1536, 1000  # tokens without a length projection; tokens after one
# Where a base's dimensions are LARGE and share less than LEAST_WIDTH, w is PADDED_WIDTH.
LEAST_WIDTH, LARGE, PADDED_WIDTH = 32, 1024, 128
TOPOLOGY = "v5p:2x2x4"  # of the plan proposed next
LINE = 132


def _chunk_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """w where the dimensions of a large base share next to nothing; 0 for the layout's own
    choice."""
    lengths = [shape[1 if ".lora_A." in key else 0] for key, shape in shapes.items()]
    return PADDED_WIDTH if math.gcd(*lengths) < LEAST_WIDTH and max(lengths) >= LARGE else 0


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Whose LoRA it is: its layout, the settings that hold it, a sentence on where such LoRAs come
    from, and why the sizes are the adapter's alone, if they are."""

    layout: LoraLayout
    config: Config
    origin: str
    problem: str = ""


def find_tokens(config: Config, base: str, adapter: str) -> Tokens:
    """The layout of the base's LoRA: by config.lora, or that of a PEFT adapter.

    With an adapter a base that is not supported, or not at hand, will do. Raises InputError listing
    where base and adapter differ.
    """
    lora = config.lora
    shapes, problem = None, ""
    if adapter:
        shapes, settings = read_shapes(adapter), load_adapter_config(adapter)
        fields = read_fields(adapter)
        LoraLayout.from_shapes(shapes)  # names whatever is no LoRA
        base, lora = (
            base or settings.base,
            dataclasses.replace(lora, rank=settings.rank, alpha=settings.alpha),
        )
        if not base:
            raise InputError(
                f"{adapter}: names no base (base_model_name_or_path); give --base=FOLDER_OR_ID"
            )
    try:
        lm = base_sizes(base)
    except InputError as error:
        if not adapter:
            raise InputError(
                f"{error}; or give an adapter of it here, --adapter=FOLDER, to take the sizes from"
            ) from None
        lm, problem = None, str(error)
    collected = True
    if adapter:
        names = {key.rsplit(".", 3)[1] for key in shapes}
        collected = (
            lm is not None
            and names <= set(MODULE_ORDER)
            and shapes == lm.lora_shapes(lora.rank, tuple(names))
        )
        check_fits(shapes, fields, base, f"{adapter}: not an adapter of {base}")
        if names <= set(MODULE_ORDER):
            lora = dataclasses.replace(
                lora, targets=tuple(name for name in MODULE_ORDER if name in names)
            )
    else:
        shapes = lm.lora_shapes(lora.rank, lora.targets)
    if problem:
        origin = "made elsewhere: sizes are those of the adapter alone."
    else:
        origin = (
            "`dnd collect` makes them."
            if collected
            else "made elsewhere: `dnd collect` adapts whole layers."
        )
    width = config.generator.chunk_width or _chunk_width(shapes)
    config = dataclasses.replace(
        config,
        # The file may be used elsewhere, where a relative path reads as a hub id.
        base=dataclasses.replace(
            config.base, path=os.path.abspath(base) if os.path.isdir(base) else base
        ),
        lora=lora,
        generator=dataclasses.replace(config.generator, chunk_width=width),
    )
    return Tokens(LoraLayout.from_shapes(shapes, width or None), config, origin, problem)


def settle(config: Config, layout: LoraLayout, budget: float = 0) -> Config:
    """The configuration with stages, kernel size and length projection for a layout's tokens,
    computing in bfloat16."""
    c, g, default = config.condition, config.generator, freeze(load_file(DEFAULTS))
    projection = g.length_projection or ("camera_ready" if c.max_text_length > LONGEST_TEXT else "")
    length = min(SQUEEZED, c.max_text_length) if projection else c.max_text_length
    grid = token_grid(g.target, layout)
    given = g.kernel_size if g.kernel_size != default.generator.kernel_size else 0
    features, kernel_size = cascade(
        (c.num_prompts, length, encoder_module(config).width), grid, budget, given
    )
    generator = dataclasses.replace(
        g, features=features, kernel_size=kernel_size, length_projection=projection
    )
    return dataclasses.replace(
        config, generator=generator, train=dataclasses.replace(config.train, dtype="bfloat16")
    )


def decoder_parameters(config: Config) -> int:
    """Parameters of the configured decoder, counted by shape evaluation of the real module."""
    shapes = param_shapes(Generator(spec_of(config)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["decoder"]))


def _literal(value: object) -> str:
    """Python's notation, with the double quotes of the other configurations."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _assignments(config: Config) -> Iterator[str]:
    """The lines that turn the default configuration into this one."""
    default = freeze(load_file(DEFAULTS))
    for field in dataclasses.fields(Config):
        section, ours, theirs = (
            field.name,
            getattr(config, field.name),
            getattr(default, field.name),
        )
        if not dataclasses.is_dataclass(ours):
            if ours != theirs:
                yield f"config.{section} = {_literal(ours)}"
            continue
        keys = [
            f.name
            for f in dataclasses.fields(ours)
            if getattr(ours, f.name) != getattr(theirs, f.name)
        ]
        changes = {key: _literal(getattr(ours, key)) for key in keys if key != "features"}
        given = ", ".join(f"{key}={value}" for key, value in changes.items())
        update = f"config.{section}.update({given})"
        if len(changes) > 1 and len(update) <= LINE - 4:
            yield update
        else:
            yield from (f"config.{section}.{key} = {value}" for key, value in changes.items())
        if "features" in keys:
            yield f"config.{section}.features = ("
            yield from (f"    {stage}," for stage in ours.features)
            yield ")"


def _docstring(tokens: Tokens, config: Config, out: str, parameters: int) -> str:
    layout, g, c = tokens.layout, config.generator, config.condition
    grid = g.features[-1]
    modules = ", ".join(dict.fromkeys(module.rsplit(".", 1)[-1] for module in layout.modules))
    # What a name or path may hold must not end the string or be read as an escape: configurations
    # are executed.
    plain = lambda text: " ".join(text.replace("\\", "/").replace('"', "'").split())
    paragraph = lambda text: textwrap.fill(
        plain(text), LINE - 4, break_long_words=False, break_on_hyphens=False
    )
    tera = 2 * spec_of(config).forward_macs / 1e12
    return "\n".join(
        (
            f"LoRAs of {plain(config.base.path)} from {c.num_prompts} prompts of "
            f"{c.max_text_length} tokens, by `dnd init-config`.",
            "",
            f"    dnd plan --config={plain(shlex.quote(out))} --topology={TOPOLOGY}",
            f"    dnd train --config={plain(shlex.quote(out))} --suite=SUITE --workdir=RUN "
            "--config.train.checkpoints=LORAS",
            "",
            paragraph(
                f"LORAS holds DATASET/*/ PEFT folders of rank {layout.rank} on {modules}; "
                f"{tokens.origin}"
            ),
            paragraph(
                f"{grid[0]} tokens of {grid[1]} x {grid[2]}; a generator of "
                f"{parameters / 1e6:.1f}M parameters; {tera:.3g} TFLOP a "
                f"sample forward by the direct method; {config.train.steps} steps of "
                f"{config.train.batch_size}."
            ),
        )
    )


def init_config(
    config: Config, out: str | os.PathLike, base: str = "", adapter: str = "", budget: float = 0
) -> str:
    """Writes OUT, a configuration that `--config=OUT` loads; returns a line that says what it is
    and what to do next.

    config: settings to keep, of which those that differ from the defaults are written. The file is
    loaded again, compared and its decoder counted before it takes its name. Raises InputError for a
    base or adapter that says too little, or an OUT that exists.
    """
    path = pathlib.Path(out)
    if path.suffix != ".py":
        raise InputError(f"--out={out}: a configuration is a Python file; end its name in .py")
    if path.exists():
        raise InputError(f"{path}: exists already; choose another --out")
    if not base and not adapter:
        raise InputError("--base (a folder or hub id) or --adapter (a PEFT folder) is needed")
    if budget < 0:
        raise InputError(f"--budget={budget:g}: parameters of the decoder, such as 1e9")
    tokens = find_tokens(config, base, adapter)
    config = settle(tokens.config, tokens.layout, budget)
    g = config.generator
    parameters = spec_of(config).num_parameters
    lines = "\n    ".join(("config = default.get_config()", *_assignments(config), "return config"))
    text = (
        f'"""{_docstring(tokens, config, os.fspath(out), parameters)}\n"""\n\nfrom '
        "dnd_jax.configs import default\n\n\n"
        'def get_config():\n    """default.py with the sizes of this base, its tokens and its '
        f'decoder."""\n    {lines}\n'
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        written = freeze(load_file(str(temporary)))
        if written != config or decoder_parameters(written) != parameters:
            raise CheckFailed(
                f"{path}: read back, it is another configuration; nothing was written"
            )
    count, height, width = g.features[-1]
    of = f" of a budget of {budget / 1e6:.1f}M" if budget else ""
    alone = f" (sizes of the adapter alone: {tokens.problem})" if tokens.problem else ""
    return (
        f"{path}{alone}: {count} tokens of {height} x {width}, {len(g.features) - 1} stages, "
        f"kernel {g.kernel_size}, a decoder of "
        f"{parameters / 1e6:.1f}M parameters{of}; next: dnd plan "
        f"--config={shlex.quote(os.fspath(out))} --topology={TOPOLOGY}"
    )


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("out")
    asked = {
        "encoder": given["encoder"],
        "num_prompts": given["num-prompts"],
        "max_text_length": given["max-text-length"],
    }
    condition = dataclasses.replace(
        given.config.condition, **{key: value for key, value in asked.items() if value}
    )
    config = dataclasses.replace(given.config, condition=condition)
    base = given["base"] or config.base.path
    print(init_config(config, given["out"], base, given["adapter"], given["budget"]))
