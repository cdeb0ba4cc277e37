"""Prompts from several instruction templates, one drawn for each row of a source:
"templates": ["What is the opposite of {{input}}?", "{{input}} means the contrary of what word?"].

The draw is a digest of the source's name and the row's place in it: the same prompts on every
machine, wherever the files lie, and for a row that `limit` keeps.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from jinja2 import TemplateError

from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.data.templates import columns_of, template_reader, unfilled

# (where, the row's place, the row) -> its prompt, and the one by which it is told from others
Instructed = Callable[[str, int, Mapping], tuple[str, str]]


def check_templates(templates: Sequence[str], what: str) -> None:
    """Raises InputError, in which `what` names the list, for one that no prompts can be drawn
    from."""
    if not templates:
        raise InputError(f"{what} is empty; give one template or more, or leave it out")
    first: dict[str, int] = {}
    for i, text in enumerate(templates):
        if not isinstance(text, str):
            raise InputError(f"{what}[{i}] = {text!r} is no text")
        if not text.strip():
            raise InputError(f"{what}[{i}] has nothing in it")
        try:
            columns = columns_of(text)
        except (TemplateError, RecursionError) as error:
            raise InputError(f"{what}[{i}] is no Jinja template ({error})") from None
        if not columns:
            raise InputError(
                f"{what}[{i}] = {text!r} names no column, so that every row would have the same "
                "prompt; write {{column}} where a row's text is meant"
            )
        if (same := first.setdefault(" ".join(text.split()), i)) != i:
            raise InputError(f"{what}[{same}] and [{i}] are the same")


def instructed(
    templates: Sequence[str],
    name: str,
    drawn_by: Sequence[str],
    asked_by: str = "",
    known: Mapping[str, str] | None = None,
) -> Instructed:
    """What makes the prompts of a source's rows. name: of the source, for messages; drawn_by: what
    tells it from other sources; asked_by: the template that tells rows apart, in place of the first
    one, where a row fills it in; known: {a prompt of another source: what tells it from others},
    which tells a row that has this prompt in any of the templates.

    Raises InputError: here for a list that `check_templates` refuses, when called for a row that
    its template cannot be filled in with. All are tried on the first row.
    """
    check_templates(templates, f"{name}: templates")
    readers = [template_reader(text) for text in templates]
    asked = [template_reader(asked_by)] if asked_by not in ("", templates[0]) else []
    untried, seed = set(range(len(readers))), "\0".join(drawn_by)

    def read(where: str, place: int, row: Mapping) -> tuple[str, str]:
        drawn, texts = int(digests.of_text(f"{seed}\0{place}")[:16], 16) % len(readers), {}
        for i in sorted({0, drawn} | untried):
            try:
                texts[i] = str(readers[i](row))
            except Exception as error:  # a template can raise whatever Python raises
                raise unfilled(where, f"templates[{i}]", error, row) from None
        untried.clear()
        others = (reader for i, reader in enumerate(readers) if i not in texts)
        wordings = itertools.chain(texts.values(), _filled(others, row)) if known else ()
        told = (known[text.strip()] for text in wordings if text.strip() in known)
        return texts[drawn], next(told, None) or next(_filled(asked, row), texts[0])

    return read


def _filled(readers: Iterable[Callable], row: Mapping) -> Iterator[str]:
    """The texts of those templates that a row fills in."""
    for reader in readers:
        try:
            yield str(reader(row))
        except Exception:  # a template can raise whatever Python raises
            continue
