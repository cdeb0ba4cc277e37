"""Conversations over HTTP, as OpenAI's clients ask for them: with the base alone, or with a
generated adapter.

POST /v1/chat/completions    {"model": "base" or "dnd:KEY", "messages": [...], "stream": false}
GET /v1/models               "base", and an entry for each adapter and each name

One answer is written at a time, the next of those that wait behind it: enough to try an adapter.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from dnd_jax.base.conversation import Reply, Sampling, Talker
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example, said_fault
from dnd_jax.serving.holding import Unknown, held
from dnd_jax.serving.service import LARGEST_SEED, Busy, Closed, Failed, Service, failed

fastapi = packages.deferred("fastapi")
pydantic = packages.deferred("pydantic")
responses = packages.deferred("fastapi.responses")

BASE, PREFIX = "base", "dnd:"
COLDEST = 0.01  # below that a temperature is none, as vLLM has it too
ROLES = "a system message, if any, then user and assistant in turn, a user's at last"


class Chat:
    """A base that many clients ask. waiting: requests that may wait."""

    def __init__(self, talker: Talker, service: Service, waiting: int):
        self.service = service
        self._talker, self._most, self._asked = talker, waiting, 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "talk")
        self._closed = threading.Event()

    async def ask(
        self, model: str, asked: Example, shots: Sequence[Example], how: Sampling
    ) -> AsyncIterator[str | Reply]:
        """The pieces of an answer as they come, then the whole. Raises Unknown for a model that is
        none, Busy, and as `held` and `Talker.answer`."""
        if self._closed.is_set():
            raise Closed
        if self._asked >= self._most:
            raise Busy(self._most)
        self._asked += 1
        try:
            folder, stack = await self._folder(model)
        except BaseException:
            self._asked -= 1
            raise
        loop, pieces, left = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def say(piece: str) -> bool:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
            return not (left.is_set() or self._closed.is_set())

        def write() -> Reply | None:
            with stack:
                if left.is_set():
                    return None
                try:
                    reply = self._talker.answer(folder, asked, shots, how, say)
                except InputError as error:
                    # An adapter that was kept is one of this base: its files have changed.
                    raise (failed(error) if folder and folder in str(error) else error) from None
                except BaseException as error:
                    raise failed(error) from None
                if self._closed.is_set() and reply.cut:
                    raise Closed
                return reply

        def done(_) -> None:
            self._asked -= 1
            pieces.put_nowait(None)

        future = loop.run_in_executor(self._thread, write)
        future.add_done_callback(done)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            if future.cancelled():
                raise Closed
            yield future.result()
        finally:
            left.set()  # the thread lets go of the adapter
            future.add_done_callback(lambda f: f.cancelled() or f.exception())

    async def _folder(self, model: str) -> tuple[str | None, contextlib.ExitStack]:
        """(the adapter's folder, or None for the base; what holds it)."""
        if model == BASE:
            return None, contextlib.ExitStack()
        if not model.startswith(PREFIX):
            raise Unknown(f"model: {model[:80]!r} is none of {BASE}, {PREFIX}NAME, {PREFIX}ID")
        entry, stack = await held(self.service, model.removeprefix(PREFIX))
        return entry.path, stack

    def close(self) -> None:
        """Ends the answer that is being written, and takes no more."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)


def add_chat(app, chat: Chat, longest: int) -> None:
    """Adds the routes to a `fastapi.FastAPI`. longest: tokens of an answer, at most."""
    text_of = pydantic.create_model("Part", type=(Literal["text"], ...), text=(str, ...))

    class Message(pydantic.BaseModel, extra="forbid"):
        """content: a text, or parts of one."""

        role: Literal["system", "user", "assistant"]
        content: str | list[text_of]

    Tokens = Annotated[int, pydantic.Field(ge=1, le=longest, strict=True)]

    class StreamOptions(pydantic.BaseModel, extra="forbid"):
        include_usage: bool = False

    class ChatRequest(pydantic.BaseModel, extra="forbid"):
        """model: "base", "dnd:NAME" or "dnd:ID". temperature: 0 gives the likeliest answer, the
        same each time."""

        model: str
        messages: Annotated[list[Message], pydantic.Field(min_length=1)]
        max_tokens: Tokens | None = None
        max_completion_tokens: Tokens | None = None  # its newer name
        temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
        top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
        seed: Annotated[int, pydantic.Field(ge=0, le=LARGEST_SEED, strict=True)] | None = None
        stream: bool | None = None
        stream_options: StreamOptions | None = None

    @app.get("/v1/models")
    async def models() -> dict:
        """What can be asked: the base, and each kept adapter by its id and its names."""
        store = chat.service.store
        entries = await asyncio.to_thread(store.entries)
        names = await asyncio.to_thread(store.names)
        of = [f"{PREFIX}{key}" for key in [*(entry.id for entry in entries), *names]]
        listed = [{"id": BASE, "object": "model", "owned_by": "dnd_jax", "parent": None}]
        listed += [{**listed[0], "id": id, "parent": BASE} for id in of]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def complete(asked: ChatRequest, request: fastapi.Request):
        """An answer, whole or as server-sent events."""
        messages = [(message.role, _text(message.content)) for message in asked.messages]
        conversation = _conversation(messages)
        most = {asked.max_tokens, asked.max_completion_tokens} - {None}
        if len(most) > 1:
            raise InputError("max_tokens and max_completion_tokens are one thing; give one")
        temperature = asked.temperature or 0.0
        if 0 < temperature < COLDEST:
            raise InputError(f"temperature: 0, or {COLDEST} to 2")
        how = Sampling(max(most, default=0), temperature, asked.top_p or 1.0, asked.seed or 0)
        answer = chat.ask(asked.model, *conversation, how)
        first = await anext(answer)  # whose errors have a status of their own
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _events(head, first, answer, usage)
            return responses.StreamingResponse(events, media_type="text/event-stream")
        reply = first
        async with contextlib.aclosing(answer):
            while isinstance(reply, str):
                if await request.is_disconnected():
                    raise Closed
                reply = await anext(answer)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": _reason(reply),
        }
        return head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(reply),
        }


def _text(content: str | Sequence[Any]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _conversation(messages: Sequence[tuple[str, str]]) -> tuple[Example, list[Example]]:
    """(role, text) of each message -> (what the base is asked, the turns before it). Raises
    InputError for an order of roles that no chat template is asked for."""
    for number, (_, text) in enumerate(messages):
        if fault := said_fault(text):
            raise InputError(f"messages.{number}: {fault}")
    system, turns = "", list(messages)
    if turns[0][0] == "system":
        system = turns.pop(0)[1]
    wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [role for role, _ in turns] != wanted:
        raise InputError(f"messages: expected {ROLES}")
    texts = [text for _, text in turns]
    before = zip(texts[:-1:2], texts[1::2], strict=True)
    return Example(texts[-1], "", system), [Example(*turn) for turn in before]


def _reason(reply: Reply) -> str:
    return "length" if reply.cut else "stop"


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.tokens,
        "total_tokens": reply.prompt_tokens + reply.tokens,
    }


async def _events(
    head: dict, first: str | Reply, answer: AsyncIterator[str | Reply], usage: bool
) -> AsyncIterator[str]:
    """An answer as server-sent events, the last of them "[DONE]". usage: the numbers of tokens in
    one of their own before that."""
    head = head | {"object": "chat.completion.chunk"}

    def event(delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event(head | {"choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    piece = first
    try:
        while isinstance(piece, str):
            yield event({"content": piece})
            piece = await anext(answer)
    except Closed:
        yield _event({"error": {"message": "the service is stopping", "code": 503}})
        return
    except Failed:
        error = {"message": "the answer broke off; the service's log says why", "code": 500}
        yield _event({"error": error})
        return
    yield event({}, _reason(piece))
    if usage:
        yield _event(head | {"choices": [], "usage": _usage(piece)})
    yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
