"""Which processes there are: whether one that wrote its name down is still the one that has it,
whether one still reads what is written, and what one that is started here has said."""

import functools
import math
import os
import pathlib
import select
import subprocess
import sys
import time
from collections.abc import Mapping

from dnd_jax.core.stopping import stop

STDOUT = 1  # the number of the file that standard output is


def nobody_reads(file: int) -> bool:
    """Whether this file is a pipe or socket whose reader is gone."""
    poll = select.poll()
    poll.register(file, 0)
    return bool(poll.poll(0))


@functools.cache
def system() -> str:
    """Names this start of this machine, and in it the table of processes that this one is in:
    containers of one host have several. Two processes with the same value can look each other
    up."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # macOS
        return _output("sysctl", "-n", "kern.bootsessionuuid")


def uptime() -> float:
    """Seconds since this machine started."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def started(pid: int) -> str | None:
    """When the process of this number started, as the system writes it: a number that is used
    again has another value. "" where there is none, None where that cannot be seen."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass  # another user's
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if pathlib.Path("/proc/self/stat").exists():
            return None
        state, _, since = _output("ps", "-o", "stat=,lstart=", "-p", str(pid)).partition(" ")
    else:
        fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
        state, since = fields[0], fields[19]
    return "" if state[:1] in ("Z", "X") else since.strip() or None  # dead, though not yet buried


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def of_module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in a Python of its own, without the working directory
    among the places of modules: a user's random.py there would be run in the place of Python's."""
    root = str(pathlib.Path(__file__).parents[2])
    run = f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    code = f"import runpy, sys; sys.path.append({root!r}); {run}"
    return [sys.executable, "-P", "-c", code, *arguments]


def finished(
    command: list[str],
    environment: Mapping[str, str] | None = None,
    seconds: float = math.inf,
) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command, which ends with this process. Raises TimeoutError
    where it takes more seconds, other kinds of OSError where it cannot be started."""
    last = time.monotonic() + seconds
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        while True:
            stop.check()
            try:
                out, err = process.communicate(timeout=0.5)
                return process.returncode, out, err
            except subprocess.TimeoutExpired:
                if time.monotonic() > last:
                    raise TimeoutError(f"{command[0]}: not done in {seconds:g} seconds") from None
    finally:
        if process.poll() is None:
            process.kill()
