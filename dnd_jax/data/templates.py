"""Text from a row: the columns and Jinja templates of a column map.

What has no text of its own never becomes a word: null, NaN, lists, objects, dates, bytes, a whole
number that a table holds as 3.0 and, in a template, truth values. A template sees such values as
they are (`{% if flag %}`, `{{ n + 1 }}`, `{{ input or "" }}`), but to print or join one is an
error. `{{ input or "" }}` asks for an empty text.
"""

import decimal
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes

from dnd_jax.core.errors import InputError

MOST_NAMED = 20  # columns in a message
Reader = Callable[[Mapping], object]  # a row -> what a field has of it


class NoText(Exception):
    """A value has no text of its own; the message says what a template can do.

    No ValueError or TypeError: some of Jinja's filters pass over those.
    """


def missing(value: object) -> bool:
    """Whether a value says that there is none: null, or a table's NaN, NaT or NA."""
    if isinstance(value, float | decimal.Decimal):
        return value != value
    return value is None or value is NOTHING or type(value).__name__ in ("NaTType", "NAType")


def said(value: object) -> Any:
    """The value, which is a text or a number that has one. Raises NoText for any other."""
    if isinstance(value, str | jinja2.Undefined):  # an undefined one says so itself
        return value
    if missing(value):
        raise NoText('a value is missing; {{ column or "" }} asks for an empty text')
    if isinstance(value, bool | _Truth):
        raise NoText('a truth value is no text; {{ "yes" if column else "no" }} says it')
    if isinstance(value, float) and (value.is_integer() or math.isinf(value)):
        raise NoText(
            f"{float(value)} may stand for a whole number; {{{{ column|int }}}} or "
            '{{ "%.1f"|format(column) }} says which is meant'
        )
    if isinstance(value, int | float | decimal.Decimal):
        return value
    if isinstance(value, list | tuple):
        raise NoText('a list is no text; {{ column|join(", ") }} is one')
    if isinstance(value, Mapping):
        raise NoText("an object is no text; {{ column.key }} is a value of it")
    if isinstance(value, bytes):
        raise NoText("bytes are no text; {{ column.decode() }} is the text of UTF-8")
    raise NoText(f"a {type(value).__name__} is no text")


class _Mute:
    """A value that a template may look at and not print."""

    def __str__(self) -> str:
        return str(said(self))

    def __repr__(self) -> str:  # of what holds it
        return str(said(self))

    def __format__(self, how: str) -> str:
        return str(said(self))


class _Nothing(_Mute):
    """null: false, equal to none, and an error in any other use."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or other is self

    def __hash__(self) -> int:
        return hash(None)

    def __int__(self) -> int:
        return said(self)

    __float__ = __int__


class _Truth(_Mute, int):
    """true or false."""


class _Whole(_Mute, float):
    """3.0, of which nobody knows whether it was 3; other formats than `str` are said on purpose."""

    def __format__(self, how: str) -> str:
        return float.__format__(self, how) if how else str(self)


class _Bytes(_Mute, bytes):
    """Bytes, of which Python would print b'...'; `decode` makes text of them."""


class _List(_Mute, list):
    pass


class _Object(_Mute, dict):
    pass


NOTHING = _Nothing()


def _seen(value: object) -> Any:
    """What a template sees of a row's value."""
    if missing(value):
        return NOTHING
    if isinstance(value, Mapping):
        return _Object({key: _seen(of) for key, of in value.items()})
    if isinstance(value, list | tuple):
        return _List(map(_seen, value))
    if isinstance(value, bool):
        return _Truth(value)
    if isinstance(value, float) and (value.is_integer() or math.isinf(value)):
        return _Whole(value)
    if isinstance(value, bytes):
        return _Bytes(value)
    return value


