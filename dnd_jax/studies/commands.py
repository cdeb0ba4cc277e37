"""The commands of this room."""

from dnd_jax.config.schema import Config
from dnd_jax.core import packages
from dnd_jax.core.stage import (
    ALLOW,
    BASE_NAME,
    DEFAULT,
    ON_SUITE,
    SEEDS,
    SUITE,
    WORKDIR,
    Flag,
    Stage,
)
from dnd_jax.generator.commands import GENERATOR
from dnd_jax.generator.commands import needs as training_needs
from dnd_jax.scoring.commands import REMEASURE
from dnd_jax.scoring.commands import needs as evaluation_needs

# Its variants, which it has to make, say what it needs.
ablate = packages.deferred("dnd_jax.studies.ablate")

SHARE = Flag("share", bool, False, "the first seed's suite, base, LoRAs, controls serve all")
EXAMINED = (
    WORKDIR,
    SUITE,
    Flag(
        "base",
        str,
        "",
        "the base's folder, GGUF file or hub id (default: config.base.path, or the run's)",
        "base.path",
    ),
    Flag(
        "checkpoints",
        str,
        "",
        "folder of LoRA checkpoints, a folder for each dataset",
        "train.checkpoints",
    ),
    GENERATOR,
)
MEASURED = (
    WORKDIR,
    GENERATOR,
    Flag("prompts", str, "", "the task's JSONL: prompts with their responses"),
    Flag("base", str, "", "its folder, GGUF file or hub id (default: the one the generator names)"),
    Flag("limit", int, 0, "steps of tuning that are timed; 0: all"),
)


def needs(config: Config) -> tuple[str, ...]:
    """The modules beyond a plain install that any stage of the pipeline needs."""
    return (*evaluation_needs(config), *training_needs(config))


COMMANDS = {
    "quickstart": Stage(
        "studies.quickstart",
        (*ON_SUITE, SEEDS, SHARE, ALLOW, BASE_NAME, REMEASURE),
        lambda given: needs(given.config),
        fallback="mini",
        writes=True,
    ),
    "data-report": Stage("studies.data_report", ON_SUITE, settings=DEFAULT),
    "ablate": Stage(
        "studies.ablate",
        (*ON_SUITE, SEEDS, ALLOW),
        lambda given: ablate.needs(given),
        writes=True,
    ),
    "doctor": Stage("studies.doctor", EXAMINED, settings=DEFAULT),
    "overhead": Stage("studies.overhead", MEASURED, settings=DEFAULT),
}
