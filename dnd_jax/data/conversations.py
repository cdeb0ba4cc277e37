"""The first question of a conversation and its answer.

ShareGPT's {"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}], "system"} or
{"messages": [{"role", "content"}]}, whose content may be a list of parts of type text.
"""

from collections.abc import Mapping

from dnd_jax.core.errors import InputError
from dnd_jax.data.templates import missing

CONVERSATIONS = ("conversations", "messages")  # the columns that hold one
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

# Of a turn of OpenAI's and of trainers' files: where one is 0 or false, nothing is learnt of it.
UNTAUGHT = ("weight", "train", "loss")


def first_exchange(where: str, turns: object, system: object) -> tuple[dict, int]:
    """({"prompt", "response", "system"} of the first exchange, number of further questions).
    system: the row's own. Raises InputError."""
    every = _turns(where, turns)
    said = [_turn(where, turn) for turn in every]
    answers = [of for of, turn in zip(every, said, strict=True) if turn[0] == "assistant"]
    if answers:
        _check_taught(where, answers[0])
    if said and said[0][0] == "system":
        own = said.pop(0)[1]
        system = own if missing(system) or system == "" else system
    if not said or said[0][0] != "user" or (len(said) > 1 and said[1][0] != "assistant"):
        raise InputError(
            f"{where}: a conversation must begin with a question of the user and its answer"
        )
    row = {"prompt": said[0][1], "system": system}
    if len(said) > 1:
        row["response"] = said[1][1]
    return row, sum(role == "user" for role, _ in said[1:])


def _check_taught(where: str, answer: Mapping) -> None:
    """Raises InputError for an answer of which nothing is to be learnt."""
    for key in UNTAUGHT:
        if not missing(answer.get(key)) and not answer[key]:
            raise InputError(
                f"{where}: the first answer has {key} = {answer[key]!r}, which says that it is not "
                "to be learnt; leave the row out, or begin with the exchange that is"
            )


def _turns(where: str, turns: object) -> list[Mapping]:
    """The turns of a conversation; of an object of lists too, as `datasets` keeps a Sequence of
    objects. Raises InputError."""
    if isinstance(turns, Mapping) and all(isinstance(of, list) for of in turns.values()):
        length = max(map(len, turns.values()), default=0)
        if all(len(of) == length for of in turns.values()):
            turns = [dict(zip(turns, of, strict=True)) for of in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"{where}: a conversation must be a list of objects")
    return turns


def _turn(where: str, turn: Mapping) -> tuple[str, object]:
    """(role, text) of a turn. Raises InputError for a speaker that there is none of, and what is no
    text."""
    role, text = (
        next((turn[key] for key in keys if not missing(turn.get(key))), None)
        for keys in (("from", "role"), ("value", "content"))
    )
    if not isinstance(role, str) or role not in SPEAKERS:
        raise InputError(
            f"{where}: speaker {role!r} of the conversation is none of {', '.join(SPEAKERS)}"
        )
    for key in ("tool_calls", "function_call"):
        if not missing(turn.get(key)) and turn[key] not in ([], {}):
            raise InputError(f"{where}: the conversation has {key}, of which no text is made")
    return SPEAKERS[role], _content(where, text)


def _content(where: str, content: object) -> object:
    """The text of a turn's content: itself, or that of its parts. Raises InputError for a part of
    another type than text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            what = kind if kind != "text" else "text without one"
            raise InputError(
                f"{where}: a part of the conversation is of type {what}; only text is read"
            )
        texts.append(text)
    return "".join(texts)
