"""Stage `serve`: a trained generator over HTTP, with a page for people (docs/SERVE.md).

dnd serve --generator=RUN [--base=BASE] [--port=8000] [--cache=FOLDER] [--cache-gb=10]
          [--host=0.0.0.0 --token-file=FILE] [--config.mesh.fsdp=8] [--nopage]
"""

import ipaddress
import math
import pathlib
import socket
import tempfile
import threading
from collections.abc import Callable

from dnd_jax.base.conversation import Talker
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_text
from dnd_jax.core.stage import Given
from dnd_jax.core.stopping import stop
from dnd_jax.core.workdir import held
from dnd_jax.generator.generate import trained_base
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.lora.adapter import DTYPES
from dnd_jax.serving.app import make_app
from dnd_jax.serving.chat import Chat
from dnd_jax.serving.guard import Limits
from dnd_jax.serving.metrics import Metrics
from dnd_jax.serving.page import mount_page
from dnd_jax.serving.service import Service
from dnd_jax.serving.store import AdapterStore

uvicorn = packages.deferred("uvicorn")

LAST_PORT = 65535
TALKING = 16  # conversations that wait: an answer takes seconds
SHORTEST_TOKEN = 16  # characters
IDLE = 75  # seconds until an unused connection is closed: later than clients close theirs
GRACE = 30  # seconds that requests have to end after SIGTERM


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("generator", "cache")
    if given["dtype"] not in DTYPES:
        raise InputError(f"--dtype={given['dtype']}: none of {', '.join(DTYPES)}")
    limits = _limits(given)
    if given["base"] and given["key-prefix"]:
        raise InputError("--key-prefix is for other servers; leave out --base")
    listening = _bound(given["host"], given["port"])
    with listening, held(pathlib.Path(given["cache"]), "serve"):
        metrics = Metrics()
        generator = TrainedGenerator(
            given["generator"],
            given.config.mesh,
            base_name=given["base-name"],
            at_once=given["at-once"],
            key_prefix=given["key-prefix"],
        )
        store = AdapterStore(given["cache"], int(given["cache-gb"] * 1e9))
        service = Service(generator, store, limits.waiting, given["dtype"], metrics.batch)
        talker = _talker(given["base"], generator) if given["base"] else None
        chat = Chat(talker, service, min(limits.waiting, TALKING)) if talker else None
        app = make_app(service, limits, metrics, chat, lambda: _started(server))
        leave = mount_page(app, service, chat, limits) if given["page"] else lambda: None
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE,
                timeout_graceful_shutdown=GRACE,
            )
        )
        server.handle_exit = _ending(server.handle_exit, service, chat, leave)
        service.warm(lambda line: print(line, flush=True))
        stop.check()
        listening.listen()  # who asks from now on waits, and is not refused
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {generator.folder} at http://{shown}:{port}", flush=True)
        server.run([listening])
        service.close()
    stop.check()  # the signal that ended the server


def _started(server) -> None:
    """Ends a server that was asked to stop before it took the signals over."""
    server.should_exit = server.should_exit or stop.signum is not None


def _talker(base: str, generator: TrainedGenerator) -> Talker:
    """The base to ask. Raises InputError where a generator's adapters do not fit it."""
    model = TorchBase(trained_base(base, generator, "--base"), batch_size=1, max_new_tokens=1)
    with tempfile.TemporaryDirectory() as scratch:
        any_prompts = ["warm up"] * generator.condition.num_prompts
        model.use(generator.write(any_prompts, pathlib.Path(scratch, "adapter")))
    model.use(None)
    return Talker(model)


def _ending(
    handle_exit: Callable, service: Service, chat: Chat | None, leave: Callable[[], None]
) -> Callable:
    """A handler of signals that lets open pages go, and has a service refuse, shortly before
    uvicorn gives up waiting, what is not done by then."""

    def close() -> None:
        if chat is not None:
            chat.close()
        service.close()

    def handle(signum: int, frame: object) -> None:
        leave()
        refuse = threading.Timer(GRACE - 5, close)
        refuse.daemon = True
        refuse.start()
        handle_exit(signum, frame)

    return handle


def _limits(given: Given) -> Limits:
    """Raises InputError for limits that cannot be, and where anybody on the network might ask."""
    for flag in ("max-prompts", "max-waiting", "max-body-mb", "cache-gb"):
        if not 0 < given[flag] < math.inf:
            raise InputError(f"--{flag}={given[flag]:g}: expected a number above 0")
    token, local = "", _is_local(given["host"])
    if given["anyone"] and given["token-file"]:
        raise InputError("--anyone is without a token; leave out --token-file")
    if given["token-file"]:
        token = read_text(given["token-file"]).strip()
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
            raise InputError(
                f"{given['token-file']}: a token is one line of {SHORTEST_TOKEN} or more ASCII "
                "characters, such as `openssl rand -hex 32` gives"
            )
    elif not local and not given["anyone"]:
        raise InputError(
            f"--host={given['host']}: the network can ask there; give --token-file=FILE, "
            "--host=127.0.0.1 for this machine alone, or --anyone for a public service"
        )
    hosts = ("127.0.0.1", "localhost", "[::1]", given["host"].lower())
    if given["anyone"] or not local:
        hosts = ()
    body = int(given["max-body-mb"] * (1 << 20))
    return Limits(
        given["max-prompts"],
        given["max-waiting"],
        body,
        hosts=hosts,
        token=token,
        shared=given["anyone"],
    )


def _is_local(host: str) -> bool:
    """Whether only this machine can ask at an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address, so that a port in use is said before a generator is loaded. Raises
    InputError."""
    if port > LAST_PORT:
        raise InputError(f"--port={port}: at most {LAST_PORT}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host={host} --port={port}: cannot listen there ({why}); choose another --port"
        ) from None
    return listening