def _unseen(value: object) -> Any:
    """The value that `_seen` made this one of."""
    if isinstance(value, Mapping):
        return {key: _unseen(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_unseen, value))
    if isinstance(value, _Truth | _Whole):
        return bool(value) if isinstance(value, _Truth) else float(value)
    return None if value is NOTHING else value


def _environment() -> jinja2.Environment:
    """Jinja, in which the values of `_seen` are what they stand for."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=said
    )
    made.globals["zip"] = zip
    made.filters["said"] = said
    made.tests["none"] = missing
    made.tests["true"] = lambda value: isinstance(value, bool | _Truth) and bool(value)
    made.tests["false"] = lambda value: isinstance(value, bool | _Truth) and not value
    made.tests["boolean"] = lambda value: isinstance(value, bool | _Truth)
    made.policies["json.dumps_function"] = lambda value, **how: json.dumps(_unseen(value), **how)
    return made


_ENVIRONMENT = _environment()


def template_reader(template: str) -> Reader:
    """What fills a template in; a ~ b joins texts and numbers only, as {{ a }}{{ b }} does. Raises
    jinja2.TemplateError for what is no template."""
    tree = _ENVIRONMENT.parse(template)
    for joined in tree.find_all(nodes.Concat):
        joined.nodes = [nodes.Filter(of, "said", [], [], None, None) for of in joined.nodes]
    made = _ENVIRONMENT.from_string(tree)
    return lambda row: made.render(_seen(row))


def columns_of(template: str) -> set[str]:
    """The columns that a template names. Raises jinja2.TemplateError for what is no template."""
    names = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(template))
    return names - set(_ENVIRONMENT.globals)


def unfilled(where: str, what: str, error: Exception, row: Mapping) -> InputError:
    """Of a template, called `what`, that cannot be filled in with a row."""
    return InputError(f"{where}: {what} cannot be filled in ({error}); there are {_there(row)}")


def _there(row: Mapping) -> str:
    """The names of a row's columns; of many, the first ones."""
    return ", ".join([*map(str, row)][:MOST_NAMED]) + ", ..." * (len(row) > MOST_NAMED)


def _column(row: Mapping, path: str) -> object:
    """The value at "column" or "column.key.0". Raises KeyError."""
    if path in row:
        return row[path]
    value: object = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(path)
    return value


def _plain(row: Mapping, path: str) -> object:
    """The value of a column, a number or truth value as text; None where it says that there is
    none. Raises KeyError, NoText."""
    value = _column(row, path)
    if missing(value):
        return None
    number = isinstance(value, bool | int | float | decimal.Decimal)
    return str(value if isinstance(value, bool) else said(value)) if number else value


def column_reader(columns: Mapping[str, str], name: str) -> Callable[[str, Mapping], dict]:
    """(where, row) -> {"prompt", "response", "system"} by a column map; numbers, and a column's
    truth values, become text.

    Raises InputError: here for a template that is none, when called for a column that a row lacks
    or a value without a text.
    """
    readers = _readers(columns, name)

    def read(where: str, row: Mapping) -> dict:
        values = {}
        for field, reader in readers.items():
            try:
                values[field] = reader(row)
            except KeyError:
                raise InputError(
                    f"{where}: no column {columns[field]!r} for {field}; there are {_there(row)}"
                ) from None
            except Exception as error:  # a template can raise whatever Python raises
                raise unfilled(where, f"columns.{field}", error, row) from None
        return values

    return read


def _readers(columns: Mapping[str, str], name: str) -> dict[str, Reader]:
    """What reads each field of a row. Raises InputError for a template that is none."""
    readers: dict[str, Reader] = {}
    for field, expression in columns.items():
        if "{{" in expression or "{%" in expression:
            try:
                readers[field] = template_reader(expression)
            except (jinja2.TemplateError, RecursionError) as error:
                raise InputError(
                    f"{name}: columns.{field} is no Jinja template ({error})"
                ) from None
        else:
            readers[field] = lambda row, expression=expression: _plain(row, expression)
    return readers
