"""JSON-like values -> frozen dataclasses, with every fault in one error."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from dnd_jax.config.schema import Config, _impossible, _whole
from dnd_jax.core.errors import listed


def freeze(config: ml_collections.ConfigDict | Mapping) -> Config:
    """Checks a whole configuration and returns it frozen.

    Raises InputError that lists every unknown key (with the nearest known one), missing key, wrong
    type and impossible value.
    """
    faults: list[str] = []
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    frozen = _freeze(Config, raw, "config", faults)
    if not faults:
        faults = _impossible(frozen)
    if faults:
        raise listed("configuration", faults)
    return frozen


def section(cls: type, raw: Any, path: str):
    """A dataclass of settings from its record, as JSON has it. Raises InputError as `freeze` does,
    naming keys below `path`."""
    faults: list[str] = []
    made = _freeze(cls, raw, path, faults)
    if faults:
        raise listed("settings", faults)
    return made


def _freeze(cls: type, raw: Any, path: str, faults: list[str]):
    if not isinstance(raw, Mapping):
        faults.append(f"{path} = {raw!r} should be a section of settings")
        return None
    types = typing.get_type_hints(cls)
    for key in raw.keys() - types.keys():
        near = difflib.get_close_matches(key, types, n=1)
        faults.append(f"{path}.{key} is unknown" + (f"; did you mean {near[0]}?" if near else ""))
    values = {}
    for key, kind in types.items():
        if key not in raw:
            faults.append(f"{path}.{key} is missing")
        elif dataclasses.is_dataclass(kind):
            values[key] = _freeze(kind, raw[key], f"{path}.{key}", faults)
        else:
            value, plain = raw[key], typing.get_origin(kind) or kind
            if plain is float and _whole(value):
                value = float(value)
            if plain is tuple:
                value = tuples(value)
            of = next(iter(typing.get_args(kind)), None)
            if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
                faults.append(f"{path}.{key} = {value!r} should be {plain.__name__}")
            elif value != value:
                faults.append(f"{path}.{key} = {value!r} is not a number")
            elif of in (int, str) and any(type(entry) is not of for entry in value):
                faults.append(f"{path}.{key} = {value!r} should hold nothing but {of.__name__}")
            values[key] = value
    return (
        cls(**values)
        if len(values) == len(types) and not any(v is None for v in values.values())
        else None
    )


def tuples(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
