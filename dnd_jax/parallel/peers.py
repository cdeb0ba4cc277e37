"""The connections between the processes of a run: signs of life, and who is lost."""

import contextlib
import json
import os
import socket
import sys
import threading
import time

from dnd_jax.core.stopping import stop

# Seconds between signs of life, and without one until a peer counts as gone.
BEAT, SILENCE = 5.0, 40.0
LOST = 3  # exit status
RESUME = "start every process again with the same command to resume"
# Exit statuses after which the same command would end alike: a check failed, bad input.
FINAL = (1, 2)


class Line:
    """A socket that carries JSON objects, one a line. Several threads may send."""

    def __init__(self, connection: socket.socket):
        self._socket, self._rest, self._lock = connection, b"", threading.Lock()

    def send(self, **message) -> None:
        # Whoever reads a closed connection notices it.
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def closed(self) -> bool:
        """Whether the other side has closed the connection. Not to be asked while another thread
        receives."""
        before = self._socket.gettimeout()
        try:
            self._socket.settimeout(0)
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self._socket.settimeout(before)

    def receive(self, seconds: float) -> dict | None:
        """The next message. None: the connection is closed, or what came is no JSON object. Raises
        TimeoutError when nothing whole comes within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            while b"\n" not in self._rest:
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                part = self._socket.recv(4096)
                if not part:
                    return None
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\n")
            message = json.loads(line)
        except TimeoutError:
            raise
        except (OSError, ValueError, RecursionError):  # the last of lists 50,000 deep
            return None
        return message if isinstance(message, dict) else None


class Peers:
    """The connections of this process: process 0 has one to every other process, each of the others
    has one to process 0."""

    def __init__(self, process: int, lines: dict[int, Line], names: dict[int, str], token: str):
        # The token is the same in all processes, and new in every start.
        self.process, self.token = process, token
        self._lines, self._names = lines, names
        self._over, self._turn = threading.Event(), threading.Semaphore(0)

    def watch(self) -> None:
        """Starts the threads that send signs of life and expect those of the peers."""
        threading.Thread(target=self._beat, daemon=True, name="peers").start()
        for peer in self._lines:
            threading.Thread(
                target=self._read, args=(peer,), daemon=True, name=f"peer {peer}"
            ).start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._tell()

    def _tell(self, **message) -> None:
        for line in self._lines.values():
            line.send(**message)

    def _read(self, peer: int) -> None:
        while True:
            try:
                message = self._lines[peer].receive(SILENCE)
            except TimeoutError:
                return self._lost(peer, f"was silent for {SILENCE:.0f} s")
            if message is None:
                return self._lost(peer, "is gone: its connection closed")
            if "done" in message:
                return None
            if "turn" in message:
                self._turn.release()
            if "why" in message:
                return self._lost(
                    message.get("peer", peer), message["why"], message.get("status", LOST)
                )

    def _lost(self, peer: int, why: str, status: int = LOST) -> None:
        """Tells the other processes and the user which peer is lost and why, then ends this process
        at once, even from within a collective that never returns."""
        if self._over.is_set():
            return
        self._over.set()
        self._tell(peer=peer, why=why, status=status)
        name = self._names.get(peer, f"process {peer}")
        mend = "" if status in FINAL else f"; {RESUME}"
        print(
            f"\ndnd: {name} {why}; process {self.process} stops{mend}", file=sys.stderr, flush=True
        )
        os._exit(status)

    def pass_turn(self) -> None:
        """Process 0: lets the processes go on that wait in `wait_turn`."""
        self._tell(turn=True)

    def wait_turn(self) -> None:
        """Waits until process 0, or in process 0 any other, passes its turn, however long that
        takes."""
        while not self._turn.acquire(timeout=1.0):
            stop.check()

    def come_by(self) -> None:
        """Process 0: waits until every other process has called this; these do not wait."""
        if self.process:
            self._tell(turn=True)
            return
        for _ in self._lines:
            self.wait_turn()

    def leave(self, why: str = "", status: int = LOST) -> None:
        """Ends this process' part. Without `why`: it is done, and the others go on. With it: it
        stops early, and all others end with `status`."""
        self._over.set()
        if why:
            self._tell(peer=self.process, why=f"stopped: {why}", status=status)
        else:
            self._tell(done=True)


present: Peers | None = None  # of this process, while it is one of several
