"""Tasks are tuned in groups that have room; the groups change nothing."""

import json

import numpy as np
import pytest
from pipeline import TINY, start, tiny_suite, when
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
@pytest.mark.long  # all-reduces of eight devices on two cores: aborts where others use these too
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


@pytest.fixture(scope="module")
def flattened(inputs, tmp_path_factory):
    """Of at most 60 steps."""
    workdir = tmp_path_factory.mktemp("flattened")
    assert collect(inputs, workdir, *FLAT) == 0
    return workdir


LONG = "--config.lora.steps=60", "--config.lora.learning_rate=0.02"
FLAT = *LONG, "--config.lora.flat_window=3"


def test_tasks_end_when_their_loss_has_flattened(inputs, flattened, tmp_path):
    """With the LoRAs that they had at that step of a run of as many; and the loop ends with the
    last of them."""
    steps = json.loads((flattened / "loras/collect.json").read_text())["steps"]
    assert len(set(steps.values())) > 1 and max(steps.values()) < 60
    metrics = (flattened / "collect/metrics.jsonl").read_text().splitlines()
    assert len(metrics) < 60
    assert collect(inputs, tmp_path / "w", *LONG, "--config.lora.checkpoints=60") == 0
    expected, found = loras(tmp_path / "w"), loras(flattened)
    for task, end in steps.items():
        here = sorted(path.name for path in (flattened / "loras" / task).iterdir())
        kept = 4 if len(here) > 1 else 1  # an unseen task's last alone
        assert here == [f"step_{step:06d}" for step in range(end - kept + 1, end + 1)]
    trained = {
        path: x
        for path, x in found.items()
        if tmp_path / "w" / path.relative_to(flattened) in expected
    }
    assert len(trained) == 3 * 4
    for path, tensors in trained.items():
        for key, value in tensors.items():
            same = expected[tmp_path / "w" / path.relative_to(flattened)]
            np.testing.assert_array_equal(value, same[key])


@pytest.mark.slow
@pytest.mark.parametrize(
    "seen", ["group_000/checkpoints/28", "group_001", "group_001/checkpoints/26"]
)
def test_killed_within_a_group_or_between_two(inputs, flattened, tmp_path, seen):
    """It goes on from what was saved, tasks that have ended too, to the same LoRAs."""
    suite, base = inputs
    settings = f"--config.base.path={base}", "--config.base.max_length=128", *FLAT
    words = "collect", TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}", *settings
    process = start(*words, "--config.lora.tasks_at_once=3")
    assert when(process, (tmp_path / "w/collect" / seen).exists), process.communicate()
    process.kill()
    process.communicate()
    assert not (tmp_path / "w/loras/collect.json").exists()
    assert collect(inputs, tmp_path / "w", *FLAT, "--config.lora.tasks_at_once=3") == 0
    ours, expected = loras(tmp_path / "w"), loras(flattened)
    assert len(ours) == len(expected)
    for (path, found), wanted in zip(ours.items(), expected.values(), strict=True):
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=f"{path} {key}")


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
