"""The whole pipeline as a user runs it: real processes, real MiniLM, transformers and PEFT, on a
tiny setting."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
from other_world import write_other_world
from pipeline import TINY, dnd, start, tiny_suite, when

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.generate import generate_adapter
from dnd_jax.generator.generation import ONE_DEVICE
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.main import main
from dnd_jax.scoring.results import METHODS

pytestmark = pytest.mark.xdist_group("quickstart")  # one process builds what they share
STAGES = ("pretrain", "collect", "generator")
# Columns that tests/tiny.py leaves out: config.controls.
CONTROLS = (
    "in_context",
    "multi_task_tenth",
    "multi_task",
    "random_prompts",
    "empty_prompts",
    "few_shot_8",
    "few_shot_64",
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> pathlib.Path:
    return tiny_suite(tmp_path_factory.mktemp("suite") / "towns")


@pytest.fixture(scope="module")
def finished(suite, tmp_path_factory):
    """An uninterrupted run: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    done = dnd("quickstart", TINY, f"--suite={suite}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir, done.stdout


def test_a_device_that_is_not_there_is_said_before_anything_is_made(suite, tmp_path, capsys):
    words = TINY, f"--suite={suite}", f"--workdir={tmp_path}", "--config.evaluate.device=cuda:9"
    assert main(["quickstart", *words]) == 2
    assert "evaluate.device = 'cuda:9': PyTorch has no such device" in capsys.readouterr().err
    assert not {path.name for path in tmp_path.iterdir()} & {*STAGES, "config.json"}


def numbers(workdir: pathlib.Path) -> dict:
    """results.json without what is measured in seconds."""
    results = json.loads((workdir / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("seconds", "overhead")}


def test_results_table_and_report(suite, finished):
    workdir, printed = finished
    results = json.loads((workdir / "results.json").read_text())
    names = load_suite(suite).unseen
    assert list(results["unseen"]) == [d.name for d in names]
    for scores in results["unseen"].values():
        for measure in (scores, scores["content"], scores["format"]):
            flat = [
                measure[k]
                for k in (
                    "base",
                    "train_mean",
                    "train_best",
                    "mean_adapter",
                    "nearest",
                    "ridge",
                    "wrong_prompts",
                    "tuned",
                )
            ]
            assert all(0 <= x <= 1 for x in (*flat, measure["generated"]["mean"]))
            assert measure["train_best"] >= measure["train_mean"]
            assert set(measure["interval"]) == set(METHODS) & set(measure)
            assert all(0 <= low <= high <= 1 for low, high in measure["interval"].values())
            assert len(measure["generated"]["scores"]) == 2
        assert (
            max(scores["training"].values()) == scores["train_best"]
            and len(scores["training"]) == 3
        )
    assert results["agreement"]["same_answers"] == results["agreement"]["answers"] == 15
    assert results["agreement"]["largest_logit_difference"] < 1e-4
    assert results["overhead"]["ratio"] > 0
    lines = printed.strip().splitlines()
    assert lines[-1] == f"report: {workdir / 'report.html'}"
    assert all(any(line.startswith(d.name) for line in lines) for d in names)
    assert any(line.startswith("No selection: mean of all samples. 2 adapters") for line in lines)
    # Three tables, each of a kind and of all.
    assert sum(line.startswith("  95% interval ") for line in lines) == 6
    page = (workdir / "report.html").read_text()
    assert (
        "greedy decoding" in page
        and "15 of 15 greedy answers of the generated adapters are identical" in page
    )
    assert "Training adapters on every unseen dataset" in page and re.search(
        r"<small>[01]\.\d\d–[01]\.\d\d</small>", page
    )
    assert page.count("data:image/png;base64,") == 3 and "http" not in re.sub(
        r"base64,[^\"]+", "", page
    )


def test_every_adapter_scores_in_pytorch_what_the_table_says(suite, finished):
    """Read by plain transformers and peft, without our evaluation code."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workdir, _ = finished
    results = json.loads((workdir / "results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(workdir / "base")
    for dataset in load_suite(suite).unseen:
        base = AutoModelForCausalLM.from_pretrained(workdir / "base").eval()
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": e.prompt}], tokenize=False, add_generation_prompt=True
            )
            for e in dataset.test
        ]
        encoded = [tokenizer(t, add_special_tokens=False, return_tensors="pt") for t in texts]
        with torch.no_grad():
            plain = base(**encoded[0]).logits
            model = PeftModel.from_pretrained(base, workdir / "adapters" / dataset.name).eval()
            assert (model(**encoded[0]).logits - plain).abs().max() > 1e-4
            answers = [
                model.generate(**e, max_new_tokens=4, do_sample=False)[0, e["input_ids"].shape[1] :]
                for e in encoded
            ]
        texts = [tokenizer.decode(a, skip_special_tokens=True).split() for a in answers]
        exact = np.mean([t == e.response.split() for t, e in zip(texts, dataset.test, strict=True)])
        assert exact == pytest.approx(results["unseen"][dataset.name]["generated"]["scores"][0])


def test_same_command_again_changes_nothing(suite, finished):
    workdir, _ = finished
    before = numbers(workdir)
    again = dnd("quickstart", TINY, f"--suite={suite}", f"--workdir={workdir}")
    assert again.returncode == 0 and numbers(workdir) == before


def test_changed_setting_is_refused_and_listed(suite, finished):
    workdir, _ = finished
    done = dnd(
        "quickstart", TINY, f"--suite={suite}", f"--workdir={workdir}", "--config.lora.rank=3"
    )
    assert done.returncode == 2
    assert "lora.rank: 2 -> 3" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_generate_command_and_function(suite, finished, tmp_path):
    """The seed that a card names draws the same prompts, and so makes the same adapter."""
    workdir, _ = finished
    name = load_suite(suite).unseen[0].name
    prompts = suite / "datasets" / name / "train.jsonl"
    seed = int(re.search(r"seed (\d+)", (workdir / "adapters" / name / "README.md").read_text())[1])
    words = f"--prompts={prompts}", f"--seed={seed}", f"--out={tmp_path / 'a'}"
    done = dnd("generate", f"--generator={workdir}", *words)
    assert done.returncode == 0, done.stderr
    text = tmp_path / "prompts.txt"
    text.write_text(
        "\n".join(json.loads(line)["prompt"] for line in prompts.read_text().splitlines())
    )
    again = generate_adapter(workdir / "generator", text, tmp_path / "b", seed)
    stored = [
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path / "a", workdir / "adapters" / name)
    ]
    assert stored[0] == stored[1]
    # This process has eight virtual devices, hence other threads and another order of summation.
    first, second = load_adapter(tmp_path / "a"), load_adapter(again)
    other = load_adapter(generate_adapter(workdir, text, tmp_path / "c", seed + 1))
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, atol=1e-5)
    assert any(np.abs(other[key] - value).max() > 1e-5 for key, value in first.items())
    manifest = json.loads((workdir / "generator" / "generator.json").read_text())["layout"]
    assert LoraLayout.from_json(manifest).num_tokens == manifest["num_tokens"]


@pytest.mark.slow
def test_any_number_of_devices_makes_the_same_loras(suite, finished, tmp_path):
    """Six tasks on four devices, which they do not divide over; and a run that goes on with another
    number of devices."""
    workdir = tmp_path / "w"
    shutil.copytree(finished[0] / "base", workdir / "base")
    for devices, stopped_at in ((4, None), (1, "6")):
        if stopped_at:
            shutil.rmtree(workdir / "collect" / "checkpoints" / stopped_at)
            (workdir / "loras" / "collect.json").unlink()
        done = dnd("collect", TINY, f"--suite={suite}", f"--workdir={workdir}", devices=devices)
        assert done.returncode == 0, done.stderr[-2000:]
        expected = sorted((finished[0] / "loras").glob("*/*"))
        # Four checkpoints of each training dataset, one of each unseen one.
        assert len(expected) == 3 * 4 + 3
        for folder in expected:
            ours = load_adapter(workdir / folder.relative_to(finished[0]))
            for key, value in load_adapter(folder).items():
                np.testing.assert_allclose(ours[key], value, atol=1e-5, err_msg=f"{folder} {key}")
    scores = [
        json.loads((w / "loras" / "collect.json").read_text())["exact_match"]
        for w in (workdir, finished[0])
    ]
    assert scores[0] == scores[1]
    lines = [
        [json.loads(x) for x in (w / "collect" / "metrics.jsonl").read_text().splitlines()]
        for w in (workdir, finished[0])
    ]
    assert [x["loss"] for x in lines[0][:6]] == pytest.approx(
        [x["loss"] for x in lines[1]], rel=1e-4
    )


def test_a_generator_split_over_devices_makes_the_same_adapter(suite, finished):
    workdir, mesh = finished[0], freeze(load_file("configs/default.py")).mesh
    one, split = (
        TrainedGenerator(workdir, m)
        for m in (ONE_DEVICE, dataclasses.replace(mesh, fsdp=2, tensor=2))
    )
    kernel, part = (
        g.params["decoder"]["stage_0"]["conv1w"].addressable_shards for g in (one, split)
    )
    assert len(part) == 4 and part[0].data.size < kernel[0].data.size
    drawn = one.draw([e.prompt for e in load_suite(suite).unseen[0].train], 0)
    expected = one.tensors(drawn)
    for key, value in split.tensors(drawn).items():
        np.testing.assert_allclose(
            value, expected[key], atol=1e-6 * np.abs(expected[key]).max(), err_msg=key
        )


def interrupted_runs(suite, workdir, signals) -> int:
    """Starts the same command again and again, each time sending a signal once that stage has begun
    to save. Returns restarts."""
    restarts = 0
    for stage, signum in signals:
        process = start("quickstart", TINY, f"--suite={suite}", f"--workdir={workdir}")
        reached = when(
            process, lambda stage=stage: any((workdir / stage / "checkpoints").glob("[0-9]*"))
        )
        if reached:
            process.send_signal(signum)
        _, error = process.communicate(timeout=300)
        assert reached, f"ended before {stage}: {error[-2000:]}"
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 0, signal.SIGINT: 130}[signum]
        assert process.returncode == expected, error[-2000:]
        if signum != signal.SIGKILL:
            assert "resume with: dnd quickstart" in error
        restarts += 1
    return restarts


@pytest.mark.slow
def test_killed_in_every_stage_ends_with_the_same_numbers(suite, finished, tmp_path):
    workdir = tmp_path / "killed"
    assert interrupted_runs(suite, workdir, [(stage, signal.SIGKILL) for stage in STAGES]) == 3
    done = dnd("quickstart", TINY, f"--suite={suite}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(workdir) == numbers(finished[0])
    for name in ("generator/model.safetensors", "base/model.safetensors"):
        assert (workdir / name).read_bytes() == (finished[0] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_stopped_in_every_stage_ends_with_the_same_numbers(suite, finished, tmp_path):
    """By Ctrl-C and by a scheduler, in turn."""
    workdir = tmp_path / "stopped"
    signals = zip(STAGES, (signal.SIGINT, signal.SIGTERM, signal.SIGINT), strict=True)
    assert interrupted_runs(suite, workdir, signals) == 3
    # Once more, in the middle of scoring.
    process = start("quickstart", TINY, f"--suite={suite}", f"--workdir={workdir}")
    assert when(process, lambda: (workdir / "evaluation.json").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    done = dnd("quickstart", TINY, f"--suite={suite}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(workdir) == numbers(finished[0])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_another_world_at_full_size(tmp_path):
    """Other words, other templates, 7 relations x 6 forms: the embedded setting as it is, on a
    suite that the library never saw."""
    suite = write_other_world(tmp_path / "towns")
    done = dnd(
        "quickstart",
        "--config=configs/mini.py",
        f"--suite={suite}",
        f"--workdir={tmp_path / 'w'}",
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    mean = json.loads((tmp_path / "w" / "results.json").read_text())["mean"]
    assert mean["tuned"] >= 0.95 and mean["wrong_prompts"] <= 0.1 and mean["train_best"] <= 0.2
    assert mean["generated"]["mean"] >= 0.8 and mean["generated"]["mean"] > mean["nearest"] + 0.5


@pytest.mark.slow
def test_several_seeds(suite, tmp_path):
    done = dnd("quickstart", TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}", "--seeds=0,1")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["seeds"] == [0, 1] and set(results["runs"]) == {"0", "1"}
    both = [
        np.mean([e["generated"]["mean"] for e in run["unseen"].values()])
        for run in results["runs"].values()
    ]
    assert results["mean"]["generated"]["by_seed"] == pytest.approx(both)
    assert results["mean"]["generated"]["mean"] == pytest.approx(np.mean(both))
    assert (tmp_path / "w" / "seed_1" / "generator" / "generator.json").exists()


@pytest.mark.slow
def test_seeds_may_share_the_loras_of_the_first(suite, finished, tmp_path):
    """Then a seed is another generator and other draws of prompts, asked the same questions."""
    workdir = shutil.copytree(finished[0], tmp_path / "w")
    more = f"--workdir={workdir}", "--seeds=0,1", "--share"
    done = dnd("quickstart", TINY, f"--suite={suite}", *more)
    assert done.returncode == 0, done.stderr[-2000:]
    other = workdir / "seed_1"
    made = {path.name for path in other.iterdir() if path.is_dir()}
    assert not made & {"suite", "pretrain", "base", "collect", "loras", "controls"}
    results = json.loads((workdir / "results.json").read_text())
    first, second = results["runs"].values()
    for name, entry in first["unseen"].items():
        for method in ("base", "tuned", "mean_adapter"):
            assert entry[method] == second["unseen"][name][method], (name, method)
    name = next(iter(first["unseen"]))
    ours, theirs = (load_adapter(folder / "adapters" / name) for folder in (workdir, other))
    assert any((ours[key] != theirs[key]).any() for key in ours)
    again = dnd("evaluate", f"--workdir={other}")  # by what the seed remembers
    assert again.returncode == 0, again.stderr[-2000:]


@pytest.mark.slow
def test_stage_by_stage_equals_quickstart(suite, finished, tmp_path):
    for stage in ("pretrain", "collect", "train", "evaluate"):
        done = dnd(stage, TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}")
        assert done.returncode == 0, (stage, done.stderr[-2000:])
    assert numbers(tmp_path / "w") == numbers(finished[0])


@pytest.mark.slow
def test_harness_stage_on_a_finished_run(suite, finished):
    """The harness's scores of the suite's questions are those of results.json, in the same columns;
    again, nothing is scored."""
    workdir, _ = finished
    arguments = ("lm-eval", TINY, f"--suite={suite}", f"--workdir={workdir}")
    done = dnd(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads((workdir / "lm_eval.json").read_text())
    ours = json.loads((workdir / "results.json").read_text())
    assert list(theirs["unseen"]) == list(ours["unseen"])
    for title, entry in theirs["unseen"].items():
        expected = ours["unseen"][title]
        for key in (
            "base",
            "train_mean",
            "train_best",
            "training",
            "nearest",
            "generated",
            "wrong_prompts",
            "tuned",
            "interval",
        ):
            assert entry[key] == expected[key], (title, key)
    before = (workdir / "lm_eval" / "scores.json").stat().st_mtime_ns
    again = dnd(*arguments)
    assert (
        again.stdout == done.stdout
        and (workdir / "lm_eval" / "scores.json").stat().st_mtime_ns == before
    )


@pytest.mark.slow
@pytest.mark.long
def test_another_condition_form_and_an_unlabeled_pool(suite, finished, tmp_path):
    """Answers in the condition; an unseen task that has prompts alone has no tuned reference, and
    no such condition."""
    by_answer = ("quickstart", TINY, "--config.condition.form=response")
    done = dnd(*by_answer, f"--suite={suite}", f"--workdir={tmp_path / 'answers'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The condition is of the form 'response'" in done.stdout
    prompts = suite / "datasets" / load_suite(suite).unseen[0].name / "train.jsonl"
    adapters = []
    for run in (tmp_path / "answers", finished[0]):
        adapters.append(
            load_adapter(generate_adapter(run, prompts, tmp_path / f"adapter_{run.name}"))
        )
    assert any(np.abs(adapters[0][key] - value).max() > 1e-5 for key, value in adapters[1].items())

    bare = shutil.copytree(suite, tmp_path / "bare")
    path = bare / prompts.relative_to(suite)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    done = dnd("quickstart", TINY, f"--suite={bare}", f"--workdir={tmp_path / 'bare_run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "bare_run" / "results.json").read_text())
    assert ["tuned" in entry for entry in results["unseen"].values()] == [False, True, True]
    done = dnd(*by_answer, f"--suite={bare}", f"--workdir={tmp_path / 'bare_answers'}")
    assert (
        done.returncode == 2
        and f"{path}:1: no response, which config.condition.form = 'response' reads" in done.stderr
    )


@pytest.mark.slow
def test_chunk_target_and_encoder_in_the_graph(suite, tmp_path):
    """The paper's target, and conditions computed inside the train step, through all stages."""
    options = (
        "--config.generator.target=chunk",
        "--config.condition.in_graph=true",
        "--config.generator.features=((0,0,0),(0,0,0))",
    )
    done = dnd("quickstart", TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = {path.name.split("_")[0] for path in (tmp_path / "w" / "embeddings").iterdir()}
    assert kinds == {"ids", "means"}  # no states are kept


@pytest.mark.slow
def test_four_devices_and_one_training_dataset(suite, tmp_path):
    """The paper's visual setting has one: a warning, and every stage goes through. Three tasks do
    not divide over four devices."""
    small = shutil.copytree(suite, tmp_path / "small")
    described = json.loads((small / "suite.json").read_text())
    described |= {"train": described["train"][:1], "unseen": described["unseen"][:2]}
    (small / "suite.json").write_text(json.dumps(described))
    done = dnd("quickstart", TINY, f"--suite={small}", f"--workdir={tmp_path / 'w'}", devices=4)
    assert done.returncode == 0, done.stderr[-2000:]
    warning = (
        f"warning: {described['train'][0]}: is the only training dataset: the generator cannot "
        "learn what prompts mean"
    )
    assert warning in done.stderr
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    for entry in results["unseen"].values():
        assert set(METHODS) - set(entry) == {"ridge", *CONTROLS}
    assert {entry["nearest_dataset"] for entry in results["unseen"].values()} == {
        described["train"][0]
    }
