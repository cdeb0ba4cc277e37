"""JSON-like values -> frozen dataclasses, with every fault in one error: settings, records of them,
and the JSON objects of others."""

import contextlib
import dataclasses
import functools
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections

from dnd_jax.config.constraints import PATH
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import listed, nearest

T = TypeVar("T")
LARGEST = 2**63 - 1  # of a whole number: arrays hold no larger one


def freeze(config: ml_collections.ConfigDict | Mapping) -> Config:
    """Checks a whole configuration and returns it frozen.

    Raises InputError that lists every unknown key (with the nearest known one), missing key, wrong
    type and impossible value.
    """
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return _read(Config, raw, "config", "configuration")


def section(cls: type[T], raw: Any, path: str) -> T:
    """A dataclass of settings from its record, as JSON has it. Raises InputError as `freeze` does,
    naming keys below `path`."""
    return _read(cls, raw, path, "settings")


def fields_of(cls: type[T], raw: Any, file: str | os.PathLike) -> T:
    """The dataclass `cls` from another program's JSON object: keys that it has no field for are
    passed over, null is an absent key. Raises InputError that lists what is missing or of another
    type."""
    return _read(cls, raw, "", str(file), foreign=True)


def tuples(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    if isinstance(value, Mapping):
        return {key: tuples(of) for key, of in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def _read(cls: type[T], raw: Any, path: str, title: str, foreign: bool = False) -> T:
    reader = _Reader(foreign)
    made = reader.section(cls, raw, path)
    if reader.faults:
        raise listed(title, reader.faults)
    return made


@dataclasses.dataclass
class _Reader:
    """Reads values by the annotations of dataclasses, and collects what is wrong with them."""

    foreign: bool
    faults: list[str] = dataclasses.field(default_factory=list)

    def section(self, cls: type, raw: Any, path: str) -> Any:
        """A dataclass; None where something is wrong with it."""
        if not isinstance(raw, Mapping):
            self.faults.append(f"{path} = {raw!r} should be a section of settings")
            return None
        kinds, optional, before = _kinds(cls), _optional(cls), len(self.faults)
        if self.foreign:
            raw = {key: value for key, value in raw.items() if key in kinds and value is not None}
        for key in (key for key in raw if key not in kinds):
            self.faults.append(f"{_join(path, key)} is unknown{nearest(str(key), kinds)}")
        values = {}
        for key, kind in kinds.items():
            if key in raw:
                values[key] = self.value(kind, raw[key], _join(path, key))
            elif key not in optional:
                self.faults.append(f"{_join(path, key)} is missing")
        if len(self.faults) > before:
            return None
        made = cls(**values)
        if hasattr(made, "faults"):  # what its fields must be together
            self.faults += [_join(path, fault) for fault in made.faults()]
        return made

    def value(self, kind: Any, raw: Any, path: str) -> Any:
        """A value of the kind that a field is annotated with."""
        if dataclasses.is_dataclass(kind):
            return raw if isinstance(raw, kind) else self.section(kind, raw, path)
        if isinstance(kind, types.UnionType):  # KIND | None
            return None if raw is None else self.value(typing.get_args(kind)[0], raw, path)
        if typing.get_origin(kind) is not typing.Annotated:
            return self._plain(kind, raw, path)
        before = len(self.faults)
        kind, *constraints = typing.get_args(kind)
        value = self._plain(kind, raw, path)
        if len(self.faults) == before and PATH in constraints:
            value = os.path.expanduser(value)
        if len(self.faults) == before:
            self.faults += [
                f"{path}{fault}" for must in constraints for fault in must.faults(value)
            ]
        return value

    def _plain(self, kind: Any, raw: Any, path: str) -> Any:
        """A number, text or truth, or a tuple; of a tuple's parts, whole numbers and texts only are
        looked at."""
        plain, of = typing.get_origin(kind) or kind, next(iter(typing.get_args(kind)), None)
        value = raw
        if plain is float and type(raw) is int:
            with contextlib.suppress(OverflowError):
                value = float(raw)
        if plain is tuple:
            value = tuples(raw)
        if isinstance(value, int) and abs(value) > LARGEST:
            self.faults.append(f"{path} is a number of {value.bit_length()} bits; at most 63")
        elif not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
            self.faults.append(f"{path} = {value!r} should be {plain.__name__}")
        elif value != value:
            self.faults.append(f"{path} = {value!r} is not a number")
        elif of in (int, str) and any(type(part) is not of for part in value):
            self.faults.append(f"{path} = {value!r} should hold nothing but {of.__name__}")
        return value


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def _optional(cls: type) -> set[str]:
    """The fields that have a default."""
    absent = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is not absent or field.default_factory is not absent
    }
