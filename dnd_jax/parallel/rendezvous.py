"""Several processes as one program: they meet before JAX starts, watch each other while it runs,
and say who is missing.

Process 0 holds a connection to every other one, on a port beside the coordinator's. A missing or
lost peer ends a JAX program with a hang or an abort that names nobody; here every process prints
who is missing, or which peer is gone and exits with status LOST.
"""

import contextlib
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from dnd_jax.core import digests
from dnd_jax.core.errors import CheckFailed, InputError, Lost, Missing, first_line, is_passing, tell
from dnd_jax.core.stopping import Stopped, exit_status, stop
from dnd_jax.parallel import address, peers
from dnd_jax.parallel.address import GIVE, Meeting
from dnd_jax.parallel.peers import BEAT, LOST, RESUME, Line, Peers

_asked = 0.0  # when JAX's preemption service was asked last


def _name(hello: dict) -> str:
    return f"process {hello['process']} ({hello['host']}, pid {hello['pid']})"


def _hello(process: int, run: str) -> dict:
    return {"process": process, "host": socket.gethostname(), "pid": os.getpid(), "run": run}


def _is_hello(message: dict | None) -> bool:
    kinds = {"process": int, "host": str, "pid": int, "run": str}
    return message is not None and all(
        isinstance(message.get(key), kind) for key, kind in kinds.items()
    )


def _detected(seconds: float) -> tuple[Meeting, int, int] | None:
    """(where to meet, number of processes, this one), as `jax.distributed.initialize` is going to
    detect them in this cluster.

    JAX has no public call that says so beforehand; None when the private one is gone. Raises
    InputError without a cluster.
    """
    try:
        from jax._src.clusters import ClusterEnv

        coordinator, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address=os.environ.get(address.ADDRESS),
            num_processes=None,
            process_id=None,
            local_device_ids=None,
            cluster_detection_method=None,
            initialization_timeout=int(seconds),
        )
    except (ImportError, AttributeError, TypeError):
        return None
    # Exception: whatever a scheduler's variables or a metadata server make of themselves.
    except Exception as error:
        raise Missing(f"JAX cannot detect the cluster ({first_line(error)}); {GIVE}") from None
    if None in (coordinator, processes, process):
        raise InputError(f"no cluster was detected; {GIVE}")
    if not 0 <= process < processes:
        raise InputError(f"the cluster says process {process} of {processes}; {GIVE}")
    return address.detected(coordinator), processes, process


def _gather(meeting: Meeting, processes: int, seconds: float, run: str) -> Peers:
    """What process 0 does: it waits until all others have joined."""
    hello = _hello(0, run)
    joined, lines = {0: hello}, {}

    def refuse(error: InputError) -> InputError:
        for line in lines.values():
            line.send(refused=str(error), missing=isinstance(error, Missing))
        return error

    deadline = time.monotonic() + seconds
    try:
        server = address.listen(meeting.port, processes)
    except OSError as error:
        raise InputError(
            f"port {meeting.port}, beside that of the coordinator {meeting.coordinator}, cannot "
            f"be used: {error.strerror}; "
            f"{meeting.mend}"
        ) from None
    with server:
        while len(joined) < processes:
            stop.check()
            for number in [number for number, line in lines.items() if line.closed()]:
                del joined[number], lines[number]  # it may be started again
            try:
                server.settimeout(min(0.5, max(0.01, deadline - time.monotonic())))
                connection, _ = server.accept()
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                here = ", ".join(_name(joined[i]) for i in sorted(joined))
                missing = ", ".join(str(i) for i in range(processes) if i not in joined)
                why = (
                    f"{len(joined)} of {processes} processes joined within {seconds:.0f} s: "
                    f"{here}; missing: {missing}"
                )
                raise refuse(Missing(f"{why}; start them, or raise --start-timeout")) from None
            line = Line(connection)
            try:
                other = line.receive(5.0)
            except TimeoutError:
                other = None
            if not _is_hello(other):
                continue  # a stranger on this port
            if not 0 < other["process"] < processes or other["process"] in joined:
                line.send(
                    refused=f"{_name(other)} joined, but --process is one of 0 to "
                    f"{processes - 1}, each once"
                )
                continue
            if other["run"] != run:
                lines[other["process"]] = line
                what = "was started with other arguments, configuration or versions than"
                raise refuse(InputError(f"{_name(other)} {what} {_name(hello)}"))
            joined[other["process"]], lines[other["process"]] = other, line
    names = {i: _name(h) for i, h in joined.items()}
    token = secrets.token_hex(8)
    for line in lines.values():
        line.send(names=names, token=token)
    return Peers(0, lines, names, token)


def _join(meeting: Meeting, processes: int, process: int, seconds: float, run: str) -> Peers:
    """What every other process does: it joins process 0."""
    hello, deadline = _hello(process, run), time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((meeting.host, meeting.port), timeout=5.0)
            break
        except (OSError, ValueError) as error:  # ValueError: of what cannot be a name
            if time.monotonic() > deadline:
                why = getattr(error, "strerror", None) or error
                raise Missing(
                    f"{_name(hello)} of {processes} is here, but process 0 was not found at "
                    f"{meeting.coordinator} (port {meeting.port}) within {seconds:.0f} s ({why}); "
                    f"start it, or {meeting.mend}"
                ) from None
            stop.check()
            time.sleep(0.2)
    line = Line(connection)
    line.send(**hello)
    # Process 0, which may have started later, waits no longer.
    answer, until = None, time.monotonic() + seconds + 5.0
    while time.monotonic() < until:
        stop.check()
        try:
            answer = line.receive(0.5)
            break
        except TimeoutError:
            continue
    if answer is None:
        raise Missing(
            f"process 0 at {meeting.coordinator} left while the others were awaited; {RESUME}"
        )
    if "refused" in answer:
        raise (Missing if answer.get("missing") else InputError)(answer["refused"])
    if not {"names", "token"} <= answer.keys():
        raise InputError(
            f"{meeting.coordinator} (port {meeting.port}): what answers there is no process of "
            f"this run; {meeting.mend}"
        )
    return Peers(
        process, {0: line}, {int(i): name for i, name in answer["names"].items()}, answer["token"]
    )


