"""n processes of one command on one machine, as a cluster would start them: for tests and demos.

python launch/local_multiprocess.py --processes=2 --devices=4 -- dnd train --config=configs/mini.py
--workdir=runs/two

Each process gets --coordinator=127.0.0.1:PORT --processes=N --process=I appended (a free port is
found), and with --devices=K its own K virtual CPU devices. Its lines come out as "[I] line".
SIGTERM and SIGINT are passed on to all. When one fails, the others are stopped with SIGTERM
(SIGKILL after --grace seconds) and its status becomes the exit status.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

DEVICES = "--xla_force_host_platform_device_count"


class OneLineParser(argparse.ArgumentParser):
    """argparse with one clear line instead of the whole usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, not {text!r}")
    return int(text)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments -> (options, command after `--`). Exits with status 2 and one line when they cannot
    be used."""
    parser = OneLineParser(
        "local_multiprocess.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.usage = (
        "local_multiprocess.py --processes=N [--devices=K] [--grace=SECONDS] [--dry-run] -- "
        "COMMAND ..."
    )
    parser.add_argument("--processes", type=positive, required=True, help="how many processes")
    parser.add_argument(
        "--devices",
        type=positive,
        help="virtual CPU devices of each process (default: the machine's own devices)",
    )
    parser.add_argument(
        "--grace",
        type=positive,
        default=60,
        help="seconds from SIGTERM to SIGKILL after a failure (default 60)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    split = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    command = argv[split + 1 :]
    if not command:
        parser.error(
            "no command; give it after --, such as: -- dnd train --config=configs/mini.py "
            "--workdir=runs/two"
        )
    return options, command


def free_port() -> int:
    """A TCP port that nothing listens on now, nor on the one after it: JAX takes the first,
    dnd_jax/parallel/rendezvous.py the second."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def variables(devices: int | None) -> dict[str, str]:
    """The environment variables that each process gets on top of ours: `devices` virtual CPU
    devices."""
    if devices is None:
        return {}
    others = re.sub(rf"{DEVICES}=\S*", "", os.environ.get("XLA_FLAGS", "")).split()
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*others, f"{DEVICES}={devices}"])}


def forward_lines(process: subprocess.Popen, number: int) -> None:
    """Copies a process's output to ours, each line after "[number] ", until it closes."""
    for line in process.stdout:  # universal newlines: the \r of a progress bar ends a line too
        sys.stdout.write(f"[{number}] {line.rstrip()}\n")
        sys.stdout.flush()


def say(text: str) -> None:
    """One line about the processes, on stderr."""
    print(f"local_multiprocess.py: {text}", file=sys.stderr, flush=True)


def described(status: int) -> str:
    """Popen's return code in words."""
    return (
        f"was killed by {signal.Signals(-status).name}"
        if status < 0
        else f"failed with status {status}"
    )


def supervise(processes: list[subprocess.Popen], received: list[int], grace: float) -> int:
    """Waits for all; passes on the signals in `received`; stops all when one fails.

    Returns the first non-zero status (128 + signal for a killed process), else 0.
    """
    first, deadline, asked = 0, float("inf"), False
    while True:
        statuses = [process.poll() for process in processes]
        running = [i for i, status in enumerate(statuses) if status is None]
        failed = next((i for i, status in enumerate(statuses) if status), None)
        if failed is not None and not first:
            first = statuses[failed] if statuses[failed] > 0 else 128 - statuses[failed]
            deadline = time.monotonic() + grace
            if not asked:  # after a signal of ours a failure is no news
                say(
                    f"process {failed} {described(statuses[failed])}"
                    + ("; stopping the others" if running else "")
                )
                for i in running:
                    processes[i].terminate()
        if not running:
            return first
        while received:
            asked, number = True, received.pop(0)
            for i in running:
                processes[i].send_signal(number)
        if time.monotonic() > deadline:
            deadline = float("inf")
            for i in running:
                say(f"process {i} did not stop within {grace} s: SIGKILL")
                processes[i].kill()
        time.sleep(0.05)


def start(commands: list[list[str]], extra: dict[str, str]) -> list[subprocess.Popen]:
    """Starts the commands with `extra` environment variables. Raises OSError, with none left
    running, if one cannot start."""
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **extra, "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C reaches them once: from us
                )
            )
    except OSError:
        for process in processes:
            process.kill()
        raise
    return processes


def main(argv: list[str] | None = None) -> int:
    """Starts the processes; returns the exit status."""
    options, command = parse(sys.argv[1:] if argv is None else argv)
    extra = variables(options.devices)
    flags = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={options.processes}"]
    commands = [[*command, *flags, f"--process={i}"] for i in range(options.processes)]
    if options.dry_run:
        prefix = "".join(f"{key}={shlex.quote(value)} " for key, value in extra.items())
        print("\n".join(f"{prefix}{shlex.join(c)} &" for c in commands) + "\nwait")
        return 0
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        processes = start(commands, extra)
    except OSError as error:
        say(f"{command[0]}: {error.strerror}; is it installed and on PATH?")
        return 2
    pumps = [
        threading.Thread(target=forward_lines, args=(p, i), daemon=True)
        for i, p in enumerate(processes)
    ]
    for pump in pumps:
        pump.start()
    status = supervise(processes, received, options.grace)
    for pump in pumps:
        pump.join(timeout=5)  # a grandchild may hold the pipe open
    return status


if __name__ == "__main__":
    sys.exit(main())
