"""`dnd train` in several real processes, killed and resumed: the same bits as one process that was
never interrupted."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from metadata_server import address as metadata_host
from metadata_server import serving
from pipeline import ROOT, TINY, dnd, free_port, python, random_loras, tiny_suite, when

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze

pytestmark = pytest.mark.xdist_group("rendezvous")  # one process builds what they share
STEPS = 60
ARGUMENTS = (
    f"--config={ROOT / 'tests/tiny.py'}",
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=5",
)
TWO = ("--config.mesh.data=2",)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    """A suite, and random LoRA checkpoints of its training tasks; compiled programs are kept here
    too."""
    root = tmp_path_factory.mktemp("inputs")
    random_loras(
        root / "loras", tiny_suite(root / "suite"), freeze(load_file(str(ROOT / "tests/tiny.py")))
    )
    return root


def start(
    inputs: pathlib.Path,
    workdir: pathlib.Path,
    *more: str,
    devices: int = 1,
    cwd: pathlib.Path = ROOT,
    **variables: str,
) -> subprocess.Popen:
    """`dnd train` in a process of its own with so many devices and environment variables, its
    output in one pipe."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(inputs / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        **variables,
    }
    data = (
        f"--suite={inputs / 'suite'}",
        f"--config.train.checkpoints={inputs / 'loras'}",
        f"--workdir={workdir}",
    )
    given = {word.partition("=")[0] for word in more}  # each flag is given once
    usual = [word for word in (*ARGUMENTS, *data) if word.partition("=")[0] not in given]
    words = ("-m", "dnd_jax", "train", *usual, *more)
    return python(*words, devices=devices, cwd=cwd, stderr=subprocess.STDOUT, **environment)


def start_two(
    inputs: pathlib.Path, workdir: pathlib.Path, *more: str, devices: int = 1, **variables: str
) -> list[subprocess.Popen]:
    address = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--start-timeout=120")
    return [
        start(inputs, workdir, *more, *address, f"--process={i}", devices=devices, **variables)
        for i in range(2)
    ]


def slurm(process: int, job: int) -> dict[str, str]:
    """What srun tells one of two processes."""
    here = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), "SLURM_NTASKS": "2"}
    return {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "127.0.0.1", **here}


def multislice(process: int, port: int) -> dict[str, str]:
    """What GKE tells one of two TPU slices of a host each; JAX believes in TPUs when it is told
    to."""
    of_slice = {
        "TPU_WORKER_HOSTNAMES": "127.0.0.1",
        "TPU_WORKER_ID": "0",
        "JAX_FORCE_TPU_INIT": "1",
    }
    among = {
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": str(process),
    }
    return {**of_slice, **among, "JAX_COORDINATOR_PORT": str(port)}


# A newer JAX may keep its detection where we do not look for it; imported by Python at its start.
ELSEWHERE = """
import types, jax._src.clusters as clusters, jax._src.distributed as distributed
distributed.clusters = types.SimpleNamespace(ClusterEnv=clusters.ClusterEnv)
del clusters.ClusterEnv
"""


def finish(*processes: subprocess.Popen, timeout: float = 300) -> list[tuple[int, str]]:
    """(exit status, output) of each."""
    ended = []
    try:
        for process in processes:
            out, _ = process.communicate(timeout=timeout)
            ended.append((process.returncode, out))
    finally:
        for process in processes:
            process.kill()
    return ended


def named(process: int, run: subprocess.Popen) -> str:
    return f"process {process} ({os.uname().nodename}, pid {run.pid})"


