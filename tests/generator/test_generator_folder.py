"""A generator's folder is of one writing at every instant: no reader mixes two."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from dnd_jax.core.errors import InputError
from dnd_jax.core.tensors import read_safetensors
from dnd_jax.generator.folder import DESCRIPTION, MODEL, STATISTICS, steady, write_generator

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
WRITE = """
import os, pathlib, sys, time
import numpy as np
from dnd_jax.generator import folder
os.fsync = lambda file: None  # hundreds of waits for the disk are not what is tried here
def write(path, number):
    values = np.full(3, number, np.float32)
    shapes = {"x": (values.shape, values.dtype)}
    statistics = {"importance": values}
    folder.write_generator(path, shapes, iter([("x", values)]), statistics, {"number": number})
path = pathlib.Path(sys.argv[1])
"""
# Kills itself with SIGKILL at the N-th line of what writes a generator over another.
KILLED = f"""{WRITE}
from kill_points import killed_at
write(path, 1)
point, killed = 0, True
while killed:
    point += 1
    steps = ("write_generator", "replacing")
    killed = killed_at(point, lambda code: code.co_name in steps, lambda: write(path, 2))
    print(killed, flush=True)
    sys.stdin.readline()  # the test looks
    write(path, 1)
"""
AGAIN_AND_AGAIN = f"""{WRITE}
number = 0
while not (path / "enough").exists():
    number += 1
    write(path, number)
    time.sleep(0.02)
"""


def write(path: pathlib.Path, number: int) -> None:
    values = np.full(3, number, np.float32)
    shapes = {"x": (values.shape, values.dtype)}
    write_generator(path, shapes, iter([("x", values)]), {"importance": values}, {"number": number})


def numbers(folder: pathlib.Path) -> set[int]:
    """What the three files say."""
    tensors = read_safetensors(folder / MODEL)["x"], read_safetensors(folder / STATISTICS)
    return {
        json.loads((folder / DESCRIPTION).read_text())["number"],
        int(tensors[0][0]),
        int(tensors[1]["importance"][0]),
    }


def test_a_writer_killed_at_any_line_leaves_one_generator_or_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = []
    with process:
        while process.stdout.readline() == "True\n":
            found.append(numbers(tmp_path) if (tmp_path / DESCRIPTION).exists() else set())
            print(file=process.stdin, flush=True)
        assert numbers(tmp_path) == {2}
        print(file=process.stdin, flush=True)
    assert process.returncode == 0 and len(found) > 30
    assert {frozenset(of) for of in found} == {frozenset({1}), frozenset(), frozenset({2})}
    names = {"checkpoints", DESCRIPTION, MODEL, STATISTICS}
    assert {path.name for path in tmp_path.iterdir()} == names, "killed writers leave nothing"


def test_a_reader_never_mixes_two(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", AGAIN_AND_AGAIN, tmp_path], env=ENVIRONMENT)
    seen, end = set(), time.monotonic() + 60
    try:
        while len(seen) < 20 and time.monotonic() < end:
            assert process.poll() is None
            if not (tmp_path / DESCRIPTION).exists():
                continue
            try:
                with steady(tmp_path):
                    found = numbers(tmp_path)
            except (InputError, FileNotFoundError):
                continue
            assert len(found) == 1
            seen |= found
    finally:
        (tmp_path / "enough").touch()
        process.wait(60)
    assert len(seen) > 2


def test_a_reader_says_that_a_generator_was_replaced(tmp_path):
    write(tmp_path, 1)
    said = f"{tmp_path}: was replaced while it was read; run"
    with pytest.raises(InputError, match=said), steady(tmp_path):
        write(tmp_path, 2)
    with pytest.raises(InputError, match="no such file"), steady(tmp_path):
        read_safetensors(tmp_path / "absent.safetensors")


def test_a_disk_that_refuses_leaves_the_old_one(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="announced x"):
        write_generator(
            tmp_path, {"x": ((3,), np.float32)}, iter([("x", np.ones(4, np.float32))]), {}, {}
        )
    assert numbers(tmp_path) == {1} and len(list(tmp_path.iterdir())) == 3
