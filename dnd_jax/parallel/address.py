"""Where the processes of a run meet: the coordinator's address, and whether process 0 can use it.

When process 0 cannot reach its own coordinator, JAX ends in an abort that Python cannot catch, with
a C++ stack and status 134. So process 0 tries the address first: it listens where JAX is going to,
and calls itself by the name that the others were told.
"""

import contextlib
import errno
import os
import secrets
import socket
import time
from typing import NamedTuple

from dnd_jax.core.errors import InputError, Missing, first_line
from dnd_jax.core.stopping import stop

GIVE = "give --coordinator, --processes and --process"
PATIENCE = 5.0  # seconds until a call to oneself counts as unanswered
# Variables that JAX reads: the coordinator's address, and where it listens if not at that port.
ADDRESS, BIND = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"


class Meeting(NamedTuple):
    """Where process 0 waits for the others: a port beside the coordinator's, which is JAX's own.
    mend: what chooses another place."""

    host: str
    port: int
    coordinator: str
    mend: str


def split(address: str, name: str, most: int = 65535) -> tuple[str, int]:
    """(host without brackets, port of at most `most`) of HOST:PORT. Raises InputError, which calls
    it `name`."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= most:
        raise InputError(
            f"{name}={address}: expected HOST:PORT of process 0, such as 10.0.0.1:1234, with a "
            f"port of 1 to {most}"
        )
    if ":" in host and not (host[0] == "[" and host[-1] == "]"):
        raise InputError(f"{name}={address}: an IPv6 address has brackets, [{host}]:{port}")
    return host.strip("[]"), int(port)


def given(coordinator: str) -> Meeting:
    """Where the processes meet that --coordinator=HOST:PORT leads together."""
    host, port = split(coordinator, "--coordinator", 65534)  # the next port is used as well
    return Meeting(host, port + 1, coordinator, "mend --coordinator")


def detected(coordinator: str) -> Meeting:
    """Where they meet when JAX has detected the coordinator in a cluster."""
    host, port = split(coordinator, ADDRESS if ADDRESS in os.environ else "the coordinator")
    # Under SLURM the port is 61440 + the job's number % 4096: the next one is the next job's, maybe
    # on the same host.
    beside = port - 2**15 if port >= 61440 else port + 1
    mend = "set JAX_COORDINATOR_PORT to one that is open"
    return Meeting(host, beside, coordinator, mend)


def listen(port: int, backlog: int = 8, host: str = "") -> socket.socket:
    """A server on a port: of all addresses, IPv6 as well where there is any, or of one. Raises
    OSError."""
    if host:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=backlog)
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
        return socket.create_server(("", port), backlog=backlog, **both)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise
    except ValueError:  # a system without both at once
        pass
    return socket.create_server(("", port), backlog=backlog)


def check_own(meeting: Meeting, patience: float = 0.0) -> None:
    """Process 0 calls this before JAX starts. Raises InputError unless it can listen at the
    coordinator's port and reaches itself there by the coordinator's name; Missing where that name
    is still not known, or without an answer, after `patience` seconds: it may be in a while."""
    name, port = split(meeting.coordinator, "the coordinator")
    bound = os.environ.get(BIND, "")
    host, own = split(bound, BIND) if bound else ("", port)
    try:
        server = listen(own, host="" if host in ("::", "0.0.0.0") else host)
    except (OSError, ValueError) as error:
        raise InputError(
            f"port {own} of the coordinator {bound or meeting.coordinator} cannot be used: "
            f"{_why(error)}; {meeting.mend}"
        ) from None
    deadline = time.monotonic() + patience
    with server:
        fault, may_pass = _call(server, name, port)
        while fault and may_pass and time.monotonic() < deadline:
            stop.check()
            time.sleep(1)
            fault, may_pass = _call(server, name, port)
    if fault:
        here = socket.gethostname()
        raise (Missing if may_pass else InputError)(
            f"process 0 ({here}) does not reach itself at the coordinator's address "
            f"{meeting.coordinator}: {fault}; {GIVE}, with an address of this machine"
        )


def _call(server: socket.socket, host: str, port: int) -> tuple[str, bool]:
    """(why a call to host:port does not reach this server, empty when it does; whether it may a
    little later)."""
    token = secrets.token_bytes(16)
    try:
        call = socket.create_connection((host, port), timeout=PATIENCE)
    except TimeoutError:
        return f"no answer within {PATIENCE:.0f} s", True
    except (OSError, ValueError) as error:  # ValueError: of what cannot be a name
        return _why(error), isinstance(error, socket.gaierror)
    with call:
        call.sendall(token)
        server.settimeout(PATIENCE)
        try:
            while True:
                answer, _ = server.accept()
                with answer, contextlib.suppress(OSError):  # a stranger who says nothing
                    answer.settimeout(PATIENCE)
                    if answer.recv(len(token)) == token:
                        return "", False
        except OSError:  # nobody has called here
            return "another machine answers there", False


def _why(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return f"its name is not known here ({error.strerror})"
    return getattr(error, "strerror", None) or first_line(error)
