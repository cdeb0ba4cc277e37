"""Format numbers: every JSON description that we write says which form it has, and one of another
form is refused by name."""

import os
from collections.abc import Mapping
from typing import Any

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json, write_json

FORMAT = "format"  # the key


def write_numbered(path: str | os.PathLike, number: int, value: Mapping) -> None:
    """Writes a JSON object with its format number, whole or not at all."""
    write_json(path, {FORMAT: number, **value})


def read_numbered(path: str | os.PathLike, newest: int, oldest: int = 0) -> dict[str, Any]:
    """A JSON object of a format from `oldest` to `newest`, with its number; one without a number,
    as the first versions wrote them, has 0.

    Raises InputError naming the file, its number and what this version reads.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object; copy the file again")
    number = raw.get(FORMAT, 0)
    check_format(path, number, newest, oldest)
    return raw | {FORMAT: number}


def check_format(path: str | os.PathLike, number: object, newest: int, oldest: int = 0) -> None:
    """Raises InputError unless this is a format number from `oldest` to `newest`."""
    if isinstance(number, bool) or not isinstance(number, int) or not oldest <= number <= newest:
        reads = f"{oldest} to {newest}" if oldest < newest else f"{newest}"
        raise InputError(
            f"{path}: format {number!r}, this version of dnd reads {reads}; use the version that "
            "wrote it"
        )
