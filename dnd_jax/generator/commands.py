"""The commands of this room."""

import dataclasses

from dnd_jax.config.schema import Config
from dnd_jax.core.packages import TRACKERS, of_models
from dnd_jax.core.stage import (
    ALLOW,
    BASE_NAME,
    DEFAULT,
    NONE,
    ON_SUITE,
    OUT,
    PROCESSES,
    Flag,
    Stage,
)
from dnd_jax.lora.commands import OF_TRAINED_BASE

# Flags of other rooms' stages too.
GENERATOR = Flag("generator", str, "", "a trained or imported generator's folder")
_FILE = 'file of prompts: JSONL or a table with "prompt", or .txt, one a line'
PROMPTS = Flag("prompts", str, "", _FILE)
STRENGTH = Flag("strength", float, 1.0, "of the adapter's effect, folded into its alpha")
KEY_PREFIX = Flag(
    "key-prefix",
    str,
    "",
    "before layers. in the adapters' names, such as model.language_model. for servers of wrapped "
    "bases (default: model.)",
)

TRAINED = (
    *ON_SUITE,
    ALLOW,
    BASE_NAME,
    Flag(
        "profile",
        list,
        [],
        "trace the steps between two numbers, such as 100,110, into WORKDIR/generator/profile",
    ),
    *PROCESSES,
)
GENERATED = (
    GENERATOR,
    dataclasses.replace(PROMPTS, meaning=f"{_FILE}; or a folder of such, NAME.jsonl -> OUT/NAME"),
    OUT,
    BASE_NAME,
    KEY_PREFIX,
    Flag("seed", int, 0, "draws the prompts"),
    Flag("samples", int, 1, "adapters, from as many draws"),
    STRENGTH,
    Flag("dtype", str, "float32", "of the adapter's tensors, float32 or bfloat16"),
    Flag("merge", str, "", "a folder for the whole model, base + adapter, in the base's dtype"),
    dataclasses.replace(OF_TRAINED_BASE, meaning=f"for --merge, {OF_TRAINED_BASE.meaning}"),
    Flag(
        "push-to-hub",
        str,
        "",
        "USER/NAME to upload the adapter (with --merge: the whole model) to, privately",
    ),
    Flag("public", bool, False, "with --push-to-hub: for everybody to see"),
)
PUSHED = (
    Flag("to", str, "", "USER/NAME on the hub, made if there is none, privately"),
    Flag("public", bool, False, "for everybody to see"),
    Flag("out", str, "", "a folder to write instead"),
    Flag("dtype", str, "", "of the parameters, float32 or bfloat16 (default: as they are)"),
)
IMPORTED = (
    OUT,
    Flag(
        "adapter",
        str,
        "",
        "a PEFT adapter of the base (default: by config.base.path and config.lora)",
    ),
)
CONFIGURED = (
    OUT,
    Flag(
        "base", str, "", "its folder, GGUF file or hub id (default: config.base.path)", "base.path"
    ),
    Flag("adapter", str, "", "a PEFT adapter of the base (default: by the base and config.lora)"),
    Flag(
        "budget",
        float,
        0.0,
        "parameters of the decoder, such as 1e9 (default: as the paper's settings spend them)",
    ),
    *(
        Flag(name, kind, kind(), f"{what} (default: config.{setting})", setting)
        for name, kind, what, setting in (
            ("encoder", str, "the text encoder", "condition.encoder"),
            ("num-prompts", int, "prompts an adapter", "condition.num_prompts"),
            ("max-text-length", int, "tokens a prompt", "condition.max_text_length"),
        )
    ),
)


def needs(config: Config) -> tuple[str, ...]:
    """The modules beyond a plain install that training needs."""
    models = of_models(config.base.path if config.train.asks_base else "", config.condition.encoder)
    bucket = ("gcsfs",) if config.train.checkpoint_dir.startswith("gs://") else ()
    return *(TRACKERS[name] for name in config.train.trackers), *models, *bucket


COMMANDS = {
    "train": Stage("generator.train", TRAINED, lambda given: needs(given.config)),
    # The rest of its settings is as the generator was trained.
    "generate": Stage(
        "generator.generate",
        GENERATED,
        settings=DEFAULT,
        reads=("mesh", "condition.too_long"),
    ),
    "push-generator": Stage("generator.push", PUSHED, argument="RUN", settings=NONE),
    "import-generator": Stage(
        "generator.import_released",
        IMPORTED,
        lambda given: ("torch", *of_models(given.config.condition.encoder)),
        argument="X.pth",
        settings=DEFAULT,
    ),
    "export-generator": Stage(
        "generator.export_released", (OUT,), ("torch",), argument="GENERATOR", settings=NONE
    ),
    "init-config": Stage("generator.init_config", CONFIGURED, settings=DEFAULT),
}
