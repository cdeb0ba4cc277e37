"""Where LoRAs are tuned changes nothing: any mesh, any number of processes, killed and gone on."""

import pathlib
import signal

import jax
import numpy as np
import pytest
from pipeline import ROOT, finish, free_port, on, start, start_two, tiny_suite, when
from small_models import write_qwen

from dnd_jax.base.sequences import Sequences
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.loop.training import Options
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.tuning import Task, Tuning
from dnd_jax.main import main

pytestmark = pytest.mark.xdist_group("tuning_places")  # one process builds what they share


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    sizes = {"max_position_embeddings": 128, "num_hidden_layers": 1}
    return tiny_suite(root / "suite"), write_qwen(root / "base", **sizes)


def command(inputs, workdir, *more: str, stage: str = "collect") -> list[str]:
    suite, base = inputs
    settings = f"--config.base.path={base}", "--config.base.max_length=128"
    settings += "--config.evaluate.agreement=False", "--config.lora.checkpoints=2"
    settings += "--config.lora.steps=3", "--config.lora.targets=('q_proj','down_proj')"
    tiny = f"--config={ROOT / 'tests/tiny.py'}"
    return [stage, tiny, f"--suite={suite}", f"--workdir={workdir}", *settings, *more]


def loras(workdir: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    folders = sorted((workdir / "loras").glob("*/*"))
    return {str(path.relative_to(workdir)): load_adapter(path) for path in folders}


def check_alike(ours: pathlib.Path, theirs: pathlib.Path, apart: float = 1e-5) -> None:
    found, expected = loras(ours), loras(theirs)
    assert found.keys() == expected.keys() and len(found) == 3 * 2 + 3
    for path, wanted in expected.items():
        for key, value in wanted.items():
            np.testing.assert_allclose(found[path][key], value, atol=apart, rtol=0, err_msg=path)


def tuned(inputs, workdir, sizes: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The LoRAs of six tasks after three steps on random rows of one length, on a mesh of eight
    devices."""
    raw = load_file("tests/tiny.py")
    raw.lora.update(steps=3, checkpoints=1, targets=("q_proj", "down_proj"))
    raw.mesh.update(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    tuning, rng = Tuning.of(freeze(raw), str(inputs[1])), np.random.default_rng(0)
    rows = [
        Sequences(
            rng.integers(3, 20, (8, 16)).astype(np.int32),
            np.full(8, 11, np.int32),
            np.full(8, 14, np.int32),
        )
        for _ in range(6)
    ]
    tasks = [Task(f"task_{i}", some, 0, some) for i, some in enumerate(rows)]
    lora, _ = tuning.train("tune", workdir / "tune", tasks, workdir / "loras", {}, Options())
    return jax.device_get(lora)


@pytest.fixture(scope="module")
def on_data(inputs, tmp_path_factory):
    """What eight devices make that split the tasks alone."""
    return tuned(inputs, tmp_path_factory.mktemp("on_data"), (8, 1, 1))


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)])
def test_a_mesh_that_splits_the_base_makes_the_same_loras(inputs, on_data, tmp_path, sizes):
    found = tuned(inputs, tmp_path, sizes)
    assert found.keys() == on_data.keys()
    for key, expected in on_data.items():
        assert len(expected) == 6 and np.ptp(expected, axis=0).max() > 1e-3  # tasks differ
        np.testing.assert_allclose(found[key], expected, atol=1e-5, rtol=0, err_msg=key)


@pytest.fixture(scope="module")
def of_one_process(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("of_one_process")
    assert main(command(inputs, workdir, *on(8, 1, 1))) == 0
    return workdir


def two(inputs, workdir, *more: str, stage: str = "collect") -> list[str]:
    """The command of two processes of two devices each."""
    return command(inputs, workdir, *on(2, 2, 1), *more, stage=stage)


def check_both(ended: list[tuple[int, str]], status: int = 0) -> None:
    assert [code for code, _ in ended] == [status] * 2, ended


@pytest.mark.slow
def test_two_processes_make_the_loras_of_one_and_go_on_when_stopped(
    inputs, of_one_process, tmp_path
):
    """Groups of four tasks and two: stopped in the first."""
    groups = "--config.lora.tasks_at_once=4", "--config.lora.save_every=1"
    first, second = start_two(*two(inputs, tmp_path, *groups))
    begun = tmp_path / "collect/group_000/checkpoints/1"
    assert when(first, begun.exists), finish(first, second)
    second.send_signal(signal.SIGTERM)
    ended = finish(first, second)
    check_both(ended)
    if not all("resume with: dnd collect" in out for _, out in ended):
        assert (tmp_path / "loras/collect.json").is_file(), ended
    ended = finish(*start_two(*two(inputs, tmp_path, *groups)))
    check_both(ended)
    assert "LoRA checkpoints: " in ended[0][1] and "LoRA checkpoints: " not in ended[1][1]
    check_alike(tmp_path, of_one_process)


@pytest.mark.slow
def test_other_files_of_one_process_end_both(inputs, tmp_path):
    """Both give the same path of a suite, which is another one on each host."""
    other = tiny_suite(tmp_path / "other")
    rows = next(other.glob("datasets/*/train.jsonl"))
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    address = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--start-timeout=120")
    words = command(("suite", inputs[1]), tmp_path / "w", *on(2, 2, 1), *address)
    runs = []
    for i, suite in enumerate((inputs[0], other)):
        host = tmp_path / f"host{i}"
        host.mkdir()
        (host / "suite").symlink_to(suite)
        runs.append(start(*words, f"--process={i}", devices=2, cwd=host))
    ended = finish(*runs)
    check_both(ended, 2)
    assert any("the suite's files of process 1 differ" in out for _, out in ended), ended
    assert not (tmp_path / "w/loras").exists()
