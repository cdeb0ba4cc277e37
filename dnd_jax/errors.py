"""The one exception for bad input: a single clear line naming the file, the key and the fix.

`dnd` prints it as `dnd: ...` and exits with status 2; library callers catch it.
"""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and how to mend it."""


def listed(title: str, faults: list[str], most: int = 20) -> InputError:
    """One `InputError` that names every fault (the first `most` in full)."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return InputError(f"{title}: " + "; ".join(faults[:most]) + more)


class NothingFits(InputError):
    """No plan fits its devices: exit status 1, with the nearest miss and what would make it fit."""