def rows(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "generator/metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def model(workdir: pathlib.Path) -> bytes:
    return (workdir / "generator/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory) -> pathlib.Path:
    """The run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    [(status, out)] = finish(start(inputs, workdir, *TWO, devices=2))
    assert status == 0, out
    return workdir


@pytest.mark.slow
def test_two_processes_equal_one(inputs, uninterrupted, tmp_path):
    ended = finish(*start_two(inputs, tmp_path, *TWO, "--config.train.targets_on=devices"))
    assert [status for status, _ in ended] == [0, 0], ended
    assert "LoRA checkpoints stay on the devices" in ended[0][1]
    # Process 0 has encoded its share of the datasets, and has found the other's.
    assert re.search(r"encode: 100%\S* 2/2 ", ended[0][1]) and " 3/3 " in ended[0][1]
    encoded = [
        sorted(path.name for path in (folder / "embeddings").glob("states_*"))
        for folder in (tmp_path, uninterrupted)
    ]
    assert encoded[0] == encoded[1] and len(encoded[0]) == 3
    assert model(tmp_path) == model(uninterrupted)
    losses = [[row["loss"] for row in rows(folder)] for folder in (tmp_path, uninterrupted)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert "process 1 of 2" in ended[1][1] and "1 of 2 devices" in ended[1][1]
    mesh = "data 2 x fsdp 1 x tensor 1 over 2 devices (2 hosts x 1) (cpu)"
    assert (
        f"mesh: {mesh}; state" in ended[0][1] and f"\nprocess 1 of 2: mesh {mesh}\n" in ended[1][1]
    )
    assert "generator:" not in ended[1][1]  # only process 0 reports


@pytest.mark.slow
def test_two_processes_that_encode_in_the_step_equal_one(inputs, tmp_path):
    """The encoder is on every device, and each process reads the texts of its own samples."""
    words = *TWO, "--config.condition.in_graph=True"
    one, two = tmp_path / "one", tmp_path / "two"
    ended = finish(start(inputs, one, *words, devices=2)) + finish(*start_two(inputs, two, *words))
    assert [status for status, _ in ended] == [0, 0, 0], ended
    losses = [[row["loss"] for row in rows(folder)] for folder in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert model(one) == model(two)
    assert not list((two / "embeddings").glob("states_*"))


@pytest.mark.slow
def test_a_killed_peer_is_named_and_the_run_resumes(inputs, uninterrupted, tmp_path):
    """Where programs are kept, as with a TPU or GPU, each start but the first reads them from the
    run's folder, which both processes see."""
    cache = tmp_path / "cache"
    kept = {"DND_JAX_CACHE": f"{cache}", "JAX_COMPILATION_CACHE_DIR": f"{cache}/programs"}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, second = start_two(inputs, tmp_path, *TWO, **kept)
    assert when(second, lambda: len(rows(tmp_path)) > 12), finish(first, second)
    second.kill()
    killed = time.monotonic()
    [(status, out), _] = finish(first, second, timeout=60)
    assert time.monotonic() - killed < 60
    assert status == 3 and f"pid {second.pid}) is gone" in out and "dnd: process 1 (" in out, out
    assert "start every process again with the same command to resume" in out

    # The coordinator's end is noticed as well, and SIGTERM to one process stops both at one step.
    first, second = start_two(inputs, tmp_path, *TWO, **kept)
    assert when(first, lambda: len(rows(tmp_path)) > 24), finish(first, second)
    first.kill()
    [_, (status, out)] = finish(first, second, timeout=60)
    assert (
        status == 3 and f"dnd: process 0 ({os.uname().nodename}, pid {first.pid}) is gone" in out
    ), out

    first, second = start_two(inputs, tmp_path, *TWO, **kept)
    assert when(first, lambda: len(rows(tmp_path)) > 36), finish(first, second)
    second.send_signal(signal.SIGTERM)
    ended = finish(first, second, timeout=120)
    assert [status for status, _ in ended] == [0, 0], ended
    assert all("stopped by SIGTERM; resume with: dnd train" in out for _, out in ended), ended

    ended = finish(*start_two(inputs, tmp_path, *TWO, **kept))
    assert [status for status, _ in ended] == [0, 0], ended
    assert model(tmp_path) == model(uninterrupted)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
    said = re.search(r"programs: (\d+) of \d+ read from (\S+),", ended[0][1])
    assert int(said[1]) > 0 and said[2] == str(tmp_path / "programs")
    assert not (cache / "programs").exists()


@pytest.mark.slow
def test_killed_processes_go_on_from_copies_on_their_hosts(inputs, uninterrupted, tmp_path):
    """No checkpoint was due: of sharded parameters each process has its part, and its own file."""
    local, sharded = tmp_path / "local", ("--config.mesh.data=1", "--config.mesh.fsdp=2")
    rarely = ("--config.train.save_every=1000", "--config.train.save_every_seconds=0")
    every = (f"--config.train.local_dir={local}", "--config.train.local_every_seconds=1")
    runs = start_two(inputs, tmp_path, *sharded, *rarely, *every)
    copied = lambda: len(rows(tmp_path)) > 20 and len(list(local.glob("*of_2.?.safetensors"))) == 4
    assert when(runs[0], copied), finish(*runs)
    for run in runs:
        run.kill()
    finish(*runs)
    ended = finish(*start_two(inputs, tmp_path, *sharded, *rarely, *every))
    assert [status for status, _ in ended] == [0, 0], ended
    step = int(re.search(r"going on from the copy of step (\d+)", ended[0][1])[1])
    assert 0 < step < STEPS and not list(local.iterdir())
    losses = [[row["loss"] for row in rows(folder)] for folder in (tmp_path, uninterrupted)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_what_only_one_process_cannot_read_sends_both_to_the_step_before(inputs, tmp_path):
    """Files of the newest checkpoint that hold what process 1 keeps alone are cut short."""
    sharded, folder = ("--config.mesh.data=1", "--config.mesh.fsdp=2"), tmp_path / "generator"
    assert all(status == 0 for status, _ in finish(*start_two(inputs, tmp_path, *sharded)))
    done = model(tmp_path)
    (folder / "generator.json").unlink()  # else there is nothing to do
    damaged = list(
        (folder / "checkpoints" / str(STEPS) / "state" / "ocdbt.process_1" / "d").iterdir()
    )
    for path in damaged:
        os.truncate(path, path.stat().st_size // 2)
    (status, out), (other, _) = finish(*start_two(inputs, tmp_path, *sharded))
    assert damaged and status == other == 0, out
    assert f"checkpoints/{STEPS} is damaged" in out and f"going on from step {STEPS - 5}" in out
    assert model(tmp_path) == done and (folder / "checkpoints" / f"{STEPS}.damaged").is_dir()


@pytest.mark.slow
def test_hosts_with_other_files_are_named(inputs, tmp_path):
    """Folders of their own under one name: other contents are refused, other times are not (the
    contents decide)."""
    for case in ("a checkpoint is lacking", "a checkpoint is another", "other times"):
        hosts = [tmp_path / case / f"host{i}" for i in range(2)]
        for host, copy in zip(hosts, (shutil.copy2, shutil.copy), strict=True):
            shutil.copytree(inputs / "loras", host / "loras", copy_function=copy)
        step = next((hosts[1] / "loras").iterdir()) / "step_2"
        if case == "a checkpoint is lacking":
            shutil.rmtree(step)
        elif case == "a checkpoint is another":
            weights = bytearray((step / "adapter_model.safetensors").read_bytes())
            weights[-1] ^= 1  # one bit of the last number
            (step / "adapter_model.safetensors").write_bytes(weights)
        address = (
            f"--coordinator=127.0.0.1:{free_port()}",
            "--processes=2",
            "--start-timeout=120",
            "--config.train.checkpoints=loras",
        )
        workdir, more = tmp_path / case / "workdir", (*TWO, *address)
        runs = [
            start(inputs, workdir, *more, f"--process={i}", cwd=host)
            for i, host in enumerate(hosts)
        ]
        ended = finish(*runs)
        if case == "other times":
            assert not any(status for status, _ in ended), ended
            assert model(workdir)
            continue
        assert all(status for status, _ in ended), ended
        named = "the LoRA checkpoints of process 1 differ from those of process 0"
        assert any(status == 2 and named in out for status, out in ended), ended
        assert not [path for path in (workdir / "targets").glob("*/*") if path.is_dir()]


@pytest.mark.slow
def test_another_mesh_and_number_of_hosts_go_on_with_the_same_losses(
    inputs, uninterrupted, tmp_path
):
    run = start(inputs, tmp_path, *TWO, devices=2)
    assert when(run, lambda: len(rows(tmp_path)) > 20), finish(run)
    run.send_signal(signal.SIGTERM)
    assert finish(run)[0][0] == 0
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    ended = finish(*start_two(inputs, tmp_path, *mesh, devices=2))
    assert [status for status, _ in ended] == [0, 0], ended
    losses = [[row["loss"] for row in rows(folder)] for folder in (tmp_path, uninterrupted)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_a_changed_setting_is_named_unless_it_is_allowed(inputs, tmp_path):
    assert finish(start(inputs, tmp_path, "--config.train.steps=5"))[0][0] == 0
    changed = ("--config.train.steps=10", "--config.train.learning_rate=1e-4")
    [(status, out)] = finish(start(inputs, tmp_path, *changed))
    assert status == 2
    assert (
        "allow them by --allow=train.learning_rate,train.steps" in out
        and "train.steps: 5 -> 10" in out
    ), out
    [(status, out)] = finish(start(inputs, tmp_path, *changed, "--allow=train.steps"))
    refusal = next(line for line in out.splitlines() if line.startswith("dnd: "))
    assert status == 2 and "--allow=train.learning_rate " in refusal, out
    assert "train.steps" not in refusal, out
    [(status, out)] = finish(
        start(inputs, tmp_path, *changed, "--allow=train.steps,train.learning_rate")
    )
    assert status == 0, out
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 11))


def test_who_joined_is_said_when_not_all_do(inputs, tmp_path):
    port = free_port()
    address = (f"--coordinator=127.0.0.1:{port}", "--processes=3", "--start-timeout=8")
    started = [start(inputs, tmp_path, *address, f"--process={i}") for i in (0, 2)]
    ended = finish(*started)
    for status, out in ended:
        assert status == 2
        assert (
            f"2 of 3 processes joined within 8 s: process 0 ({os.uname().nodename}, pid "
            f"{started[0].pid})" in out
        ), out
        assert "missing: 1; start them, or raise --start-timeout" in out
    alone = start(inputs, tmp_path, *address[:2], "--process=1", "--start-timeout=2")
    [(status, out)] = finish(alone)
    fault = f"process 0 was not found at 127.0.0.1:{port} (port {port + 1}) within 2 s"
    assert status == 2 and f"dnd: {named(1, alone)} of 3 is here, but {fault}" in out, out


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["slurm", "multislice", "another JAX"])
def test_two_processes_of_a_detected_cluster_train(inputs, tmp_path, cluster):
    mesh = ("--config.mesh.slices=2", "--config.mesh.data=2")
    more, job = (
        ("--multihost", "--start-timeout=120", "--config.train.steps=3", *mesh),
        random.Random().randrange(2**20),
    )
    variables = [
        slurm(i, job) if cluster != "multislice" else multislice(i, port)
        for port in [free_port()]
        for i in range(2)
    ]
    if cluster == "another JAX":
        (tmp_path / "sitecustomize.py").write_text(ELSEWHERE)
        variables = [{**of, "PYTHONPATH": f"{ROOT}:{tmp_path}"} for of in variables]
    ended = finish(*(start(inputs, tmp_path, *more, devices=2, **of) for of in variables))
    assert [status for status, _ in ended] == [0, 0], ended
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    for i, (_, out) in enumerate(ended):
        assert f"process {i} of 2: waiting for the others" in out
        assert f"process {i} of 2 ({os.uname().nodename}): 2 of 4 devices, cpu" in out, out
    # The devices of a process are a slice, in the order that the run's record says.
    recorded = json.loads((tmp_path / "generator/checkpoints/3/record/metadata").read_text())[
        "mesh"
    ]
    assert recorded["axes"] == {"slice": 2, "data": 2, "fsdp": 1, "tensor": 1}
    assert (
        recorded["devices"][:2] == [0, 1]
        and min(recorded["devices"][2:]) > 1
        and len(set(recorded["devices"])) == 4
    ), recorded


@pytest.mark.slow
def test_who_joined_of_a_detected_cluster_is_said_when_not_all_do(inputs, tmp_path):
    started = time.monotonic()
    more = ("--multihost", "--start-timeout=5")
    # The last ports of JAX's range, where the next one may be another job's.
    job = 4096 * random.Random().randrange(2**8) + 4094
    first, second = (
        start(inputs, tmp_path, *more, **slurm(i, job + i), DND_REQUEUE=str(i)) for i in range(2)
    )
    none = start(inputs, tmp_path, *more)
    (status, out), (other_status, other), (none_status, no) = finish(first, second, none)
    assert time.monotonic() - started < 60
    assert (
        status == 2
        and f"dnd: 1 of 2 processes joined within 5 s: {named(0, first)}; missing: 1; start them"
        in out
    ), out
    # A scheduler that starts again what is not bad input is told another status.
    fault = (
        "process 0 was not found at 127.0.0.1:65535 (port 32767) within 5 s (Connection refused); "
        "start it, or"
    )
    assert other_status == 3 and f"dnd: {named(1, second)} of 2 is here, but {fault}" in other, (
        other
    )
    assert (
        none_status == 2
        and "dnd: no cluster was detected; give --coordinator, --processes and --process\n" in no
    ), no
    assert not any("Traceback" in text or "***" in text for text in (out, other, no))


def test_processes_of_different_runs_do_not_start(inputs, tmp_path):
    address = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--start-timeout=60")
    odd = [
        start(inputs, tmp_path, *address, "--process=0"),
        start(inputs, tmp_path, *address, "--process=1", "--config.seed=1"),
    ]
    for status, out in finish(*odd):
        assert (
            status == 2
            and "was started with other arguments, configuration or versions than process 0" in out
        ), out


def test_a_folder_that_is_not_shared_is_named_and_ends_all(inputs, tmp_path):
    address = (
        f"--coordinator=127.0.0.1:{free_port()}",
        "--processes=2",
        "--start-timeout=60",
        *TWO,
    )
    pair = [
        start(inputs, tmp_path / name, *address, f"--process={i}")
        for i, name in enumerate(("zero", "one"))
    ]
    (status, out), (other_status, other_out) = finish(*pair, timeout=120)
    fault = "does not see what process 0 wrote there; give a folder that all hosts share"
    assert (
        other_status == 2
        and f"dnd: --workdir={tmp_path / 'one'}: process 1 (" in other_out
        and fault in other_out
    ), other_out
    assert (
        status == 2  # of all: starting them again mends nothing
        and "dnd: process 1 (" in out
        and f"stopped: --workdir={tmp_path / 'one'}" in out
    ), out


def test_other_stages_run_as_one_process(tmp_path):
    done = dnd(
        "pretrain", TINY, "--coordinator=127.0.0.1:1234", "--processes=2", f"--workdir={tmp_path}"
    )
    assert done.returncode == 2 and "--coordinator: no flag of `dnd pretrain`" in done.stderr


@pytest.mark.slow
def test_a_full_disk_stops_training_and_leaves_the_last_good_step(inputs, uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        [(status, out)] = finish(start(inputs, disk, *TWO, devices=2))
        # The line stands among lines of the checkpoint library's own.
        assert status == 2 and f"dnd: {disk}" in out, out
        assert (
            "cannot write (No space left on device); free some space and run the same command"
            in out
        ), out
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        done = len(rows(disk))
        assert done >= 5
        [(status, out)] = finish(start(inputs, disk, *TWO, devices=2))
        assert status == 0 and "damaged" not in out, out
        assert " 0/60" not in out  # it goes on
        assert model(disk) == model(uninterrupted)
        assert [row["step"] for row in rows(disk)] == list(range(1, STEPS + 1))
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


@pytest.mark.slow
def test_two_processes_go_on_as_one(inputs, uninterrupted, tmp_path, monkeypatch):
    """Two are stopped at one step by a preemption notice that one of them gets."""
    with serving({"preempted": "FALSE"}) as server:
        address = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", *TWO)
        second = start(inputs, tmp_path, *address, "--process=1")
        monkeypatch.setenv("GCE_METADATA_HOST", metadata_host(server))
        first = start(inputs, tmp_path, *address, "--process=0")
        assert when(first, lambda: len(rows(tmp_path)) > 20 and server.answered), finish(
            first, second
        )
        server.set("preempted", "TRUE")
        ended = finish(first, second)
    assert [status for status, _ in ended] == [0, 0], ended
    for by, (_, out) in zip(("preemption notice", "SIGTERM"), ended, strict=True):
        assert f"stopped by {by}; resume with: dnd train" in out, out
    [(status, out)] = finish(start(inputs, tmp_path))
    assert status == 0, out
    losses = [[row["loss"] for row in rows(folder)] for folder in (tmp_path, uninterrupted)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_all(inputs, tmp_path):
    """While prompts are encoded, which may take hours; process 1 waits for its turn."""
    runs = start_two(inputs, tmp_path, *TWO)
    assert when(runs[0], (tmp_path / ".processes").is_file), finish(*runs)
    runs[1].send_signal(signal.SIGTERM)
    ended = finish(*runs, timeout=120)
    assert [status for status, _ in ended] == [0, 0] and not rows(tmp_path), ended
    assert all("stopped: SIGTERM" in out or "stops: SIGTERM" in out for _, out in ended), ended
    assert (
        all(status == 0 for status, _ in finish(*start_two(inputs, tmp_path, *TWO)))
        and len(rows(tmp_path)) == STEPS
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_process_that_died_while_others_were_awaited_may_join_again(inputs, tmp_path):
    address = (
        f"--coordinator=127.0.0.1:{free_port()}",
        "--processes=3",
        "--start-timeout=120",
        "--config.train.steps=2",
    )
    more = (*address, "--config.mesh.data=3", "--config.train.batch_size=6")
    first = start(inputs, tmp_path, *more, "--process=0")
    dies = start(inputs, tmp_path, *more, "--process=1")
    time.sleep(8)
    dies.kill()
    finish(dies)
    ended = finish(first, *(start(inputs, tmp_path, *more, f"--process={i}") for i in (1, 2)))
    assert [status for status, _ in ended] == [0, 0, 0], ended


@pytest.mark.slow
def test_a_single_process_of_a_cluster_stops_as_well(inputs, tmp_path):
    """JAX has its SIGTERM, as it has that of several."""
    long = ("--config.train.steps=100000", "--config.train.save_every=100000")
    run = start(inputs, tmp_path, *long, f"--coordinator=127.0.0.1:{free_port()}", "--processes=1")
    assert when(run, lambda: len(rows(tmp_path)) > 5), finish(run)
    run.send_signal(signal.SIGTERM)
    [(status, out)] = finish(run, timeout=60)
    assert status == 0 and "stopped by SIGTERM; resume with: dnd train" in out, out
    assert [path.name for path in (tmp_path / "generator/checkpoints").iterdir()] == [
        str(rows(tmp_path)[-1]["step"])
    ]


@pytest.mark.slow
@pytest.mark.long
def test_kills_at_random_moments_change_nothing(inputs, tmp_path):
    """SIGKILL anywhere, saves included: never a corrupt or a skipped step, and the same bits in the
    end."""
    steps, count = 160, 4
    settings = (f"--config.train.steps={steps}", "--config.train.save_every=2")
    assert finish(start(inputs, tmp_path / "whole", *settings))[0][0] == 0
    rng, workdir = random.Random(0), tmp_path / "killed"
    kills = saves = 0

    def saving() -> bool:
        folder = workdir / "generator/checkpoints"
        return folder.is_dir() and any("checkpoint-tmp" in path.name for path in folder.iterdir())

    for number, goal in enumerate(sorted(rng.sample(range(5, steps - 10), count))):
        run = start(inputs, workdir, *settings)
        if when(run, lambda goal=goal: len(rows(workdir)) >= goal):
            if number % 3 == 0:
                when(run, saving)
            else:
                time.sleep(rng.uniform(0, 0.05))
            kills += run.poll() is None
        run.kill()
        saves += saving()
        finish(run)
    assert kills == count and saves > 0
    [(status, out)] = finish(start(inputs, workdir, *settings))
    assert status == 0 and "damaged" not in out, out
    assert model(workdir) == model(tmp_path / "whole")
    assert [row["step"] for row in rows(workdir)] == list(range(1, steps + 1))
    assert [r["loss"] for r in rows(workdir)] == [r["loss"] for r in rows(tmp_path / "whole")]
