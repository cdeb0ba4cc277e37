"""What the processes of a run say of an end, and with which status; who waits for whom."""

import errno
import os
import socket
import threading

import jax
import pytest

from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.stopping import stop
from dnd_jax.parallel import hosts, peers, rendezvous


class Ended(BaseException):
    """In the place of a process' end."""


@pytest.fixture
def ends(monkeypatch) -> list[int]:
    """The statuses that processes ended with."""
    found: list[int] = []

    def end(status: int):
        found.append(status)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    return found


@pytest.mark.parametrize(
    ("status", "helps"), [(0, True), (1, False), (2, False), (3, True), (75, True), (130, True)]
)
def test_who_hears_of_an_end_is_told_to_resume_where_that_helps(ends, capsys, status, helps):
    mine = peers.Peers(0, {}, {1: "process 1 (a, pid 7)"}, "")
    with pytest.raises(Ended):
        mine._lost(1, "stopped: why", status)
    line = capsys.readouterr().err.strip()
    assert line.startswith("dnd: process 1 (a, pid 7) stopped: why; process 0 stops")
    assert (peers.RESUME in line) == helps and ends == [status]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("a file"), 2),
        (CheckFailed("a number"), 1),
        (FileNotFoundError(errno.ENOENT, "none", "a"), 2),
        (OSError(errno.ENOSPC, "full", "a"), 2),
        (OSError(errno.EIO, "input/output error", "a"), 3),
        (OSError(errno.ESTALE, "stale", "a"), 3),
        (ConnectionResetError("reset"), 3),
        (TimeoutError("slow"), 3),
    ],
    ids=str,
)
def test_an_error_ends_all_processes_with_one_status(ends, capsys, monkeypatch, error, status):
    told = []
    mine = peers.Peers(0, {}, {}, "")
    monkeypatch.setattr(mine, "_tell", lambda **message: told.append(message))
    monkeypatch.setattr(mine, "watch", lambda: None)
    monkeypatch.setattr(rendezvous, "_gather", lambda *_: mine)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for of, name in ((peers, "present"), (stop, "shared"), (stop, "heard")):
        monkeypatch.setattr(of, name, getattr(of, name))  # as they are, afterwards
    with pytest.raises(Ended), rendezvous.joined("localhost:9", 1, 0, False, 1.0, []):
        raise error
    assert ends == [status] == [message["status"] for message in told]
    err = capsys.readouterr().err
    assert str(error) in err and (peers.RESUME in err) == (status == 3)


def test_process_0_waits_for_all_others_which_do_not_wait():
    pairs = [socket.socketpair() for _ in range(2)]
    lead = peers.Peers(0, {i + 1: peers.Line(a) for i, (a, _) in enumerate(pairs)}, {}, "run")
    others = [peers.Peers(i + 1, {0: peers.Line(b)}, {}, "run") for i, (_, b) in enumerate(pairs)]
    lead.watch()
    through = threading.Event()
    waiting = threading.Thread(target=lambda: (lead.come_by(), through.set()), daemon=True)
    waiting.start()
    others[0].come_by()
    assert not through.wait(0.5), "one of two has come"
    others[1].come_by()
    assert through.wait(30)
    for other in others:
        other.leave()
    lead.leave()


def test_alone_a_process_has_all_and_waits_for_none():
    assert hosts.share(["a", "b", "c"]) == ["a", "b", "c"]
    hosts.lead_waits()


def test_every_item_is_some_process(monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    found = []
    for process in range(3):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        found += hosts.share(range(8))
    assert sorted(found) == [*range(8)]
