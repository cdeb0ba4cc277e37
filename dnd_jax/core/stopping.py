"""Clean stops: SIGTERM, Ctrl-C and Google Cloud's notices become a request that long work honours
where nothing is half done.

Compute Engine and Cloud TPU VMs announce on their metadata server that they will be preempted, 30 s
or more ahead, and that their host goes down for maintenance; SIGTERM comes only when the machine
shuts down. A notice sends that SIGTERM at once.
"""

import contextlib
import os
import pathlib
import signal
import threading
import time
import urllib.request
from collections.abc import Callable

from dnd_jax.core.errors import Lost

# Keys of the metadata server, the value that announces the machine's end, and its name for the
# user.
NOTICES = (
    ("preempted", "TRUE", "preemption notice"),
    ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "host maintenance"),
)
LONG_POLL = 60  # seconds until the metadata server answers though nothing changed
TRIES = 5  # failures until a metadata server that never answered counts as absent


class Stopped(Exception):
    """A stop was asked for and everything up to now is saved. by: what asked, if no signal from
    outside did.

    agreed: by all processes, at one step.
    """

    def __init__(self, signum: int, by: str = "", agreed: bool = False):
        super().__init__(by or signal.Signals(signum).name)
        self.signum, self.agreed = signum, agreed


class StopRequest:
    """Turns SIGTERM, the first Ctrl-C and the notices into a request that long work honours at its
    next safe point."""

    def __init__(self):
        self.signum: int | None = None
        self.lost = ""  # why this run may write no more in its folder, and ends at once
        self.notice = ""  # the name of the one that sent SIGTERM
        # whether processes stop together, which JAX's preemption service takes care of, with
        # SIGTERM too
        self.shared = False
        # Whether that service has had a SIGTERM, in any process.
        self.heard: Callable[[], bool] = lambda: False

    def install(self) -> None:
        """Takes over both signals and watches for notices (main thread only). A second Ctrl-C
        interrupts at once."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)
            host = metadata_host()
            for key, value, name in NOTICES if host else ():
                arguments = (f"http://{host}/computeMetadata/v1/instance/{key}", value, name)
                threading.Thread(target=self._watch, args=arguments, daemon=True, name=name).start()

    def _on_signal(self, signum: int, frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self.shared and signum == signal.SIGINT:
            # JAX's preemption service tells all processes of a SIGTERM.
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self, url: str, value: str, name: str) -> None:
        if await_value(url, value) and self.signum is None:
            self.notice = name
            os.kill(os.getpid(), signal.SIGTERM)

    def check(self) -> None:
        """Raises Stopped if a stop was asked for: call it where nothing is half done. Raises Lost
        as `check_lost`."""
        self.check_lost()
        if self.signum is None and self.shared and self.heard():
            self.signum = signal.SIGTERM
        if self.signum is not None:
            raise Stopped(self.signum, self.notice)

    def lose(self, why: str) -> None:
        """Ends the run without another write: its folder is another's now. Any thread may call."""
        self.lost = why
        os.kill(os.getpid(), signal.SIGTERM)

    def check_lost(self) -> None:
        """Raises Lost if the folder is another run's: call it before anything is written there."""
        if self.lost:
            raise Lost(self.lost)


def requeued() -> bool:
    """Whether SLURM or Kubernetes (launch/) start this again when it did not end well."""
    return os.environ.get("DND_REQUEUE") == "1"


def exit_status(signum: int | None) -> int:
    """Of a program that was stopped and can go on."""
    if signum != signal.SIGTERM:
        return 128 + signal.SIGINT
    return os.EX_TEMPFAIL if requeued() else os.EX_OK


def metadata_host() -> str:
    """$GCE_METADATA_HOST, as Google's own libraries read it, or Google's metadata server on
    Google's machines; "" elsewhere."""
    host = os.environ.get("GCE_METADATA_HOST", "")
    with contextlib.suppress(OSError):
        if not host and pathlib.Path("/sys/class/dmi/id/product_name").read_bytes().startswith(
            b"Google"
        ):
            host = "metadata.google.internal"
    return host


def await_value(url: str, value: str, pause: float = 1.0) -> bool:
    """Waits until a key of the metadata server turns to `value`; False if there is no such key.
    pause: seconds between requests.

    A value that was there from the start is no news: GPU machines hear of maintenance an hour
    ahead, and a run that a scheduler starts again meanwhile would stop again and again.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    before, etag, failures = None, "NONE", 0
    while before is not None or failures < TRIES:
        query = urllib.parse.urlencode(
            {"wait_for_change": "true", "timeout_sec": LONG_POLL, "last_etag": etag}
        )
        request = urllib.request.Request(f"{url}?{query}", headers={"Metadata-Flavor": "Google"})
        try:
            with direct.open(request, timeout=LONG_POLL + 10) as answer:
                now, etag = answer.read(64).decode().strip(), answer.headers.get("ETag", "NONE")
        except Exception:  # a server's faults, whatever they are, must not disturb the run
            failures += 1
        else:
            if now == value and before not in (None, value):
                return True
            before, failures = now, 0
        time.sleep(pause * 2 ** min(failures, 6))
    return False


stop = StopRequest()
