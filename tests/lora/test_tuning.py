"""Tasks are tuned in groups that have room; the groups change nothing."""

import json

import numpy as np
import pytest
from pipeline import TINY, tiny_suite
from small_models import write_qwen

from dnd_jax.lora import tuning
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.main import main

pytestmark = pytest.mark.xdist_group("tuning")  # one process builds what they share


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuning")
    return tiny_suite(root / "suite"), write_qwen(root / "base", max_position_embeddings=128)


def collect(inputs, workdir, *more: str) -> int:
    suite, base = inputs
    settings = f"--config.base.path={base}", "--config.base.max_length=128"
    return main(["collect", TINY, f"--suite={suite}", f"--workdir={workdir}", *settings, *more])


def loras(workdir) -> dict:
    return {path: load_adapter(path) for path in sorted((workdir / "loras").glob("*/*"))}


@pytest.fixture(scope="module")
def at_once(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("at_once")
    assert collect(inputs, workdir) == 0
    return workdir


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_groups_make_the_same_loras(inputs, at_once, tmp_path, size):
    """Also where the last group is smaller."""
    assert collect(inputs, tmp_path / "w", f"--config.lora.tasks_at_once={size}") == 0
    ours, expected = loras(tmp_path / "w"), loras(at_once)
    assert len(ours) == len(expected) == 3 * 4 + 3
    for (path, found), wanted in zip(ours.items(), expected.values(), strict=True):
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=f"{path} {key}")
    scores = [
        json.loads((w / "loras/collect.json").read_text())["exact_match"]
        for w in (tmp_path / "w", at_once)
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_as_many_as_have_room_and_the_same_when_it_goes_on(inputs, tmp_path, monkeypatch):
    asked, one = [], "--config.mesh.tensor=8"
    monkeypatch.setattr(tuning, "bytes_of_task", lambda *_: 100)
    monkeypatch.setattr(tuning, "free_bytes", lambda _: asked.append(1) or 500)  # 0.6 of it: 3
    assert collect(inputs, tmp_path / "w", one) == 0
    groups = sorted(path.name for path in (tmp_path / "w/collect").glob("group_*"))
    assert groups == ["group_000", "group_001"] and asked == [1]
    (tmp_path / "w/loras/collect.json").unlink()
    assert collect(inputs, tmp_path / "w", one) == 0  # by what was chosen first
    assert asked == [1]


def test_a_task_of_more_rows_and_layers_takes_more_room(inputs):
    from dnd_jax.base.architecture import LmConfig
    from dnd_jax.base.sequences import Sequences
    from dnd_jax.config.load import load_file
    from dnd_jax.config.validate import freeze

    def size(layers=2, batch=8, length=32):
        raw = load_file("tests/tiny.py")
        raw.lora.batch_size = batch
        rows = np.zeros((4, length), np.int32), np.full(4, 9, np.int32), np.full(4, 12, np.int32)
        return tuning.bytes_of_task(
            LmConfig(100, 32, 64, layers, 4, 2), freeze(raw).lora, Sequences(*rows)
        )

    assert size() < min(size(layers=3), size(batch=9), size(length=33))
