"""A workdir has one writer: who else comes is told who, and a dead one's lock is taken over by
exactly one."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from pipeline import TINY, dnd, start, tiny_suite, when

from dnd_jax.config.load import load_file
from dnd_jax.config.remembered import remembering
from dnd_jax.config.validate import freeze
from dnd_jax.core import lock, processes
from dnd_jax.core.errors import InputError, Lost
from dnd_jax.core.stage import stage_of
from dnd_jax.core.stopping import stop
from dnd_jax.core.workdir import held, timed
from dnd_jax.main import STAGES
from dnd_jax.scoring.measured import measure
from dnd_jax.studies.quickstart import quickstart, run_seed

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
HOLD = """
import sys
from dnd_jax.core.workdir import held
import pathlib
with held(pathlib.Path(sys.argv[1]), "pretrain"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(folder: pathlib.Path) -> subprocess.Popen:
    """A process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def write_lock(folder: pathlib.Path, age: float = 0, **changes) -> pathlib.Path:
    """The lock of a holder on another machine, that was touched so many seconds ago."""
    folder.mkdir(exist_ok=True)
    of = {"token": "0" * 16, "stage": "train", "host": "elsewhere", "system": "another"}
    path = folder / lock.NAME
    path.write_text(json.dumps({**of, "pid": 1, "started": "1", "since": "then", **changes}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_second_writer_says_who_has_it_whatever_the_path_is_called(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    with holding(run) as process:
        for spelling in (run, pathlib.Path("run"), pathlib.Path("../x/run").parents[1] / "link"):
            said = rf"in use by `dnd pretrain` \(process {process.pid} on \S+, since 20\d\d-.*\)"
            spelling = tmp_path / "link" if "link" in str(spelling) else spelling
            with pytest.raises(InputError, match=said), held(spelling, "collect"):
                pass
        process.stdin.close()
    with held(run, "collect"):
        pass
    assert not list(run.iterdir()), "nothing is left"


def test_a_stage_inside_a_stage_shares_its_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with held(tmp_path / "run", "quickstart"):
        with held(tmp_path / "run", "collect"), held(tmp_path / "link", "train"):
            pass
        assert (tmp_path / "run" / lock.NAME).is_file()
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_the_runs_inside_a_run_are_locked_too(tmp_path):
    with holding(tmp_path / "seed_1") as process:
        with pytest.raises(InputError, match=rf"seed_1: in use by .*process {process.pid}"):
            run_seed(None, tmp_path / "seed_1")
        process.stdin.close()


def test_nothing_is_written_before_a_folder_is_held(tmp_path, capsys):
    """Neither the settings of another seed nor what is measured."""
    config = freeze(load_file("tests/tiny.py"))
    with remembering(tmp_path, config):
        pass
    other, then = dataclasses.replace(config, seed=1), (tmp_path / "config.json").stat()
    with holding(tmp_path) as process:
        for run in (
            lambda: quickstart(other, tmp_path, [1]),
            lambda: measure(other, None, "", tmp_path),
        ):
            with pytest.raises(InputError, match=rf"in use by .*process {process.pid}"):
                run()
        process.stdin.close()
    assert (tmp_path / "config.json").stat().st_mtime_ns == then.st_mtime_ns
    assert "remembers otherwise" not in capsys.readouterr().out


CONTEND = """
import os, sys, time, pathlib
from dnd_jax.core.errors import InputError
from dnd_jax.core.lock import locked
folder, other = pathlib.Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
for line in sys.stdin:
    folder = pathlib.Path(line.strip())
    try:
        with locked(folder, "train"):
            print("won", flush=True)
            sys.stdin.readline()
        print("gave it back", flush=True)
    except InputError as error:
        print("in use" if "in use by `dnd train` (process" in str(error) else error, flush=True)
        sys.stdin.readline()
        print("-", flush=True)
"""


def test_of_many_contenders_for_a_dead_ones_lock_exactly_one_wins(tmp_path):
    """Ten processes, forty locks: of a process that is gone, of a machine that is silent, none,
    and what a power cut leaves of one."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = {"host": lock.socket.gethostname(), "system": processes.system(), "pid": dead.pid}
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTEND, tmp_path, str(i)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(10)
    ]
    assert all(process.stdout.readline() == "ready\n" for process in contenders)

    def tell(line: str) -> list[str]:
        for process in contenders:
            print(line, file=process.stdin, flush=True)
        return [process.stdout.readline().strip() for process in contenders]

    for i in range(40):
        folder = tmp_path / str(i)
        folder.mkdir()
        if i % 4 == 0:
            write_lock(folder, **here)
        elif i % 4 == 1:
            write_lock(folder, age=10 * lock.LIMIT)
        elif i % 4 == 2:
            write_lock(folder, age=10 * lock.LIMIT).write_bytes(bytes(100))
            os.utime(folder / lock.NAME, (1, 1))
        said = tell(folder)
        assert sorted(said) == ["in use"] * 9 + ["won"], (i, said)
        assert sorted(tell("")) == ["-"] * 9 + ["gave it back"]
        assert not list(folder.iterdir()), i
    for process in contenders:
        process.stdin.close()
        process.wait(10)


