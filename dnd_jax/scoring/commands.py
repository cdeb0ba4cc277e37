"""The commands of this room."""

from dnd_jax.config.schema import Config
from dnd_jax.core.packages import of_models
from dnd_jax.core.stage import ALLOW, ON_SUITE, Flag, Given, Stage

REMEASURE = Flag("remeasure", bool, False, "measure agreement and overhead again where that failed")
HARNESS = (
    Flag("tasks", list, [], "NAME (an unseen dataset's questions), NAME:TASK or NAME:TASK@DATA"),
    Flag("limit", int, 0, "questions a task; 0: all"),
    Flag("unsafe-code", bool, False, "allow tasks that run what a model wrote"),
)


def needs(config: Config) -> tuple[str, ...]:
    """The modules beyond a plain install that scoring and its report need."""
    torch = () if config.evaluate.engine else ("torch", "peft")
    return (*torch, "matplotlib", *of_models(config.base.path, config.condition.encoder))


def _harness(given: Given) -> tuple[str, ...]:
    models = of_models(given.config.base.path, given.config.condition.encoder)
    return ("torch", "peft", "lm_eval", *models)


COMMANDS = {
    "evaluate": Stage(
        "scoring.evaluate",
        (*ON_SUITE, ALLOW, REMEASURE),
        lambda given: needs(given.config),
        writes=True,
    ),
    "lm-eval": Stage("scoring.lm_eval", (*ON_SUITE, ALLOW, *HARNESS), _harness, writes=True),
}
