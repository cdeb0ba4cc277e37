"""Google Cloud's notices end a real run as SIGTERM does; a metadata server that is absent or broken
changes nothing."""

import json
import socket
import threading

import pytest
from metadata_server import PATH, address, serving
from pipeline import TINY, start, tiny_suite, when

from dnd_jax.core import stopping

NOTICE = "TERMINATE_ON_HOST_MAINTENANCE"


class Run:
    """`dnd pretrain` without an end, in a process of its own; killed when the block ends."""

    def __init__(self, suite, workdir):
        self.folder = workdir / "pretrain"
        long = ("--config.pretrain.steps=100000", "--config.pretrain.save_every=100000")
        self.process = start("pretrain", TINY, f"--suite={suite}", f"--workdir={workdir}", *long)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        return (
            [
                json.loads(line)["step"]
                for line in path.read_text().splitlines()
                if line.endswith("}")
            ]
            if path.exists()
            else []
        )

    def goes_on(self) -> bool:
        """Whether it makes ten more steps."""
        goal = len(self.steps()) + 10
        return when(self.process, lambda: len(self.steps()) >= goal)

    def end(self) -> tuple[int, str]:
        """Its exit status and last line."""
        _, error = self.process.communicate(timeout=60)
        return self.process.returncode, error.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_notice_saves_and_the_same_command_goes_on(tmp_path, monkeypatch):
    """One preemption, then a maintenance that the restarted run hears of; the server drops some
    requests at first."""
    suite = tiny_suite(tmp_path / "towns")
    with serving({"preempted": "FALSE", "maintenance-event": "NONE"}, hang_ups=3) as server:
        monkeypatch.setenv("GCE_METADATA_HOST", address(server))
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is for other hosts
        with Run(suite, tmp_path) as run:
            assert when(run.process, lambda: len(server.answered) == 2) and run.goes_on()
            server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # which a run survives
            assert run.goes_on()
            server.set("preempted", "TRUE")
            status, line = run.end()
            assert status == 0 and line.startswith(
                "stopped by preemption notice; resume with: dnd pretrain"
            ), line
            saved = run.steps()[-1]
            assert [path.name for path in (run.folder / "checkpoints").iterdir()] == [str(saved)]

        monkeypatch.setenv("DND_REQUEUE", "1")
        server.answered.clear()
        with Run(suite, tmp_path) as run:
            # The old notice does not stop it.
            assert when(run.process, lambda: len(server.answered) == 2) and run.goes_on()
            server.set("maintenance-event", NOTICE)
            status, line = run.end()
            assert status == 75 and line.startswith(
                "stopped by host maintenance; resume with: dnd pretrain"
            ), line
            assert run.steps()[-1] > saved and run.steps() == list(range(1, run.steps()[-1] + 1))


def test_only_a_new_notice_counts():
    with serving({"maintenance-event": NOTICE}) as server:
        found = []
        url = f"http://{address(server)}{PATH}maintenance-event"
        waiting = threading.Thread(
            target=lambda: found.append(stopping.await_value(url, NOTICE, pause=0.01))
        )
        waiting.start()
        for count, value in ((1, "NONE"), (2, "MIGRATE_ON_HOST_MAINTENANCE"), (3, NOTICE)):
            while len(server.asked) <= count:  # it waits for the next change
                assert waiting.is_alive() and not found
            server.set("maintenance-event", value)
        waiting.join(10)
        assert found == [True] and len(server.asked) == 4


@pytest.mark.parametrize("kind", ["no such key", "hangs up", "no server"])
def test_a_server_without_the_key_is_given_up(kind):
    with (
        serving({} if kind == "no such key" else {"preempted": "TRUE"}, hang_ups=100) as server,
        socket.socket() as free,
    ):
        server.hang_ups = 100 if kind == "hangs up" else 0
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}" if kind == "no server" else address(server)
        assert not stopping.await_value(f"http://{host}{PATH}preempted", "TRUE", pause=0.01)
        assert len(server.asked) == (0 if kind == "no server" else stopping.TRIES)


def test_where_a_metadata_server_is(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "10.0.0.1:8080")
    assert stopping.metadata_host() == "10.0.0.1:8080"
