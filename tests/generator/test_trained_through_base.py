"""`dnd train` with the objective "answers": no LoRAs, any mesh, stopped and gone on."""

import json
import signal

import numpy as np
import pytest
from pipeline import ROOT, dnd, start, tiny_suite, when
from safetensors.numpy import load_file as tensors_of
from small_models import write_qwen

from dnd_jax.generator.generate import load_generator
from dnd_jax.loop.metrics import read_metrics
from dnd_jax.main import main

pytestmark = pytest.mark.xdist_group("answers")  # one process builds what they share


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    sizes = {"max_position_embeddings": 128, "num_hidden_layers": 1}
    return tiny_suite(root / "suite"), write_qwen(root / "base", **sizes)


def command(inputs, workdir, *more: str, steps: int = 6, rate: float = 0.002) -> list[str]:
    suite, base = inputs
    settings = f"--config.base.path={base}", "--config.base.max_length=128"
    settings += "--config.train.objective=answers", "--config.train.answer_rows=3"
    settings += "--config.lora.targets=('q_proj','v_proj')", "--config.train.batch_size=8"
    settings += f"--config.train.steps={steps}", f"--config.train.learning_rate={rate}"
    tiny = f"--config={ROOT / 'tests/tiny.py'}"
    return ["train", tiny, f"--suite={suite}", f"--workdir={workdir}", *settings, *more]


def on(data: int, fsdp: int, tensor: int) -> list[str]:
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]


def trained(workdir) -> dict[str, np.ndarray]:
    return tensors_of(workdir / "generator/model.safetensors")


@pytest.fixture(scope="module")
def one_device(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one_device")
    done = dnd(*command(inputs, workdir))
    assert done.returncode == 0, done.stderr
    return workdir


def test_it_needs_no_loras(inputs, one_device):
    assert not (one_device / "loras").exists()
    rows = read_metrics(one_device / "generator")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["loss"] == row["answers_loss"] for row in rows)
    assert {"exact", "output_mean_square"} <= rows[0].keys()
    assert "target_mean_square" not in rows[0] and "tflop_per_second" not in rows[0]


@pytest.mark.slow
def test_it_learns_to_answer(inputs, tmp_path):
    done = dnd(*command(inputs, tmp_path, steps=60, rate=0.02))
    assert done.returncode == 0, done.stderr
    losses = [row["answers_loss"] for row in read_metrics(tmp_path / "generator")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


def test_what_it_generates_starts_from_what_collecting_starts_from(inputs, one_device):
    """The decoder's output is the distance from A random and B = 0."""
    generator = load_generator(one_device)
    prompts = [f"where is town {i} ?" for i in range(4)]
    tensors = generator.tensors(prompts)
    moved = {key: np.abs(value).max() for key, value in tensors.items()}
    assert all(size > 0 for size in moved.values())
    start = generator.target.decode(np.zeros(generator.target.shape, np.float32))
    assert all(not np.any(value) for key, value in start.items() if ".lora_B." in key)
    assert all(np.any(value) for key, value in start.items() if ".lora_A." in key)


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1), (2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)],
)
def test_any_mesh_trains_the_same_generator(inputs, one_device, tmp_path, sizes):
    assert main(command(inputs, tmp_path, *on(*sizes))) == 0
    found, expected = trained(tmp_path), trained(one_device)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=2e-4, err_msg=key)
    losses = [
        [row["loss"] for row in read_metrics(w / "generator")] for w in (tmp_path, one_device)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_batch_in_parts_is_the_same_step(inputs, one_device, tmp_path):
    done = dnd(*command(inputs, tmp_path, "--config.train.micro_batches=4"))
    assert done.returncode == 0, done.stderr
    for key, value in trained(one_device).items():
        np.testing.assert_allclose(trained(tmp_path)[key], value, atol=2e-4, err_msg=key)


def test_it_goes_on_where_it_was_stopped_to_the_same_bits(inputs, one_device, tmp_path):
    words = command(inputs, tmp_path, "--config.train.save_every=1")
    process = start(*words)
    assert when(process, (tmp_path / "generator/checkpoints/2").exists), process.communicate()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert "resume with: dnd train" in out + err or process.returncode == 0
    assert dnd(*words).returncode == 0
    for key, value in trained(one_device).items():
        np.testing.assert_array_equal(trained(tmp_path)[key], value, err_msg=key)


def test_another_base_or_collection_is_another_generator(inputs, one_device, tmp_path, capsys):
    other = write_qwen(tmp_path / "base", num_hidden_layers=1, hidden_size=32)
    words = command(inputs, one_device, f"--config.base.path={other}")
    assert main(words) == 2
    assert "base" in capsys.readouterr().err
    description = json.loads((one_device / "generator/generator.json").read_text())
    assert description["settings"]["train"]["objective"] == "answers"
    assert len(description["base"]) == 64
