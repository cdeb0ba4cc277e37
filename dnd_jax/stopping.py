"""Clean stops: SIGTERM and Ctrl-C become a request that long work honours where nothing is half done."""

import os
import signal
import threading


class Stopped(Exception):
    """A stop was asked for (SIGTERM, Ctrl-C) and everything up to now is saved. agreed: by all processes, at one step."""

    def __init__(self, signum: int, agreed: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.agreed = signum, agreed


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request that long work honours at its next safe point."""

    def __init__(self):
        self.signum: int | None = None
        self.shared = False  # whether several processes stop together, which JAX's preemption service takes care of

    def install(self) -> None:
        """Takes over both signals (main thread only). A second Ctrl-C interrupts at once."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int, frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self.shared and signum == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX's preemption service tells to all processes

    def check(self) -> None:
        """Raises Stopped if a stop was asked for: call it where nothing is half done."""
        if self.signum is not None:
            raise Stopped(self.signum)


stop = StopRequest()
