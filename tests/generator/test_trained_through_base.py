"""`dnd train` with the objective "answers": no LoRAs, any mesh, stopped and gone on."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from pipeline import ROOT, dnd, finish, on, start, start_two, tiny_suite, when
from safetensors.numpy import load_file as tensors_of
from small_models import write_qwen

from dnd_jax.generator.trained import load_generator
from dnd_jax.loop.metrics import read_metrics
from dnd_jax.lora.task_step import init_lora
from dnd_jax.main import main

pytestmark = pytest.mark.xdist_group("answers")  # one process builds what they share


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    sizes = {"max_position_embeddings": 512, "num_hidden_layers": 1}
    return tiny_suite(root / "suite"), write_qwen(root / "base", **sizes)


def command(
    inputs, workdir, *more: str, steps: int = 6, rate: float = 0.002, length: int = 128
) -> list[str]:
    suite, base = inputs
    settings = f"--config.base.path={base}", f"--config.base.max_length={length}"
    settings += "--config.train.objective=answers", "--config.train.answer_rows=3"
    settings += "--config.lora.targets=('q_proj','v_proj')", "--config.train.batch_size=8"
    settings += f"--config.train.steps={steps}", f"--config.train.learning_rate={rate}"
    tiny = f"--config={ROOT / 'tests/tiny.py'}"
    return ["train", tiny, f"--suite={suite}", f"--workdir={workdir}", *settings, *more]


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
    validate = "--config.train.validate_every=1"
    done = dnd(*command(inputs, tmp_path, validate, steps=60, rate=0.02))
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "generator")
    for name in ("answers_loss", "held_in_loss"):
        losses = [row[name] for row in rows]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


@pytest.mark.slow
def test_held_in_questions_are_scored_and_change_nothing(inputs, one_device, tmp_path):
    assert main(command(inputs, tmp_path, "--config.train.validate_every=4")) == 0
    rows = read_metrics(tmp_path / "generator")
    scored = {row["step"]: row for row in rows if "held_in_exact" in row}
    assert list(scored) == [1, 4, 6]  # the first and the last one too
    assert all(0 <= row["held_in_exact"] <= 1 < row["held_in_loss"] for row in scored.values())
    for key, value in trained(one_device).items():
        np.testing.assert_allclose(trained(tmp_path)[key], value, atol=2e-4, err_msg=key)
    # What was asked for is no other generator.
    assert main(command(inputs, tmp_path)) == 0


def test_a_decoder_of_zeros_is_what_collecting_starts_from(inputs, one_device):
    """A random, the same as `dnd collect` has, and B = 0."""
    generator = load_generator(one_device)
    start = generator.target.decode(np.zeros(generator.target.shape, np.float32))
    shapes = {matrix.key: matrix.shape for matrix in generator.layout.matrices}
    expected = init_lora(jax.random.fold_in(jax.random.key(0), 1), shapes)
    assert start.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(start[key], value, atol=1e-7, err_msg=key)
    made = generator.tensors([f"where is town {i} ?" for i in range(4)])
    assert all(np.abs(x).max() > 0 for key, x in made.items() if ".lora_B." in key)


LONG = pytest.mark.slow, pytest.mark.long


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 1, 1), marks=LONG),
        pytest.param((2, 2, 2), marks=pytest.mark.slow),
        pytest.param((1, 4, 2), marks=LONG),
    ],
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


@pytest.mark.slow
def test_a_batch_in_parts_is_the_same_step(inputs, one_device, tmp_path):
    done = dnd(*command(inputs, tmp_path, "--config.train.micro_batches=4"))
    assert done.returncode == 0, done.stderr
    for key, value in trained(one_device).items():
        np.testing.assert_allclose(trained(tmp_path)[key], value, atol=2e-4, err_msg=key)


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped_to_the_same_bits(inputs, tmp_path):
    words = [
        command(inputs, tmp_path / name, "--config.train.save_every=1", steps=40) for name in "ab"
    ]
    process = start(*words[0])
    checkpoints = tmp_path / "a/generator/checkpoints"
    assert when(process, (checkpoints / "2").exists), process.communicate()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert "resume with: dnd train" in out + err
    assert not (checkpoints / "40").exists()
    for each in words:
        done = dnd(*each)
        assert done.returncode == 0, done.stderr
    for key, value in trained(tmp_path / "b").items():
        np.testing.assert_array_equal(trained(tmp_path / "a")[key], value, err_msg=key)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_the_generator_of_one_and_go_on_when_stopped(inputs, tmp_path):
    """The base in parts over both. Sums over four devices have another order in two processes."""
    one, two = (
        command(inputs, tmp_path / name, "--config.train.save_every=1", *on(2, 2, 1), steps=20)
        for name in ("one", "two")
    )
    done = dnd(*one, devices=4)
    assert done.returncode == 0, done.stderr
    first, second = start_two(*two)
    begun = tmp_path / "two/generator/checkpoints/2"
    assert when(first, begun.exists), finish(first, second)
    second.send_signal(signal.SIGTERM)
    ended = finish(first, second)
    assert [status for status, _ in ended] == [0, 0], ended
    assert all("resume with: dnd train" in out for _, out in ended), ended
    ended = finish(*start_two(*two))
    assert [status for status, _ in ended] == [0, 0], ended
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "generator")]
        for name in ("one", "two")
    ]
    assert len(losses[1]) == 20
    np.testing.assert_allclose(*losses, rtol=1e-3)
    for key, value in trained(tmp_path / "one").items():
        found = trained(tmp_path / "two")[key]
        np.testing.assert_allclose(found, value, atol=2e-3, err_msg=key)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--config.lora.alpha=3.0", "lora.alpha: 4.0 -> 3.0"),
        ("--config.lora.dtype=bfloat16", "lora.dtype: 'float32' -> 'bfloat16'"),
        ("--config.base.max_length=100", "max_length: 128 -> 100"),
        ("--config.train.answer_rows=4", "train.answer_rows: 3 -> 4"),
    ],
)
def test_other_settings_of_the_base_are_another_generator(inputs, one_device, capsys, more, said):
    words = [
        w for w in command(inputs, one_device) if w.partition("=")[0] != more.partition("=")[0]
    ]
    assert main([*words, more]) == 2
    assert said in capsys.readouterr().err


def test_another_base_is_another_generator(inputs, one_device, tmp_path, capsys):
    other = write_qwen(tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=False)
    words = [w for w in command(inputs, one_device) if "base.path" not in w]
    assert main([*words, f"--config.base.path={other}"]) == 2
    assert "base: '" in capsys.readouterr().err


@pytest.mark.slow
def test_it_goes_on_from_a_generator_of_the_same_loras_alone(inputs, one_device, tmp_path, capsys):
    begin = f"--config.train.init_from={one_device}"
    done = dnd(*command(inputs, tmp_path / "w", begin, steps=1, rate=1e-9))
    assert done.returncode == 0, done.stderr
    for key, value in trained(one_device).items():
        np.testing.assert_allclose(trained(tmp_path / "w")[key], value, atol=1e-6, err_msg=key)
    assert main(command(inputs, tmp_path / "other", begin, "--config.lora.alpha=3.0")) == 2
    assert "its LoRAs have other modules, shapes or scale" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_and_answers_together(inputs, tmp_path):
    """Each sample's loss is the sum of both; the step is that of neither alone."""
    words = command(inputs, tmp_path)
    assert main(["collect", *words[1:]]) == 0
    both = [w.replace("objective=answers", "objective=weights+answers") for w in words]
    assert main([*both, "--config.train.weights_share=0.5"]) == 0
    rows = read_metrics(tmp_path / "generator")
    assert all(row["loss"] > row["answers_loss"] > 0 for row in rows)
    assert {"target_mean_square", "exact"} <= rows[0].keys()
    by_dataset = [v for key, v in rows[0].items() if key.startswith("loss/")]
    assert min(by_dataset) > rows[0]["answers_loss"] / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["distill", pytest.param("weights+distill", marks=pytest.mark.long)]
)
def test_it_learns_what_tuned_loras_answer(inputs, tmp_path, objective):
    """Of LoRA checkpoints, through the base; without them it says what is missing."""
    words = command(inputs, tmp_path, steps=40, rate=0.02)
    words = [w.replace("objective=answers", f"objective={objective}") for w in words]
    done = dnd(*words)
    assert done.returncode == 2 and "loras" in done.stderr, done.stderr
    assert main(["collect", *words[1:], "--config.lora.learning_rate=0.02"]) == 0
    done = dnd(*words, "--config.lora.learning_rate=0.02")
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "generator")
    losses = [row["distill_loss"] for row in rows]
    assert 0 < np.mean(losses[-5:]) < np.mean(losses[:5])
    assert ("target_mean_square" in rows[0]) == (objective != "distill")
    assert "answers_loss" not in rows[0] and "exact" in rows[0]