# Kills itself with SIGKILL at the N-th line of the lock's code, while it takes over from a dead
# holder and gives the folder back; then another one must get it at once.
KILLED = """
import os, pathlib, sys
from dnd_jax.core import lock
from kill_points import killed_at
os.fsync = lambda file: None  # hundreds of waits for the disk are not what is tried here
lock._watch = lambda *seen: sys.exit("waits")
point, folder = 0, pathlib.Path(sys.argv[1])
def take():
    with lock.locked(folder, "train"):
        pass
dead = (folder / ".lock").read_bytes()
killed = True
while killed:
    point += 1
    (folder / ".lock").write_bytes(dead)
    os.utime(folder / ".lock", (1, 1))
    killed = killed_at(point, lambda code: code.co_filename == lock.__file__, take)
    with lock.locked(folder, "train"):
        for left in folder.glob(".lock.*"):
            os.utime(left, (1, 1))
    with lock.locked(folder, "train"):
        assert [path.name for path in folder.iterdir()] == [".lock"], list(folder.iterdir())
print(point)
"""


def test_a_contender_killed_at_any_line_keeps_nobody_out(tmp_path):
    write_lock(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and int(done.stdout) > 50, done.stderr
    assert not list((tmp_path / "run").iterdir())


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    here = {"host": lock.socket.gethostname(), "system": processes.system(), "pid": os.getpid()}
    write_lock(tmp_path, **here, started=processes.started(os.getpid()))
    with (
        pytest.raises(InputError, match=f"in use by .*process {os.getpid()}"),
        held(tmp_path, "train"),
    ):
        pass
    write_lock(tmp_path, **here, started="1")
    with held(tmp_path, "train"):
        pass


def test_a_zombie_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 10
    while processes.started(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()
    assert processes.started(process.pid) == "" and processes.started(os.getpid())


def test_a_holder_from_before_this_machine_started_is_gone(tmp_path, monkeypatch):
    """Its process number says nothing then."""
    monkeypatch.setattr(processes, "uptime", lambda: 30.0)
    monkeypatch.setattr(lock, "_watch", lambda *seen: pytest.fail("waits"))
    write_lock(tmp_path, age=60, host=lock.socket.gethostname(), system="before", pid=os.getpid())
    with held(tmp_path, "train"):
        pass


def test_a_holder_on_another_machine_is_gone_when_it_stays_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LIMIT", 1.0)
    path = write_lock(tmp_path)
    started = time.monotonic()
    with held(tmp_path, "collect"):
        assert 0.5 < time.monotonic() - started < 10
    assert "held by `dnd train` (process 1 on elsewhere, since then)" in capsys.readouterr().out

    write_lock(tmp_path)
    threading.Timer(0.3, os.utime, (path,)).start()
    with (
        pytest.raises(InputError, match="in use by `dnd train` .process 1 on elsewhere"),
        held(tmp_path, "collect"),
    ):
        pass


def test_a_holder_gives_signs_of_life_and_stops_when_its_lock_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(stop, "lost", "")
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: signum and signals.append((pid, signum)))
    with held(tmp_path, "train"):
        path = tmp_path / lock.NAME
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        path.unlink()  # by somebody who tidies up: nobody else has the folder
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert json.loads(path.read_text())["pid"] == os.getpid() and not signals
        write_lock(tmp_path)
        while not signals:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    with (
        pytest.raises(Lost, match="another run has taken this one's lock"),
        timed(tmp_path, "train"),
    ):
        stop.check()
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME], "nothing more is written"
    assert json.loads(path.read_text())["host"] == "elsewhere", "the other's lock stays"