def _meeting_of_lead() -> Meeting:
    """Where to meet process 0, when JAX has started already and nobody was told: process 0 chooses
    an address and sends it to all over JAX's own network."""
    with contextlib.ExitStack() as stack:
        probe = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        try:
            # Nothing is sent: the system says which of its addresses faces outwards.
            probe.connect(("192.0.2.1", 9))
            host = probe.getsockname()[0]
        except OSError:
            host = "127.0.0.1"
        free = stack.enter_context(socket.create_server(("", 0)))
        text = f"{host}:{free.getsockname()[1] - 1}"
    padded = np.frombuffer(text.encode().ljust(64), np.uint8)
    return address.given(
        bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode().strip()
    )


@contextlib.contextmanager
def joined(
    coordinator: str,
    processes: int,
    process: int,
    detect: bool,
    start_timeout: float,
    run: Sequence[str],
) -> Iterator[None]:
    """The processes of a run, for as long as the block lasts. Must be entered before JAX uses a
    device.

    coordinator, processes, process: HOST:PORT of process 0, how many there are, and which this is;
    with `detect` they are taken from the cluster (Cloud TPU, GKE, SLURM). Neither: this process
    alone. run: what must be the same everywhere. Raises InputError naming who joined when not all
    do within start_timeout seconds (Missing). An exception in the block ends all processes.
    """
    if not coordinator and not detect:
        yield
        return
    if detect:
        print("detecting the cluster", flush=True)
    try:
        # What JAX detects it gets from nobody else.
        given = () if detect else (coordinator, processes, process)
        found = (
            _detected(start_timeout) if detect else (address.given(coordinator), processes, process)
        )
        if found is None:  # JAX first: a missing process ends in JAX's own words
            jax.distributed.initialize(initialization_timeout=int(start_timeout))
            found = _meeting_of_lead(), jax.process_count(), jax.process_index()
        meeting, processes, process = found
        print(f"process {process} of {processes}: waiting for the others", flush=True)
        digest = digests.of_texts([*run, jax.__version__, digests.of_program()])
        if process == 0:
            if not jax.distributed.is_initialized():
                address.check_own(meeting, start_timeout)
            peers.present = _gather(meeting, processes, start_timeout, digest)
        else:
            peers.present = _join(meeting, processes, process, start_timeout, digest)
        peers.present.watch()
        stop.shared = True
        if not jax.distributed.is_initialized():
            jax.distributed.initialize(*given, initialization_timeout=int(start_timeout))
        stop.heard = _heard_sigterm
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        fault = InputError(f"process {process}: JAX could not start ({first_line(error)})")
        if peers.present is not None:
            peers.present.leave(str(fault))
        raise fault from None
    local = jax.local_devices()
    print(
        f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()}): "
        f"{len(local)} of {jax.device_count()} "
        f"devices, {local[0].device_kind}",
        flush=True,
    )
    try:
        yield
    except (InputError, CheckFailed, Lost, OSError) as error:
        if is_passing(error):
            _end(process, str(error))
        tell(error)
        status = 1 if isinstance(error, CheckFailed) else 2  # of all: no start anew mends it
        peers.present.leave(str(error), status)
        os._exit(status)  # JAX's own shutdown waits for the others, who wait for this one
    except (Stopped, KeyboardInterrupt) as error:
        if isinstance(error, Stopped) and error.agreed:
            peers.present.leave()
            raise
        _end(
            process,
            str(error) or "Ctrl-C",
            exit_status(error.signum) if isinstance(error, Stopped) else LOST,
        )
    except Exception as error:
        reason = first_line(error)
        if "RESOURCE_EXHAUSTED" not in reason:
            # Most likely a peer's end, whose name its connection tells; else the others are told
            # this.
            time.sleep(2 * BEAT)
        traceback.print_exc()
        _end(process, f"{type(error).__name__}: {reason}")
    peers.present.leave()


def _end(process: int, why: str, status: int = LOST) -> None:
    """Ends this process, and with it all others."""
    peers.present.leave(why, status)
    print(f"\ndnd: process {process} stops: {why}; {RESUME}", file=sys.stderr, flush=True)
    os._exit(status)


def _heard_sigterm() -> bool:
    """Whether JAX's preemption service has had a SIGTERM in any process. Before there are steps to
    agree on, JAX has no public call that says so; False when the private one is gone."""
    global _asked
    if time.monotonic() - _asked < 1.0:
        return False
    _asked = time.monotonic()
    try:
        from jax._src.distributed import global_state

        return bool(global_state.client.key_value_try_get("RECEIVED_PREEMPTION_NOTICE"))
    except Exception:  # no such key yet, or no such call
        return False
