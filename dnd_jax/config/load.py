"""Where settings come from: a Python file whose get_config() returns an ml_collections.ConfigDict,
or a run's config.json."""

import importlib.util
import os
import pathlib
import traceback
from collections.abc import Mapping
from typing import Any

import ml_collections

from dnd_jax.config.validate import tuples
from dnd_jax.core.errors import InputError, listed, nearest
from dnd_jax.core.files import read_json

SHIPPED = pathlib.Path(__file__).parents[1] / "configs"
DEFAULTS = "default"  # the shipped settings that hold every default
FORMAT = 1  # of config.json
_NONE = object()


def load_file(path: str) -> ml_collections.ConfigDict:
    """The settings of a Python file (its `get_config()`), of a run's config.json, or shipped ones
    by their name.

    Raises InputError, with the line where Python names one, for a file that is absent, neither of
    these, or fails.
    """
    file = find_file(path)
    if file.endswith(".json"):
        return _remembered(file)
    if not file.endswith(".py"):
        raise InputError(
            f"{file}: a configuration is a Python file whose name ends in .py, as those of configs/"
        )
    made = _run(file)
    if not isinstance(made, ml_collections.ConfigDict):
        wrong = "there is no get_config()" if made is _NONE else f"get_config() gives {made!r}"
        raise InputError(
            f"{file}: {wrong}; a configuration defines get_config(), which returns an "
            "ml_collections.ConfigDict"
        )
    return made


def _run(file: str) -> Any:
    """What a Python file's get_config() returns; _NONE where it defines none."""
    spec = importlib.util.spec_from_file_location("dnd_config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        # Compiled anew: Python's cache goes by size and seconds, which copies and archives keep.
        exec(spec.loader.source_to_code(spec.loader.get_data(file), file), vars(module))
        return module.get_config() if hasattr(module, "get_config") else _NONE
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(
            f"{error.filename or file}:{error.lineno or 1}: not Python ({error.msg})"
        ) from None
    except (Exception, SystemExit) as error:  # whatever the file's own code makes of itself
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        raise InputError(
            f"{file}{f':{lines[-1]}' if lines else ''}: {type(error).__name__}: {said(error)}"
        ) from None


def _remembered(file: str) -> ml_collections.ConfigDict:
    """The settings of a run's config.json; what this version added since takes its default.

    Raises InputError for another format, or settings that there are none of.
    """
    raw = read_json(file)
    found = raw.get("format") if isinstance(raw, Mapping) else None
    if found != FORMAT or not isinstance(raw.get("config"), Mapping):
        raise InputError(
            f"{file}: settings of format {found!r}, this version reads {FORMAT}; give --config=FILE"
        )
    config, faults = load_file(DEFAULTS), []
    _update(config, raw["config"], "config", faults)
    if faults:
        raise listed(f"{file}: not this version's settings (give --config=FILE)", faults)
    return config


def _update(
    config: ml_collections.ConfigDict, raw: Mapping[str, Any], path: str, faults: list[str]
) -> None:
    """Puts remembered values into the settings, section by section."""
    for key, value in raw.items():
        name = f"{path}.{key}"
        if key not in config:
            faults.append(f"{name} is unknown{nearest(key, config)}")
        elif isinstance(config[key], ml_collections.ConfigDict) and isinstance(value, Mapping):
            _update(config[key], value, name, faults)
        else:
            try:
                config[key] = tuples(value)
            except TypeError:
                faults.append(f"{name} = {value!r} should be {type(config[key]).__name__}")


def said(error: Exception) -> str:
    """What an error says first and, of a locked ConfigDict's many lines, the nearest key."""
    text: Any = error
    while isinstance(text, Exception) and text.args:  # a KeyError inside an AttributeError
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
    given = pathlib.Path(os.path.expanduser(path))
    ours = SHIPPED / f"{given.stem}.py"
    named = given.suffix in ("", ".py") and given.parent in (
        pathlib.Path(),
        pathlib.Path("configs"),
    )
    if given.is_file() and not (named and ours.is_file() and not given.suffix):
        return str(given)  # beside a file of ours, a name without .py means ours
    if named and ours.is_file():
        return str(ours)
    raise InputError(
        f"{path}: no such config file{nearest(given.stem, shipped())}; shipped settings: "
        f"{', '.join(shipped())}"
    )
