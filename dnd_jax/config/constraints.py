"""What a setting may be beside its type: stands in the field's annotation, read by validate.py.

steps: Annotated[int, AT_LEAST_1]
pairing: Annotated[str, one_of("random", "fixed")]
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Must:
    """A value must hold; `what` ends the sentence "KEY = VALUE ..." where it does not."""

    holds: Callable[[Any], bool]
    what: str

    def faults(self, value: Any) -> list[str]:
        """What follows the key's name in a message, for each fault of a value."""
        return [] if self.holds(value) else [f" = {value!r} {self.what}"]


AT_LEAST_1 = Must(lambda n: n >= 1, "must be at least 1")
ABOVE_0 = Must(lambda x: x > 0, "must be above 0")
NOT_NEGATIVE = Must(lambda x: x >= 0, "must not be negative")
# Of a text that may be a path, empty for none: its leading ~ is replaced before this is asked.
PATH = Must(
    lambda path: not path.startswith("~") and "\0" not in path,
    "begins with a home folder that does not exist, or holds a NUL character",
)
ODD = Must(lambda n: n >= 1 and n % 2 == 1, "must be odd")

Positive = Annotated[int, AT_LEAST_1]
Count = Annotated[int, NOT_NEGATIVE]
Rate = Annotated[float, ABOVE_0]
Amount = Annotated[float, NOT_NEGATIVE]
Below1 = Annotated[float, Must(lambda x: 0 <= x < 1, "must lie in 0 to below 1")]
Path = Annotated[str, PATH]


def wholes(value: Any, *lengths: int) -> bool:
    """Whether a value is a tuple of so many whole numbers."""
    return isinstance(value, tuple) and len(value) in lengths and all(type(n) is int for n in value)


def one_of(*names: str) -> Must:
    """One of these texts."""
    return Must(lambda value: value in names, f"is none of {names}")


def some_of(*names: str) -> Must:
    """A tuple of none but these texts."""
    return Must(lambda values: set(values) <= set(names), f"has more than {names}")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Sharding rules ((pattern, (axis, ...)), ...) over these axes; several: a tuple of such
    lists."""

    axes: tuple[str, ...]
    several: bool = False

    def faults(self, value: Any) -> list[str]:
        """What follows the key's name in a message, for each fault of a value."""
        lists = value if self.several else (value,)
        rules = [rule for of in lists for rule in (of if isinstance(of, tuple) else (of,))]
        return [f": {fault}" for rule in rules for fault in self._of(rule)]

    def _of(self, rule: Any) -> list[str]:
        """What is wrong with one rule."""
        match rule:
            case (str() as pattern, tuple() as entries):
                faults = []
            case _:
                return [f"{rule!r} is not (pattern, (axis, ...))"]
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"{pattern!r} is no regular expression ({error})")
        named = [
            axis
            for entry in entries
            for axis in (entry if isinstance(entry, tuple) else (entry,))
            if axis is not None
        ]
        if any(axis not in self.axes for axis in named) or len(set(named)) < len(named):
            faults.append(f"{rule!r} should name axes of {self.axes}, each once, or None")
        return faults
