"""The walk-throughs of docs/ that end in minutes, as they are written there: every line of them, in
a checkout's place."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def block(page: str, text: str) -> str:
    """The fenced block of docs/PAGE which has the text."""
    fenced = re.findall(
        r"^```\w*\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL
    )
    (found,) = (content for content in fenced if text in content)
    return found


def walk(place: pathlib.Path, *blocks: str) -> str:
    """Runs the blocks one after the other, until one of their commands fails, and returns what they
    print."""
    if not (place / "configs").exists():
        shutil.copytree(ROOT / "configs", place / "configs")
        (place / "tests").symlink_to(ROOT / "tests")
    program = place / "bin" / "dnd"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dnd_jax "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join(
        [str(program.parent), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    )
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}", "XLA_FLAGS": ""}
    script = "set -eo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_a_released_generator(tmp_path):
    out = walk(tmp_path, block("RELEASED.md", "cmp X.pth back.pth"))
    assert out.endswith("the same\n") and "starting from the parameters of gen" in out


@pytest.mark.slow
def test_any_other_base(tmp_path):
    (tmp_path / "suite.json").write_text(block("TRAIN.md", '"name": "people"'))
    (tmp_path / "make_loras.py").write_text(block("BASES.md", "get_peft_model"))
    out = walk(tmp_path, block("TRAIN.md", "dnd suite"), block("BASES.md", "python make_loras.py"))
    assert "gemma_adapter on gemma\nmodules attached: 6 of 6" in out and out.endswith(
        "as its matrices say\n"
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_base_of_a_family_of_ours(tmp_path):
    out = walk(tmp_path, block("BASES.md", "dnd pretrain --config=tests/tiny.py"))
    assert (tmp_path / "runs" / "mine" / "results.json").is_file() and "generated" in out
