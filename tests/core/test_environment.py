"""Variables of the environment that JAX would abort on, or answer with a stack, are one line."""

import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
from pipeline import ROOT

from dnd_jax import main
from dnd_jax.core import environment
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.stage import Stage
from dnd_jax.costs.bench.case import Case


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--xla_nonsense=1", "Unknown flag in XLA_FLAGS: --xla_nonsense=1; mend the environment"),
        ("--xla_cpu_enable_fast_math=zz", "Couldn't interpret value zz for flag xla_cpu_enable_f"),
        ("--xla_force_host_platform_device_count=two", "Couldn't interpret value two"),
    ],
)
def test_flags_that_xla_does_not_take(flags, fault, monkeypatch):
    monkeypatch.setenv(environment.XLA, flags)
    with pytest.raises(InputError) as caught:
        environment.check_xla_flags()
    assert f"XLA_FLAGS={flags}: {fault}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("E1126 01:02 3 dnn.cc:4] Unable to register\nF1126 01:02 3 parse_flags.cc:5] Bad", "Bad"),
        ("parse_flags ended without a word", None),
    ],
)
def test_what_xla_says_beside(said, why, monkeypatch):
    monkeypatch.setenv(environment.XLA, "--xla_a=1")
    ended = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(InputError, match=f"--xla_a=1: {why};") if why else nullcontext():
        environment.check_xla_flags()


@pytest.mark.parametrize(
    ("needed", "given", "then"),
    [
        (("torch", "peft"), None, "false"),
        (("torch",), "true", "true"),
        (("matplotlib",), None, None),
    ],
)
def test_beside_pytorch_jax_leaves_room_on_a_gpu(needed, given, then, monkeypatch):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    environment.settle(needed)
    assert os.environ.get(name) == then


def test_flags_that_it_takes(monkeypatch):
    monkeypatch.setenv(environment.XLA, "--xla_cpu_enable_fast_math=false  --xla_dump_to=/tmp/x")
    environment.check_xla_flags()

    def never(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(environment.subprocess, "run", never)
    for flags in ("", "  ", "--xla_force_host_platform_device_count=8"):
        monkeypatch.setenv(environment.XLA, flags)
        environment.check_xla_flags()
    monkeypatch.delenv(environment.XLA)
    environment.check_xla_flags()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            ValueError("invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
            "dnd: JAX cannot start: invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'; ",
        ),
        (ValueError('Invalid value "zz" for JAX flag jax_num_cpu_devices'), "jax_num_cpu_devices;"),
        (ValueError("not of JAX"), None),
    ],
)
def test_what_jax_says_of_its_variables_when_it_is_imported(error, shown, monkeypatch, capsys):
    def refuse(name):
        raise error

    monkeypatch.setattr(Stage, "load", refuse)
    if shown is None:
        with pytest.raises(ValueError, match="not of JAX"):
            main.main(["suite"])
        return
    assert main.main(["suite"]) == 2
    assert shown in capsys.readouterr().err


def test_a_backend_that_is_not_there(monkeypatch, capsys):
    def start(*_):
        raise RuntimeError("Unable to initialize backend 'foo': not in the list of known backends")

    monkeypatch.setattr(main, "_run", start)
    assert main.main(["suite"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dnd: JAX cannot start: Unable to initialize backend 'foo'")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            "Unable to initialize backend 'foo': 'foo' is not in the list of known backends",
            InputError,
        ),
        ("Unknown backend foo", InputError),
        ("Unable to initialize backend 'cuda': INTERNAL: no device", CheckFailed),
        ("something else", type(None)),
    ],
)
def test_a_device_that_fails_is_no_fault_of_the_environment(error, kind):
    assert type(environment.refused(RuntimeError(error))) is kind


@pytest.mark.parametrize("stage", ["", "bench worker"])
def test_a_platform_whose_plugin_is_not_installed(stage):
    """JAX knows "cuda" without it, and ends in an assertion."""
    if find_spec("jax_plugins") is not None:
        pytest.skip("a plugin is installed here")
    code = (
        "import sys, jax; from dnd_jax import main; main._run = lambda *_: jax.devices(); "
        "sys.exit(main.main(['suite']))"
    )
    command = [sys.executable, "-c", code]
    if stage:
        case = Case("mini", str(ROOT / "configs/mini.py"), "forward", 1, "float32")
        spec = {"case": dataclasses.asdict(case), "variant": "direct", "repeats": 1}
        command = [sys.executable, "-m", "dnd_jax.costs.bench.jax_worker", json.dumps(spec)]
    ended = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == (1 if stage else 2), ended.stderr
    said = ended.stderr.strip().splitlines()[-1].removeprefix("dnd: ")
    assert said.startswith("JAX cannot start: JAX_PLATFORMS=cuda: its plugin is not installed")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "devices, plugin, platforms, kept",
    [
        (["/dev/nvidia0"], True, "", True),
        (["/dev/nvidia0"], False, "", False),  # a driver, and a JAX that runs on the CPU
        (["/dev/nvidia0"], True, "cpu", False),
        (["/dev/accel0"], False, "", True),
        (["/dev/vfio/3"], False, "tpu,cpu", True),
        ([], True, "", False),
    ],
)
def test_programs_are_kept_where_a_tpu_or_gpu_is(monkeypatch, devices, plugin, platforms, kept):
    def found(pattern):
        return [name for name in devices if fnmatch.fnmatch(name, pattern)]

    monkeypatch.setattr(environment.glob, "glob", found)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: plugin or None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("DND_JAX_CACHE", "/x")
    monkeypatch.setenv(environment.PROGRAMS, "")  # so that it is put back
    monkeypatch.delenv(environment.PROGRAMS)
    environment.prepare()
    assert os.environ.get(environment.PROGRAMS) == ("/x/programs" if kept else None)
    monkeypatch.setenv(environment.PROGRAMS, "gs://theirs")
    environment.prepare()
    assert os.environ[environment.PROGRAMS] == "gs://theirs"
