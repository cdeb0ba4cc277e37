"""The service's HTTP side: routes, and what a client is told of every error in one line.

POST /v1/adapters                    {"prompts", "seed", "strength", "name"} -> an adapter
GET /v1/adapters                     all that are kept
GET, DELETE /v1/adapters/KEY         one, by its id or its name; that of a name is made again
GET /v1/adapters/KEY/download        its PEFT folder as a zip
POST /v1/chat/completions            where there is a base to ask (chat.py)
GET /healthz, /metrics, /docs
"""

import asyncio
import contextlib
import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from dnd_jax import __version__
from dnd_jax.core import packages
from dnd_jax.serving.chat import Chat, add_chat
from dnd_jax.serving.guard import Guard, Limits
from dnd_jax.serving.holding import held, not_kept
from dnd_jax.serving.metrics import Metrics
from dnd_jax.serving.refusals import REFUSALS, refusal, told
from dnd_jax.serving.service import Order, Service
from dnd_jax.serving.store import Entry

fastapi = packages.deferred("fastapi")
pydantic = packages.deferred("pydantic")
exceptions = packages.deferred("fastapi.exceptions")
responses = packages.deferred("fastapi.responses")
of_starlette = packages.deferred("starlette.exceptions")

BLOCK = 1 << 18  # bytes of a download at a time


def make_app(
    service: Service,
    limits: Limits,
    metrics: Metrics,
    chat: Chat | None = None,
    started: Callable[[], None] = lambda: None,
):
    """The application, a `fastapi.FastAPI`. chat: where a base can be asked; started: called when
    it is about to answer."""
    generator = service.generator

    class AdapterRequest(pydantic.BaseModel, extra="forbid"):
        """prompts: unlabeled, of one task. seed: draws those that are used, where there are more.
        strength: of the adapter's effect. name: to call the adapter by, beside its id."""

        prompts: Annotated[list[str], pydantic.Field(min_length=1, max_length=limits.prompts)]
        seed: Annotated[int, pydantic.Field(ge=0, strict=True)] = 0
        strength: Annotated[float, pydantic.Field(gt=0, strict=True)] = 1.0
        name: str = ""

    class Download(responses.StreamingResponse):
        """A stream that lets go of what it holds, however it ends."""

        held: contextlib.ExitStack

        async def __call__(self, scope, receive, send) -> None:
            with self.held:
                await super().__call__(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        started()
        yield
        if chat is not None:
            chat.close()
        await asyncio.to_thread(service.close)

    app = fastapi.FastAPI(
        title="dnd_jax",
        version=__version__,
        description="Prompts of a task in, a LoRA adapter out (Drag-and-Drop LLMs).",
        lifespan=lifespan,
        strict_content_type=True,  # a page of the web can post other types than JSON unasked
    )

    def shown(entry: Entry, request: fastapi.Request) -> dict[str, Any]:
        """What a client is told of an adapter."""
        fields = dataclasses.asdict(entry)
        if limits.shared:
            del fields["path"]
        fields["closest"] = [{"task": task, "cosine": cosine} for task, cosine in entry.closest]
        return fields | {"url": f"{request.base_url}v1/adapters/{entry.id}/download"}

    @app.post("/v1/adapters")
    async def create(
        order: AdapterRequest, request: fastapi.Request, response: fastapi.Response
    ) -> dict:
        """Generates an adapter, or finds it where the same order was made before (status 200)."""
        if limits.shared and order.name:
            raise fastapi.HTTPException(403, "others use this service too: it takes no names")
        wanted = Order(tuple(order.prompts), order.seed, order.strength)
        future, made = await asyncio.to_thread(service.order, wanted, order.name)
        entry = await asyncio.wrap_future(future)
        metrics.orders.labels("made" if made else "found").inc()
        response.status_code = 201 if made else 200
        return shown(entry, request)

    @app.get("/v1/adapters")
    async def every(request: fastapi.Request) -> dict:
        """The adapters that are kept, the last used first, and the names."""
        entries = await asyncio.to_thread(service.store.entries)
        names = await asyncio.to_thread(service.store.names)
        return {"adapters": [shown(entry, request) for entry in entries], "names": names}

    @app.get("/v1/adapters/{key}")
    async def one(key: str, request: fastapi.Request) -> dict:
        """What an adapter was made from, and its card."""
        entry, stack = await held(service, key)
        with stack:
            card = await asyncio.to_thread(_card, entry)
            return shown(entry, request) | {"card": card}

    @app.get("/v1/adapters/{key}/download", response_class=responses.StreamingResponse)
    async def download(key: str):
        """The PEFT folder as a zip."""
        entry, stack = await held(service, key)
        name = f'attachment; filename="{entry.id}.zip"'
        headers = {"Content-Disposition": name, "ETag": f'"{entry.id}"'}
        blocks = _zipped(pathlib.Path(entry.path))
        stack.callback(blocks.close)
        answer = Download(blocks, media_type="application/zip", headers=headers)
        answer.held = stack
        return answer

    @app.delete("/v1/adapters/{key}", status_code=204)
    async def delete(key: str) -> None:
        """Deletes an adapter and its names."""
        if not await asyncio.to_thread(service.delete, key):
            raise not_kept(key)

    @app.get("/healthz")
    async def healthz() -> dict:
        """That the service answers, and what it generates with."""
        return {
            "status": "ok",
            "base": generator.adapter.base,
            "generator": generator.fingerprint[:16],
            "prompts": {"fewest": generator.fewest},
        }

    @app.get("/metrics", response_class=responses.PlainTextResponse)
    async def prometheus():
        """Prometheus' text format."""
        text, kind = await asyncio.to_thread(metrics.text, service)
        return responses.Response(text, media_type=kind)

    if chat is not None:
        add_chat(app, chat, limits.tokens)

    def answer(request: fastapi.Request, error: Exception):
        return refusal(*told(error))

    for kind in REFUSALS:
        app.add_exception_handler(kind, answer)

    @app.exception_handler(exceptions.RequestValidationError)
    async def invalid(request: fastapi.Request, error):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refusal(422, f"{where}: {first['msg']}" if where else first["msg"])

    @app.exception_handler(of_starlette.HTTPException)
    async def plain(request: fastapi.Request, error):
        return refusal(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: fastapi.Request, error):
        return refusal(500, "an error of the service; its log says which")

    app.add_middleware(Guard, limits=limits, metrics=metrics)
    return app


def _card(entry: Entry) -> str:
    """The README.md of an adapter."""
    return pathlib.Path(entry.path, "README.md").read_text(encoding="utf-8")


class _Sink:
    """Where a zip is written that is sent at once: what was written since the last look."""

    def __init__(self):
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        parts, self._parts = b"".join(self._parts), []
        return parts


def _zipped(folder: pathlib.Path) -> Iterator[bytes]:
    """A zip of an adapter's folder, block by block."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in sorted(folder.iterdir()):
            info = zipfile.ZipInfo(path.name)  # one date: the same adapter is the same zip
            info.external_attr = 0o644 << 16
            with path.open("rb") as file, archive.open(info, "w", force_zip64=True) as part:
                while block := file.read(BLOCK):
                    part.write(block)
                    yield sink.take()
    yield sink.take()
