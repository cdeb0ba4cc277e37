"""The exception for bad input: a single clear line naming the file, the key and the fix; and the
one for a check that fails.

`dnd` prints either as `dnd: ...` and exits with status 2 or 1; library callers catch them.
"""

import difflib
import errno
import sys
from collections.abc import Iterable

LONGEST = 3000  # characters of a message
PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "EAGAIN", "EBUSY", "EINTR", "ENETDOWN", "ENETUNREACH")
    + ("EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO")
    if hasattr(errno, name)  # some systems lack some
}


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and how to mend it."""


class Missing(InputError):
    """A process of the run did not come in time: the same command may do better."""


class NoRoom(InputError):
    """A device, or the machine, has no room for what was asked."""


class Lost(Exception):
    """Another run has this one's folder: nothing more may be written there."""


class CheckFailed(Exception):
    """What was to be proved is not so; the message says in numbers why."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean NAME?" of the known word that looks most like this one; nothing when none
    does."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """What an error says first; its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tell(what: object) -> None:
    """Prints why `dnd` ends, as one line on stderr: what is no printable character as its escape,
    and of a long line, which quotes a long value, the beginning and the end."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(what))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"dnd: {line}", file=sys.stderr)


def is_no_room(error: BaseException) -> bool:
    """Whether there was no room in memory, in the words of JAX, PyTorch, Python or our own."""
    return (
        isinstance(error, NoRoom | MemoryError)
        or "RESOURCE_EXHAUSTED" in str(error)
        or "can't allocate memory" in str(error)
        or type(error).__name__ == "OutOfMemoryError"
    )


def is_passing(error: BaseException) -> bool:
    """Whether a disk or a network failed, which may soon be well again."""
    return isinstance(error, OSError) and (
        isinstance(error, ConnectionError | TimeoutError) or error.errno in PASSING
    )


def listed(title: str, faults: list[str], most: int = 20) -> InputError:
    """One `InputError` that names every fault (the first `most` in full)."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return InputError(f"{title}: " + "; ".join(faults[:most]) + more)
