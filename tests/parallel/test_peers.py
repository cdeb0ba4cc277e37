"""What processes of a run tell each other."""

import socket
import threading

from dnd_jax.parallel import hosts
from dnd_jax.parallel.peers import Line, Peers


def test_process_0_waits_for_all_others_which_do_not_wait():
    pairs = [socket.socketpair() for _ in range(2)]
    lead = Peers(0, {i + 1: Line(a) for i, (a, _) in enumerate(pairs)}, {}, "run")
    others = [Peers(i + 1, {0: Line(b)}, {}, "run") for i, (_, b) in enumerate(pairs)]
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
