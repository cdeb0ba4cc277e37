"""What a base is asked and how it answers, as text: a prompt in the base's chat template, an answer
as that template goes on, and the tokens that end one.

How a template takes and shows texts is found by rendering three marks with it, once a template.
"""

import dataclasses
import datetime
import functools
import html
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dnd_jax.base.hub import resolve
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.core.files import read_json

# What day it is for templates that ask, whenever they do: by a variable, or by a function.
DAY = datetime.datetime(2024, 7, 26)
OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_CLOCK = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
# What else in a template would be another text each time.
_BY_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(|\bstrftime_now\b(?!\s+is\b)")
PROMPT, SYSTEM, ANSWER = "Markaprompt", "Markasystem", "Markananswer"
# A list of parts that is shown as Python or JSON writes it is not what was to be said.
_AS_CODE = re.compile(rf"""['"]text['"]\s*:\s*['"]({PROMPT}|{SYSTEM}|{ANSWER})""")
USER, EVERY = ("user", "assistant"), ("system", "user", "assistant")


class Way(NamedTuple):
    """How texts become messages of a chat template."""

    parts: tuple[str, ...] = ()  # roles whose content is a list of parts
    own: bool = True  # the system text is a message of its own; False: it precedes the prompt
    always: bool = False  # a system message also where there is no such text

    def messages(
        self,
        prompt: str,
        system: str = "",
        answer: str | None = None,
        before: Sequence[tuple[str, str]] = (),
    ) -> list[dict]:
        """before: prompts and answers of the turns before."""
        turns = [*before, (prompt, answer)]
        if system and not self.own:
            turns[0] = f"{system}\n\n{turns[0][0]}", turns[0][1]
            system = ""
        said = [("system", system)] * bool(system or self.always)
        for asked, answered in turns:
            said += [("user", asked)] + [("assistant", answered)] * (answered is not None)
        return [{"role": role, "content": self._content(role, text)} for role, text in said]

    def _content(self, role: str, text: str) -> str | list[dict]:
        return [{"type": "text", "text": text}] if role in self.parts else text


# In this order the first is taken that shows all that was to be said.
WAYS = (Way(), Way(USER), Way(always=True), Way(USER, always=True), Way(EVERY, always=True))
WAYS_WITH_SYSTEM = (
    *(Way(), Way(USER), Way(("system",)), Way(EVERY)),
    *(Way(own=False), Way(USER, own=False)),
    *(Way((), False, True), Way(USER, False, True), Way(EVERY, False, True)),
)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a template shows around an answer."""

    header: str = ""  # behind the rendered prompt, where the template heads no answer when asked to
    lead: str = ""  # spaces before the answer
    close: str | None = None  # from the answer to the token that ends the turn; None: no such token
    before: str = ""  # all of the marked conversation before the answer, and after it
    after: str = ""


def render(tokenizer, prompt: str, system: str = "", before: Sequence[tuple[str, str]] = ()) -> str:
    """The text that precedes the answer, special tokens included: the base's chat template, or
    prompt and a line break (after the begin token, where the tokenizer sets one) where it has none.
    before: prompts and answers of the turns before.

    A template that shows no system text gets it before the prompt; one that takes lists of parts
    gets those; one that can think aloud is told not to; one that asks what day it is always hears
    the same. Raises InputError, naming the template's file, where prompt or system text are not in
    what it shows.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer("")["input_ids"]
        begin = tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else ""
        turns = [f"{asked}\n{answer_text(tokenizer, said)}" for asked, said in before]
        head = f"{begin}{system}\n" if system else begin
        return "".join([head, *turns, f"{prompt}\n"])
    template = _template(tokenizer)
    way = _way(tokenizer, template, bool(system))
    try:
        text = _apply(tokenizer, template, way.messages(prompt, system, before=before))
    except Exception as error:  # templates are code of others
        raise InputError(
            f"{_file(tokenizer)}: the chat template refuses the prompt {_short(prompt)} "
            f"({first_line(error)})"
        ) from None
    turns = [("turn before", said) for turn in before for said in turn]
    for what, said in (("prompt", prompt), ("system text", system), *turns):
        if not _stands(said, text):
            raise InputError(
                f"{_file(tokenizer)}: the chat template changes the {what} {_short(said)} or "
                "leaves it out; mend the template or the text"
            )
    return text + _frame(tokenizer, template, tokenizer.eos_token).header


def answer_text(tokenizer, response: str) -> str:
    """A response as it is taught and scored: as the chat template shows it behind the prompt, up to
    and with the token that ends the turn; the tokenizer's end token where the template shows none.

    Raises InputError where there is neither.
    """
    frame = Frame()
    if tokenizer.chat_template is not None:
        template = _template(tokenizer)
        frame = _frame(tokenizer, template, tokenizer.eos_token)
        if frame.before and response != response.strip():
            response = _trimmed(tokenizer, template, frame, response)
    if frame.close is None and tokenizer.eos_token is None:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer has no eos_token, so no answer could end; "
            "set one"
        )
    close = tokenizer.eos_token if frame.close is None else frame.close
    return frame.lead + response + close


def ends_of(base: str | os.PathLike, tokenizer) -> tuple[int, ...]:
    """Every token that ends an answer of a base: what its generation_config.json names (its
    config.json, where that names none), its tokenizer, and its chat template.

    Raises InputError for an id that is none of the model's, where there is no end at all, and where
    the tokenizer takes the text of an end for words.
    """
    folder, found = resolve(base), []
    sizes = _settings(folder / "config.json")
    for file in (folder / "generation_config.json", folder / "config.json"):
        if file.is_file() and not found:
            found = _ids(file, _settings(file), sizes)
    text = answer_text(tokenizer, ANSWER)
    taught = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
    if taught not in tokenizer.added_tokens_decoder:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer reads the end in {text!r} as plain text; set "
            "split_special_tokens, and single_word of that token, to false in its files"
        )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([taught, *own, *found]))


