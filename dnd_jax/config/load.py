"""Configuration files: a Python file whose get_config() returns an ml_collections.ConfigDict."""

import importlib.util
import pathlib
import traceback
from typing import Any

import ml_collections

from dnd_jax.core.errors import InputError, nearest

SHIPPED = pathlib.Path(__file__).parents[1] / "configs"


def load_file(path: str) -> ml_collections.ConfigDict:
    """The ConfigDict of a config file (`get_config()`). A relative path is also looked for beside
    the dnd_jax package.

    Raises InputError, with the line where Python names one, for a file that is absent, no Python,
    or fails.
    """
    file = find_file(path)
    if not file.endswith(".py"):
        raise InputError(
            f"{file}: a configuration is a Python file whose name ends in .py, as those of configs/"
        )
    spec = importlib.util.spec_from_file_location("dnd_config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = module.get_config() if hasattr(module, "get_config") else None
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(
            f"{error.filename or file}:{error.lineno or 1}: not Python ({error.msg})"
        ) from None
    except Exception as error:  # whatever the file's own code makes of itself
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == spec.origin
        ]
        raise InputError(
            f"{file}{f':{lines[-1]}' if lines else ''}: {type(error).__name__}: {said(error)}"
        ) from None
    if not isinstance(made, ml_collections.ConfigDict):
        wrong = (
            f"get_config() gives {made!r}"
            if hasattr(module, "get_config")
            else "there is no get_config()"
        )
        raise InputError(
            f"{file}: {wrong}; a configuration defines get_config(), which returns an "
            "ml_collections.ConfigDict"
        )
    return made


def said(error: Exception) -> str:
    """What an error says first and, of a locked ConfigDict's many lines, the nearest key."""
    text: Any = error
    while (
        isinstance(text, Exception) and text.args
    ):  # a ConfigDict wraps its KeyError in an AttributeError
        text = text.args[0]
    first, *more = str(text).split("\n")
    return " ".join(
        [
            first.split(" Other fields present:")[0],
            *(line for line in more if line.startswith("Did you mean")),
        ]
    )


def shipped() -> list[str]:
    """Names of the settings that come with the package, each of which --config takes."""
    names = (path.stem for path in SHIPPED.glob("*.py"))
    return sorted(name for name in names if name not in ("__init__", "default"))


def find_file(path: str) -> str:
    """`path` itself, or the shipped settings of that name: NAME, NAME.py or configs/NAME.py. Raises
    InputError if absent."""
    given = pathlib.Path(path).expanduser()
    if given.is_file():
        return str(given)
    ours = SHIPPED / f"{given.stem}.py"
    if (
        given.parent in (pathlib.Path(), pathlib.Path("configs"))
        and given.suffix in ("", ".py")
        and ours.is_file()
    ):
        return str(ours)
    raise InputError(
        f"{path}: no such config file{nearest(given.stem, shipped())}; shipped settings: "
        f"{', '.join(shipped())}"
    )
