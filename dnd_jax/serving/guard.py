"""What stands before every request: who may ask, how large and how slow a body may be, and the
count of all."""

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import time

from dnd_jax.serving.metrics import Metrics
from dnd_jax.serving.refusals import refusal

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
GONE = 499  # counted where the client went before it was answered
DRAINED = 8  # bodies of the largest size that are read of a refused client
OPEN = {"/healthz"}  # without a token
LISTS = {"/v1/adapters", "/v1/models", "/metrics"}  # what tells of everybody's adapters


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of a service. hosts: names that a request may call it by; empty: any. token: what every
    request has to bear; empty: nothing. shared: by people who need not see each other's adapters,
    so that none lists or deletes them."""

    prompts: int = 1000  # of an order
    waiting: int = 1000  # orders
    body: int = 8 << 20  # bytes
    seconds: float = 30.0  # until a body has come
    hosts: tuple[str, ...] = ()
    token: str = ""
    shared: bool = False

    @property
    def tokens(self) -> int:
        """Of an answer."""
        return 512 if self.shared else 4096


class _TooLarge(Exception):
    """A body is larger than may be."""


class Guard:
    """An ASGI middleware around the application."""

    def __init__(self, app, limits: Limits, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        started, status = time.perf_counter(), GONE

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # no path of a client's making
            seconds = time.perf_counter() - started
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)

    async def _answer(self, scope, receive, send) -> None:
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        if refused := self._refused(scope, headers):
            await self._drained(receive)
            await refused(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(receive), self._limits.seconds)
        except TimeoutError:
            slow = f"the body has not come within {self._limits.seconds:g} s"
            await refusal(408, slow, {"Connection": "close"})(scope, receive, send)
            return
        except _TooLarge:
            large = f"the body is larger than {self._limits.body} bytes"
            await self._drained(receive)
            await refusal(413, large, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        given = False

        async def again():
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, again, send)

    def _refused(self, scope, headers: dict):
        """Why a request is not answered, by its head alone; None: it is."""
        limits = self._limits
        host = headers.get(b"host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        # A page of the web whose name points here would otherwise speak for whoever opens it.
        if limits.hosts and name.lower() not in limits.hosts:
            return refusal(421, f"Host {host[:80]!r} is not this service's; use 127.0.0.1")
        if limits.token and scope["path"] not in OPEN:
            given = _token(headers.get(b"authorization", ""))
            if not hmac.compare_digest(given, limits.token.encode()):
                need = {"WWW-Authenticate": 'Basic realm="dnd_jax"'}
                return refusal(401, "a bearer token is needed: Authorization: Bearer TOKEN", need)
            origin = headers.get(b"origin", "")  # a browser sends its password for other pages too
            if origin and origin.partition("://")[2] != host and scope["method"] != "GET":
                return refusal(403, "another site's page may not ask here")
        lists = scope["method"] == "GET" and scope["path"].rstrip("/") in LISTS
        if limits.shared and (lists or scope["method"] == "DELETE"):
            return refusal(403, "others use this service too: nothing is listed or deleted")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > limits.body:
            large = f"the body is larger than {limits.body} bytes"
            return refusal(413, large, {"Connection": "close"})
        return None

    async def _drained(self, receive) -> None:
        """Reads what a refused client still sends, as far as that is bearable: one that is cut off
        in the middle would not see the answer."""

        async def read() -> None:
            size = 0
            while size < DRAINED * self._limits.body:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):  # the end, or the client has gone
                    return

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(read(), self._limits.seconds)

    async def _body(self, receive) -> bytes | None:
        """The whole body; None where the client has gone. Raises _TooLarge."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body:
                raise _TooLarge
            if not message.get("more_body"):
                return b"".join(parts)


def _token(authorization: str) -> bytes:
    """The token of a header: of "Bearer TOKEN", or the password that a browser asked for; empty
    where it is none."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1")
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""