def until_end(ids: Sequence[int], ends: Iterable[int]) -> list[int]:
    """What stands before the first end token."""
    ends = frozenset(ends)
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:at])


def _settings(file: pathlib.Path) -> dict:
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: not a model's settings, which are a JSON object; copy it again")
    return raw


def _ids(file: pathlib.Path, raw: dict, sizes: dict) -> list[int]:
    """The end tokens that a file names. Raises InputError for what is no token of the model."""

    def of(settings: dict, key: str):
        inner = settings.get("text_config")
        value = settings.get(key)
        return inner.get(key) if value is None and isinstance(inner, dict) else value

    named, size = of(raw, "eos_token_id"), of(sizes, "vocab_size")
    listed = named if isinstance(named, list) else [] if named is None else [named]
    for value in listed:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 0 or (isinstance(size, int) and value >= size):
            raise InputError(
                f"{file}: eos_token_id {named!r} names {value!r}, which is no token of the model "
                f"(0 to {size - 1 if isinstance(size, int) else '...'}); name ids of end tokens"
            )
    return listed


def _template(tokenizer) -> str:
    """The one template that is used, of several the one called default as transformers does, on
    the same day for ever."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise InputError(
            f"{_file(tokenizer)}: several chat templates ({names}) and none called default; name "
            "one of them default"
        ) from None
    if not isinstance(template, str):
        raise InputError(f"{_file(tokenizer)}: chat_template {_short(template)} is no text")
    return _on_the_day(template)


@functools.lru_cache(maxsize=16)
def _on_the_day(template: str) -> str:
    return _CLOCK.sub(lambda call: json.dumps(DAY.strftime(call[2])), template)


def _apply(tokenizer, template: str, messages: list[dict], ask: bool = True) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=ask, **OPTIONS
    )


@functools.lru_cache(maxsize=16)
def _way(tokenizer, template: str, with_system: bool) -> Way:
    """The first way in which a template shows prompt and system text. Raises InputError where none
    does, and for one that is another text each time."""
    if changing := _BY_CHANCE.search(template):
        raise InputError(
            f"{_file(tokenizer)}: what the chat template shows changes from time to time "
            f"({changing.group()}), so no run could be repeated; mend the template"
        )
    system, why = SYSTEM if with_system else "", ""
    for way in WAYS_WITH_SYSTEM if with_system else WAYS:
        try:
            text = _apply(tokenizer, template, way.messages(PROMPT, system))
        except Exception as error:  # templates are code of others
            why = why or f": {first_line(error)}"
            continue
        if PROMPT in text and system in text and not _AS_CODE.search(text):
            return way
    raise InputError(
        f"{_file(tokenizer)}: the chat template does not show a user's prompt{why}; mend the "
        "template, or remove it to have prompts as plain lines"
    )


@functools.lru_cache(maxsize=16)
def _frame(tokenizer, template: str, eos: str | None) -> Frame:
    """What a template shows around answers; nothing where it shows none. eos: the tokenizer's end
    token, which the template may use."""
    way = _way(tokenizer, template, False)
    asked = _apply(tokenizer, template, way.messages(PROMPT))
    try:
        whole = _apply(tokenizer, template, way.messages(PROMPT, answer=ANSWER), ask=False)
    except Exception:  # templates are code of others; this one knows no assistant
        return Frame()
    before, _, after = whole.partition(ANSWER)
    if whole.count(ANSWER) != 1 or _AS_CODE.search(whole):
        return Frame()
    # Where the conversation does not go on from the prompt (an empty thought is left out), the
    # answer follows the prompt itself.
    between = before.removeprefix(asked) if before.startswith(asked) else ""
    header = between.rstrip(" ")
    return Frame(header, between[len(header) :], _close(tokenizer, after), before, after)


def _close(tokenizer, after: str) -> str | None:
    """What of the text behind an answer belongs to it: up to and with its first token that is no
    plain text. Words before that are left out."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens |= {tokenizer.eos_token} - {None}
    found = [(after.find(t), -len(t), t) for t in tokens if t.strip() and t in after]
    if not found:
        return None
    at, _, token = min(found)
    return after[:at] + token if not after[:at].strip() else token


def _trimmed(tokenizer, template: str, frame: Frame, response: str) -> str:
    """A response with spaces at its ends, of which the template may show fewer."""
    way = _way(tokenizer, template, False)
    try:
        whole = _apply(tokenizer, template, way.messages(PROMPT, answer=response), ask=False)
    except Exception:  # templates are code of others
        return response
    if not (whole.startswith(frame.before) and whole.endswith(frame.after)):
        return response
    shown = whole[len(frame.before) : len(whole) - len(frame.after)]
    return shown if shown.strip() == response.strip() else response


def _stands(said: str, text: str) -> bool:
    """Whether a text holds what was to be said: spaces may be others, and marks may be escaped as
    JSON or HTML has them."""
    if said.strip() in text:
        return True
    shown = [" ".join(form.split()) for form in (text, html.unescape(text))]
    forms = [" ".join(form.split()) for form in (said, json.dumps(said, ensure_ascii=False)[1:-1])]
    return any(form in text for form in forms for text in shown)


def _file(tokenizer) -> str:
    """Where a tokenizer's chat template stands."""
    folder = pathlib.Path(tokenizer.name_or_path)
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    found = [folder / name for name in names if (folder / name).is_file()]
    return str(found[0] if found else tokenizer.name_or_path)


def _short(said: object) -> str:
    text = repr(said)
    return text if len(text) <= 40 else f"{text[:37]}..."