def test_without_hard_links_or_rights_it_works_or_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="file/run: cannot write here .Not a directory"),
        held(tmp_path / "file/run", "train"),
    ):
        pass

    def refused(*paths):
        raise OSError(lock.errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with held(tmp_path / "run", "train"):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["stage"] == "train"
        monkeypatch.setattr(lock, "_held", set())
        with pytest.raises(InputError, match="in use by `dnd train`"), held(tmp_path / "run", "x"):
            pass


def test_two_runs_of_one_command(tmp_path):
    """The second one ends with status 2 and changes nothing; after SIGKILL the same command starts
    at once."""
    suite, run = tiny_suite(tmp_path / "towns"), tmp_path / "run"
    long = ("--config.pretrain.steps=100000", "--config.pretrain.save_every=100000")
    command = ("pretrain", TINY, f"--suite={suite}", f"--workdir={run}", *long)
    first = start(*command)
    try:
        assert when(first, lambda: (run / "pretrain/metrics.jsonl").exists())
        second = dnd(*command)
        assert second.returncode == 2 and re.fullmatch(
            rf"dnd: {run}: in use by `dnd pretrain` \(process {first.pid} on \S+, since .*\); .*\n",
            second.stderr,
        ), second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    again = start(*command)
    try:
        assert when(again, lambda: json.loads((run / ".lock").read_text())["pid"] == again.pid, 60)
    finally:
        again.kill()
        again.communicate()


def test_training_asks_for_its_workdir_before_it_takes_a_device(tmp_path):
    """The accelerator belongs to the run that has the workdir: here there is none at all."""
    command = [sys.executable, "-m", "dnd_jax", "train", TINY, f"--workdir={tmp_path}"]
    with holding(tmp_path) as process:
        done = subprocess.run(
            command,
            env=ENVIRONMENT | {"JAX_PLATFORMS": "none"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        process.stdin.close()
    assert done.returncode == 2 and "in use by `dnd pretrain`" in done.stderr, done.stderr


@pytest.mark.parametrize("name", sorted(STAGES))
def test_which_stages_hold_their_workdir(name):
    """Those that write a run's parts; readers, and what only adds a file that is replaced whole,
    do not."""
    stage = stage_of(STAGES[name][0], name)
    writers = {"quickstart", "pretrain", "evaluate", "lm-eval", "ablate"}
    # Process 0 of `collect`, `controls` and `train` holds it for all.
    assert stage.writes == (name in writers)


def test_a_folder_that_renames_no_folders_is_no_workdir(tmp_path, monkeypatch):
    """As GCS FUSE without rename-dir-limit: files yes, folders with something in them no."""
    rename = pathlib.Path.rename

    def refuse(path, target):
        if path.is_dir() and any(path.iterdir()):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return rename(path, target)

    with held(tmp_path / "fine", "train"):
        assert [path.name for path in (tmp_path / "fine").iterdir()] == [".lock"]
    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with held(tmp_path / "fine", "train"):
        pass  # asked once
    said = "cannot be renamed there .*rename-dir-limit=200000"
    with pytest.raises(InputError, match=said), held(tmp_path / "other", "train"):
        pass
    assert not list((tmp_path / "other").iterdir())

    def fail(path, target):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), held(tmp_path / "third", "train"):
        pass  # which may soon be well again
