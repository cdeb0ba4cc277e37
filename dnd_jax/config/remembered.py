"""What a run remembers of its settings: WORKDIR/config.json, with which a later stage goes on."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from dnd_jax.config.load import load_file
from dnd_jax.config.records import differences
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import tuples
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json, write_json

FORMAT = 1


def remembered(path: pathlib.Path) -> ml_collections.ConfigDict:
    """The settings that a run remembers; what this version added since takes its
    default.

    Raises InputError for a file of another format, or with settings that there are none of.
    """
    raw = read_json(path)
    if (
        not isinstance(raw, Mapping)
        or raw.get("format") != FORMAT
        or not isinstance(raw.get("config"), Mapping)
    ):
        found = raw.get("format") if isinstance(raw, Mapping) else None
        raise InputError(
            f"{path}: settings of format {found!r}, this version reads {FORMAT}; give --config=FILE"
        )
    config, faults = load_file("configs/default.py"), []
    _update(config, raw["config"], "config", faults)
    if faults:
        raise listed(f"{path}: settings that this version does not have", faults)
    return config


def _update(
    config: ml_collections.ConfigDict, raw: Mapping[str, Any], path: str, faults: list[str]
) -> None:
    for key, value in raw.items():
        if key not in config:
            faults.append(f"{path}.{key}")
        elif isinstance(config[key], ml_collections.ConfigDict) and isinstance(value, Mapping):
            _update(config[key], value, f"{path}.{key}", faults)
        else:
            try:
                config[key] = tuples(value)
            except TypeError:
                faults.append(f"{path}.{key} = {value!r}")


def remember(workdir: pathlib.Path, config: Config) -> None:
    """Writes WORKDIR/config.json, after it has listed on the terminal what differs from the
    settings that were there."""
    path = workdir / paths.CONFIG
    now = {"format": FORMAT, "config": tuples_to_lists(config.to_json())}
    then = read_json(path) if path.is_file() else None
    if isinstance(then, Mapping) and isinstance(then.get("config"), Mapping):
        changed = differences(then["config"], now["config"])
        if changed:
            print(
                f"settings that differ from those {path} remembered (then -> now):",
                *changed.values(),
                sep="\n  ",
                flush=True,
            )
    if then == now:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def tuples_to_lists(value: Any) -> Any:
    """A value as it comes back from JSON."""
    if isinstance(value, Mapping):
        return {key: tuples_to_lists(of) for key, of in value.items()}
    return [tuples_to_lists(of) for of in value] if isinstance(value, tuple | list) else value
