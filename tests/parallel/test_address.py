"""Where processes meet: process 0 finds out whether JAX could, before JAX ends in an abort."""

import contextlib
import socket
import threading

import pytest

from dnd_jax.core.errors import InputError, Missing
from dnd_jax.parallel import address, rendezvous


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


GOOD = ["127.0.0.1", "localhost", "0.0.0.0", *(["[::1]"] if _has_ipv6() else [])]


@pytest.mark.parametrize("host", GOOD)
def test_process_0_reaches_itself(host):
    port = free_port()
    for _ in range(2):  # and leaves the port free
        address.check_own(address.given(f"{host}:{port}"))


@pytest.mark.parametrize(
    ("coordinator", "fault"),
    [
        (
            "node01:9000",
            "does not reach itself at the coordinator's address node01:9000: its name ",
        ),
        ("node-01.invalid:9000", "its name is not known here"),
        (f"{'x' * 70}.org:9000", "does not reach itself"),
        ("a..b:9000", "does not reach itself"),
        ("192.0.2.1:9000", "does not reach itself"),  # of another network, or of none
        ("", "--coordinator=: expected HOST:PORT"),
        (":9000", "expected HOST:PORT of process 0"),
        ("node01", "expected HOST:PORT of process 0"),
        ("node01:", "expected HOST:PORT of process 0"),
        ("node01:0", "with a port of 1 to 65534"),
        ("node01:65535", "with a port of 1 to 65534"),
        ("node01:-1", "with a port of 1 to 65534"),
        ("node01:٣", "with a port of 1 to 65534"),
        ("http://node01:9000/", "expected HOST:PORT of process 0"),
        ("::1:9000", r"an IPv6 address has brackets, [::1]:9000"),
    ],
)
def test_what_leads_nowhere_is_said(coordinator, fault, monkeypatch):
    monkeypatch.setattr(address, "PATIENCE", 0.5)
    with pytest.raises(InputError) as caught:
        address.check_own(address.given(coordinator))
    assert fault in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("at", ["127.0.0.1", ""])
def test_a_port_in_use(at):
    with socket.create_server((at, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of the coordinator .* cannot be used"):
            address.check_own(address.given(f"127.0.0.1:{port}"))


def test_another_machine_that_answers(monkeypatch):
    """A name that leads elsewhere, where something happens to listen on the same port."""
    monkeypatch.setattr(address, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        there = elsewhere.getsockname()
        call = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda _, **how: call(there, **how))
        with pytest.raises(InputError, match="another machine answers there"):
            address.check_own(address.given(f"10.0.0.7:{free_port()}"))


def test_where_jax_is_told_to_listen(monkeypatch):
    port = free_port()
    monkeypatch.setenv(address.BIND, f"127.0.0.1:{port}")
    address.check_own(address.given(f"localhost:{port}"))
    monkeypatch.setenv(address.BIND, "192.0.2.1:9000")
    with pytest.raises(InputError, match="port 9000 of the coordinator 192.0.2.1:9000 cannot be"):
        address.check_own(address.given(f"localhost:{port}"))
    monkeypatch.setenv(address.BIND, "anywhere")
    with pytest.raises(InputError, match=f"{address.BIND}=anywhere: expected HOST:PORT"):
        address.check_own(address.given(f"localhost:{port}"))


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node01",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, "does not reach itself at the coordinator's address node01:61517"),
        ({"SLURM_JOB_ID": "4095"}, "at the coordinator's address node01:65535"),
        ({"SLURM_JOB_ID": "job"}, "JAX cannot detect the cluster"),
        ({"SLURM_NTASKS": ""}, "JAX cannot detect the cluster"),
        ({"SLURM_PROCID": "3"}, "the cluster says process 3 of 1; give --coordinator"),
        ({"JAX_COORDINATOR_ADDRESS": "node01"}, "JAX_COORDINATOR_ADDRESS=node01: expected HOST:P"),
        ({"JAX_COORDINATOR_PORT": "http"}, "expected HOST:PORT of process 0"),
    ],
)
def test_schedulers_variables(changes, fault, monkeypatch):
    for name, value in {**SLURM, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught, contextlib.ExitStack() as stack:
        stack.enter_context(rendezvous.joined("", 1, 0, True, 1, []))
    assert fault in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_known_a_little_later(monkeypatch):
    """As a pod's name is, whose record comes seconds after its process."""
    real, asked = socket.create_connection, []

    def slow(address, timeout):
        asked.append(address)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(address, timeout)

    monkeypatch.setattr(address.socket, "create_connection", slow)
    monkeypatch.setattr(address.time, "sleep", lambda _: None)
    meeting = address.given(f"127.0.0.1:{free_port()}")
    address.check_own(meeting, patience=60)
    assert len(asked) == 3
    asked.clear()
    with pytest.raises(Missing, match="its name is not known here"):
        address.check_own(meeting)


@pytest.mark.parametrize(
    "said, why",
    [
        (b'{"status": "ok"}\n', "what answers there is no process of this run"),
        (b'{"a":' * 60_000 + b"\n", "left while the others were awaited"),
        (b"HTTP/1.1 400\r\n", "left while the others were awaited"),
    ],
)
def test_another_program_at_the_coordinators_port(said, why):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            call, _ = server.accept()
            with call:
                call.sendall(said)
                call.recv(4096)

        threading.Thread(target=answer, daemon=True).start()
        at = server.getsockname()[1]
        meeting = address.Meeting("127.0.0.1", at, f"127.0.0.1:{at - 1}", "mend --coordinator")
        with pytest.raises(InputError, match=why):
            rendezvous._join(meeting, 2, 1, 5.0, "run")