@pytest.mark.slow
def test_it_learns_what_the_base_answers_behind_examples(inputs, tmp_path):
    """Of answered examples, and needs no LoRA."""
    more = {"steps": 40, "rate": 0.02, "length": 384}
    words = command(inputs, tmp_path, "--config.train.shots=2", **more)
    words = [w.replace("objective=answers", "objective=distill") for w in words]
    done = dnd(*words)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "loras").exists()
    losses = [row["distill_loss"] for row in read_metrics(tmp_path / "generator")]
    assert 0 < np.mean(losses[-5:]) < np.mean(losses[:5])
    done = dnd(*[w.replace("shots=2", "shots=3") for w in words])
    assert done.returncode == 2 and "train.shots: 2 -> 3" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("shots", "said"),
    [
        (500, "config.train.shots = 500 others are to stand before each"),
        pytest.param(11, "lower config.train", marks=pytest.mark.slow),
    ],
)
def test_more_examples_than_there_are_or_have_room(inputs, tmp_path, shots, said):
    words = command(inputs, tmp_path, f"--config.train.shots={shots}")
    done = dnd(*[w.replace("objective=answers", "objective=distill") for w in words])
    assert done.returncode == 2 and said in done.stderr, done.stderr


@pytest.mark.slow
def test_weights_first_then_answers(inputs, tmp_path):
    """The steps before the change are those of a training on weights, and it resumes after it."""
    words = command(inputs, tmp_path, "--config.train.save_every=1")
    assert main(["collect", *words[1:]]) == 0
    assert main([*words, "--config.train.weights_first=4"]) == 0
    rows = read_metrics(tmp_path / "generator")
    of_weights = [row for row in rows if "target_mean_square" in row]
    of_answers = [row for row in rows if "answers_loss" in row]
    assert [row["step"] for row in of_weights] == [1, 2, 3, 4]
    assert [row["step"] for row in of_answers] == [5, 6]
    alone = [w for w in command(inputs, tmp_path / "alone") if "objective" not in w]
    validate = "--config.train.validate_every=6"
    assert main([*alone, f"--config.train.checkpoints={tmp_path / 'loras'}", validate]) == 0
    assert read_metrics(tmp_path / "alone/generator")[-1]["held_in_loss"] > 0
    # From answers back to weights: the parameters keep their meaning.
    back = [*alone, f"--config.train.init_from={tmp_path}", "--config.train.steps=1"]
    back = [w for w in back if not w.startswith(("--workdir", "--config.train.steps=6"))]
    back += [f"--config.train.checkpoints={tmp_path / 'loras'}", f"--workdir={tmp_path / 'back'}"]
    back = [w for w in back if "learning_rate" not in w] + ["--config.train.learning_rate=1e-9"]
    assert main(back) == 0
    then, now = (
        tensors_of(w / "generator/statistics.safetensors") for w in (tmp_path, tmp_path / "back")
    )
    for key in ("mean", "scale"):
        np.testing.assert_array_equal(now[key], then[key], err_msg=key)
    expected = [row["loss"] for row in read_metrics(tmp_path / "alone/generator")]
    assert [row["loss"] for row in of_weights] == expected[:4]
    whole = trained(tmp_path)
    shutil.rmtree(tmp_path / "generator/checkpoints/6")
    (tmp_path / "generator/generator.json").unlink()
    assert main([*words, "--config.train.weights_first=4"]) == 0
    for key, value in whole.items():
        np.testing.assert_array_equal(trained(tmp_path)[key], value, err_msg=key)


@pytest.mark.slow
def test_a_table_without_loras_and_with_them(inputs, tmp_path):
    """The columns made of LoRAs are absent, and come when these are collected."""
    words = command(inputs, tmp_path)
    done = dnd("quickstart", *words[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no LoRA is collected" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    of_loras = {"nearest", "mean_adapter", "train_mean", "train_best", "tuned"}
    for entry in results["unseen"].values():
        assert not of_loras & entry.keys() and {"generated", "wrong_prompts"} <= entry.keys()
    assert (tmp_path / "report.html").is_file()
    assert main(["collect", *words[1:]]) == 0
    done = dnd("evaluate", *words[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(of_loras <= entry.keys() for entry in results["unseen"].values())
