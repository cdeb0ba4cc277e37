"""`dnd evaluate` on imported adapters of small bases: what is kept and what is made anew, and a
base that only PyTorch runs."""

import dataclasses
import html
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
from imported_run import imported_run, write_loras
from pipeline import tiny_suite
from safetensors.numpy import load_file as load_tensors
from safetensors.numpy import save_file
from transformers import (
    AutoModelForCausalLM,
)

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import write_json
from dnd_jax.core.formats import read_numbered, write_numbered
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.train import train
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.main import main
from dnd_jax.scoring.answers import Scorer
from dnd_jax.scoring.candidates import make_candidates
from dnd_jax.scoring.evaluate import evaluate, evaluation_settings, read_kept
from dnd_jax.scoring.lm_eval import lm_eval_stage
from dnd_jax.scoring.measured import measure

pytestmark = pytest.mark.xdist_group("evaluate")  # one process builds what they share


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """3 training tasks, 3 unseen ones of 5 questions; it keeps its folder."""
    return load_suite(tiny_suite(tmp_path_factory.mktemp("suite") / "towns"), 4)


@pytest.fixture(scope="module", params=["qwen2", "gemma"])
def made(request, suite, tmp_path_factory):
    """(config, its file, run folder)."""
    return imported_run(tmp_path_factory.mktemp(request.param), request.param, suite)


only = lambda family: pytest.mark.parametrize("made", [family], indirect=True)


def with_checkpoints(config, root) -> object:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, checkpoints=str(root))
    )


def copied(run: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """A workdir with the generator of another run, and nothing else."""
    shutil.copytree(run / "generator", workdir / "generator")
    return workdir


@pytest.fixture(scope="module")
def scored(made, suite, tmp_path_factory) -> pathlib.Path:
    """A workdir in which all is scored and nothing measured; to be copied."""
    config, _, run = made
    workdir = copied(run, tmp_path_factory.mktemp("scored") / "w")
    assert "agreement" not in evaluate(config, suite, config.base.path, workdir)
    return workdir


@only("qwen2")
def test_agreement_is_at_the_scale_of_the_adapters_and_on_a_sample(
    made, scored, suite, tmp_path, monkeypatch
):
    monkeypatch.setattr("dnd_jax.base.agreement.COMPARED", 3)
    monkeypatch.setattr("dnd_jax.scoring.measured.TIMED", 1)
    config, _, _ = made
    workdir = shutil.copytree(scored, tmp_path / "w")
    asked = dataclasses.replace(config.evaluate, batch_size=2)
    config = dataclasses.replace(config, evaluate=asked)
    one = dataclasses.replace(suite, unseen=suite.unseen[:1])
    result = measure(config, one, config.base.path, workdir)
    agreement = result["agreement"]
    assert (agreement["questions"], agreement["answers"], agreement["same_answers"]) == (5, 3, 3)
    assert (agreement["tokens"], agreement["dtype"]) == (3, "float32")
    assert agreement["largest_logit_difference"] < 1e-3
    assert (result["overhead"]["steps"], result["overhead"]["timed_steps"]) == (2, 1)


@only("qwen2")
def test_a_large_base_is_measured_as_it_is_stored_and_in_parts(
    made, scored, suite, tmp_path, monkeypatch
):
    """bfloat16 over "fsdp": near PyTorch's float32, but seen not to be it."""
    config, _, _ = made
    monkeypatch.setattr("dnd_jax.scoring.measured.LARGE", 1)
    base, workdir = tmp_path / "base", shutil.copytree(scored, tmp_path / "w")
    AutoModelForCausalLM.from_pretrained(config.base.path, dtype=torch.bfloat16).save_pretrained(
        base
    )
    load_tokenizer(config.base.path).save_pretrained(base)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=4, fsdp=2))
    found = measure(config, suite, str(base), workdir, ("agreement",))["agreement"]
    assert found["dtype"] == "bfloat16" and found["answers"] == 15
    assert 1e-4 < found["largest_logit_difference"] < 1


@only("qwen2")
def test_what_generated_adapters_stand_beside(made, scored, suite, tmp_path, capsys):
    """Random and empty prompts, answered examples in the context; each against its own making."""
    config, _, _ = made
    workdir = shutil.copytree(scored, tmp_path / "w")
    controls = dataclasses.replace(config.controls, in_context=2, prompts=True)
    config = dataclasses.replace(config, controls=controls)
    result = evaluate(config, suite, config.base.path, workdir)
    found = make_candidates(config, suite, config.base.path, workdir)
    generator = TrainedGenerator(workdir / "generator", encoder=config.condition.encoder)
    empty = load_adapter(found.by_dataset[suite.unseen[0].name]["empty_prompts"][0])
    wanted = generator.tensors([""] * config.condition.num_prompts)
    for key, value in wanted.items():
        np.testing.assert_allclose(empty[key], value, atol=1e-6)
    shared = [of["random_prompts"] for of in found.by_dataset.values()]
    assert len(shared[0]) == config.evaluate.samples and all(s == shared[0] for s in shared)
    one, two = (load_adapter(folder) for folder in shared[0])
    assert any(np.any(one[key] != two[key]) for key in one)

    base = TorchBase(config.base.path, 16, config.evaluate.max_new_tokens)
    for dataset in suite.unseen:
        entry, shots = result["unseen"][dataset.name], found.shots[dataset.name]
        assert {"in_context", "random_prompts", "empty_prompts"} <= set(entry)
        assert len(shots) == 2 and set(shots) <= set(dataset.pool)
        answers = base.decode(base.answer_ids(dataset.test, shots=shots))
        exact = Scorer([e.response for e in dataset.test]).each(answers)["exact"]
        assert entry["in_context"] == pytest.approx(np.mean(exact))
        alone, shown = base.prompt_ids(dataset.test[:1]), base.prompt_ids(dataset.test[:1], shots)
        assert len(shown[0]) > len(alone[0]) and shown[0][-4:] == alone[0][-4:]

    capsys.readouterr()
    many = dataclasses.replace(config.controls, in_context=12)  # more than 128 positions
    config = dataclasses.replace(config, controls=many)
    result = evaluate(config, suite, config.base.path, workdir)
    assert not any("in_context" in entry for entry in result["unseen"].values())
    assert "examples in the context (they are too long)" in capsys.readouterr().out


@only("qwen2")
def test_a_finished_generator_knows_its_checkpoints(made, suite, tmp_path):
    config, _, run = made
    workdir = copied(run, tmp_path / "w")
    assert train(config, suite, workdir) == workdir / "generator"
    with pytest.raises(InputError, match="/nowhere: expected DATASET"):
        train(with_checkpoints(config, "/nowhere"), suite, workdir)
    other = with_checkpoints(
        config, write_loras(tmp_path / "others", pathlib.Path(config.base.path), suite, 5.0)
    )
    with pytest.raises(
        InputError, match=r"was made with other settings.*checkpoints: '\w+' -> '\w+'"
    ):
        train(other, suite, workdir)
    path = workdir / "generator" / "generator.json"
    stored = json.loads(path.read_text())
    del stored["checkpoints"]
    path.write_text(json.dumps(stored))
    # An earlier version's folder does not say what it was trained on.
    assert train(other, suite, workdir) == workdir / "generator"


@pytest.mark.slow
@only("gemma")
def test_what_is_of_another_generator_is_made_anew(made, suite, tmp_path, capsys):
    """The generator changes, then the LoRA checkpoints do: never another's numbers, ours or the
    harness's."""
    config, _, run = made
    suite = dataclasses.replace(suite, unseen=suite.unseen[:2])
    base, workdir, name = config.base.path, copied(run, tmp_path / "w"), suite.unseen[1].name
    loras = shutil.copytree(config.train.checkpoints, tmp_path / "loras")
    config = with_checkpoints(config, loras)
    # Random adapters generate no right answer, but choose some.
    config = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, answers="likelihood")
    )

    def files() -> dict:
        return {p: p.read_bytes() for p in workdir.glob("*/**/adapter_model.safetensors")}

    def evaluated(workdir: pathlib.Path) -> tuple[dict, str]:
        """The result, and what is said of adapters."""
        result = evaluate(config, suite, base, workdir)
        return result, "".join(
            line for line in capsys.readouterr().out.splitlines() if "made anew" in line
        )

    def harness(workdir: pathlib.Path) -> dict:
        return lm_eval_stage(config, suite, base, workdir, [name])["unseen"][name]

    first, said = evaluated(workdir)
    harness(workdir)
    done, before = files(), (workdir / paths.EVALUATION).stat().st_mtime_ns
    assert not said and evaluated(workdir) == (first, "")
    assert files() == done and (workdir / paths.EVALUATION).stat().st_mtime_ns == before

    model = workdir / "generator" / "model.safetensors"
    save_file({key: 3 * value for key, value in load_tensors(model).items()}, model)
    second, said = evaluated(workdir)
    # Two samples of two unseen tasks and of their wrong prompts, and as many of ridge, which the
    # same element target leaves as they were.
    assert "12 adapter(s) were of another generator" in said
    assert len({p for p, old in done.items() if files()[p] != old}) == 8
    assert [e["train_mean"] for e in second["unseen"].values()] == [
        e["train_mean"] for e in first["unseen"].values()
    ]

    # The same generator, other LoRAs of the same names and sizes: the competitors are theirs.
    write_loras(loras, pathlib.Path(base), suite, 3.0, seed=1)
    third, said = evaluated(workdir)
    assert "5 adapter(s) were of another generator" in said
    fresh = copied(workdir, tmp_path / "fresh")
    assert third == evaluated(fresh)[0], "as where there never were others"
    of_generated, of_others = (
        [[e[m] for e in r["unseen"].values()] for r in (first, second, third)]
        for m in ("generated", "mean_adapter")
    )
    assert (
        of_generated[0] != of_generated[1] == of_generated[2]
        and of_others[0] == of_others[1] != of_others[2]
    )
    assert harness(workdir) == harness(fresh)

    # Another base at the same path: every score is of it.
    weights = pathlib.Path(base) / "model.safetensors"
    kept = weights.read_bytes()
    try:
        save_file(
            {key: -value for key, value in load_tensors(weights).items()}, weights, {"format": "pt"}
        )
        fourth, said = evaluated(workdir)
        assert not said and fourth["unseen"] != third["unseen"]
        fresh = copied(workdir, tmp_path / "other_base")
        assert fourth == evaluated(fresh)[0] and harness(workdir) == harness(fresh)
    finally:
        weights.write_bytes(kept)


@only("gemma")
def test_a_base_that_only_pytorch_runs(made, suite, tmp_path, capsys):
    """All is scored and reported but what needs our own base."""
    _, file, run = made
    workdir = copied(run, tmp_path / "w")
    assert (
        main(
            [
                "evaluate",
                f"--config={file}",
                f"--workdir={workdir}",
                "--config.evaluate.answers=likelihood",
            ]
        )
        == 0
    )
    results = json.loads((workdir / "results.json").read_text())
    page = (workdir / "report.html").read_text()
    for name, entry in results["unseen"].items():
        methods = {
            "base",
            "train_mean",
            "train_best",
            "mean_adapter",
            "nearest",
            "ridge",
            "generated",
            "wrong_prompts",
        }
        assert methods <= entry.keys() and ("tuned" in entry) == (name == suite.unseen[0].name)
    for part in ("agreement", "overhead"):
        assert (
            results[part].keys() == {"note"}
            and "model_type 'gemma' is not supported" in results[part]["note"]
        )
    assert page.count("Not measured, because only PyTorch runs this base.") == 2
    assert "the likeliest label" in page and "greedy decoding" not in page
    assert "Not measured, because only PyTorch" in capsys.readouterr().out


def told(workdir: pathlib.Path) -> tuple[dict, str]:
    """results.json and report.html."""
    return json.loads((workdir / "results.json").read_text()), (workdir / "report.html").read_text()


@pytest.mark.slow
@only("qwen2")
def test_no_room_to_measure_is_a_note_under_the_results(
    made, scored, tmp_path, capsys, monkeypatch
):
    """The device has no room for a second base: all is scored and reported before, the same command
    does not try it again, and --remeasure does."""
    _, file, _ = made
    workdir, asked = shutil.copytree(scored, tmp_path / "w"), []

    def full(where: str):
        def load(*_, **__):
            asked.append(where)
            results, page = told(workdir)
            assert results["unseen"] and "Not measured yet." in page, "reported before"
            kept = json.loads((workdir / paths.EVALUATION).read_text())["result"]
            assert "the process ended meanwhile" in kept[where]["note"], "what a kill would leave"
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 28 GB")

        return load

    command = ["evaluate", f"--config={file}", f"--workdir={workdir}"]
    with monkeypatch.context() as patch:
        patch.setattr("dnd_jax.base.agreement.load_base", full("agreement"))
        patch.setattr("dnd_jax.scoring.generate_vs_tune.load_base", full("overhead"))
        for _ in range(2):
            assert main(command) == 0
            assert asked == ["agreement", "overhead"], "and not again"
            said, (results, page) = capsys.readouterr().out, told(workdir)
            for part in asked:
                note = results[part]["note"]
                assert "no room for it (RESOURCE_EXHAUSTED: Out of memory allocating 28 GB)" in note
                assert html.escape(note) in page and note in said
    scores = told(workdir)[0]["unseen"]
    assert main([*command, "--remeasure"]) == 0
    results, page = told(workdir)
    assert results["unseen"] == scores
    assert results["agreement"]["same_answers"] == results["agreement"]["answers"] == 15
    assert results["overhead"]["ratio"] > 0 and "Not measured" not in page
    before = (workdir / paths.EVALUATION).stat().st_mtime_ns
    assert main([*command, "--remeasure"]) == 0, "only what failed"
    assert (workdir / paths.EVALUATION).stat().st_mtime_ns == before


@pytest.mark.slow
@only("qwen2")
def test_measurements_can_be_left_out_and_come_later(made, scored, tmp_path):
    _, file, _ = made
    workdir = shutil.copytree(scored, tmp_path / "w")
    command = ["evaluate", f"--config={file}", f"--workdir={workdir}"]
    off = ["--config.evaluate.agreement=False", "--config.evaluate.overhead=False"]
    assert main([*command, *off]) == 0
    results, page = told(workdir)
    assert results["agreement"] == {"note": "Not measured: evaluate.agreement is off."}
    assert "evaluate.overhead is off" in page
    assert main([*command, off[1]]) == 0
    results, _ = told(workdir)
    assert results["agreement"]["answers"] == 15 and "note" in results["overhead"]


@only("qwen2")
def test_a_stopped_measurement_is_made_by_the_same_command(
    made, scored, suite, tmp_path, monkeypatch
):
    config, _, _ = made
    workdir = shutil.copytree(scored, tmp_path / "w")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dnd_jax.base.agreement.load_base", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(config, suite, config.base.path, workdir)
    assert measure(config, suite, config.base.path, workdir)["agreement"]["answers"] == 15


@only("qwen2")
def test_a_stopped_scoring_keeps_what_was_measured(made, scored, suite, tmp_path, monkeypatch):
    config, _, _ = made
    workdir = shutil.copytree(scored, tmp_path / "w")
    path, found = workdir / paths.EVALUATION, {"answers": 15}
    stored = read_numbered(path, 1)
    stored["result"]["agreement"] = found
    write_json(path, stored | {"scores": {}, "adapters": []})  # as with more evaluate.samples

    def stopped(*arguments):
        write_numbered(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dnd_jax.scoring.evaluate.write_numbered", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, suite, config.base.path, workdir)
    begun = read_numbered(path, 1)
    assert len(begun["scores"]) == 1 and "adapters" not in begun
    assert evaluate(config, suite, config.base.path, workdir)["agreement"] == found


@only("qwen2")
def test_the_harness_refuses_other_settings_before_it_loads_a_base(
    made, scored, suite, tmp_path, monkeypatch
):
    config, _, _ = made
    workdir = shutil.copytree(scored, tmp_path / "w")
    write_numbered(workdir / "lm_eval/scores.json", 1, {"settings": {"seed": 9}, "scores": {}})
    monkeypatch.setattr("dnd_jax.scoring.lm_eval.TorchBase.of", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="seed: 9 -> 0"):
        lm_eval_stage(config, suite, config.base.path, workdir)


@only("qwen2")
def test_answers_that_are_cut_off_are_counted_and_warned_of(made, suite, tmp_path, capsys):
    """Random adapters never say the end token; one that says nothing else ends at once."""
    config, file, run = made
    workdir = copied(run, tmp_path / "w")
    command = ["evaluate", f"--config={file}", f"--workdir={workdir}"]
    command += ["--config.evaluate.agreement=False", "--config.evaluate.overhead=False"]
    assert main([*command, "--config.evaluate.free_form=True"]) == 0
    results, page = told(workdir)
    base = TorchBase(config.base.path, 16, 3)
    for dataset in suite.unseen:
        of_dataset = results["unseen"][dataset.name]["cut"]
        samples = (
            workdir / "adapters" / dataset.name,
            *(workdir / "competitors/generated").glob(f"{dataset.name}/*"),
        )
        shares = []
        for folder in samples:
            base.use(folder)
            shares.append(np.mean([len(ids) == 3 for ids in base.answer_ids(dataset.test)]))
        assert of_dataset["generated"] == pytest.approx(np.mean(shares))
        assert "train_best" not in of_dataset and "base" in of_dataset
    free, cut = results["warnings"]
    name = suite.unseen[0].name
    assert f"dnd lm-eval --tasks={name}:TASK" in free
    assert cut.startswith("Cut off at evaluate.max_new_tokens = 3") and f"{name} (base " in cut
    said = capsys.readouterr().out
    assert all(text in said and html.escape(text) in page for text in (free, cut))
    assert "\ncut off\n" in said and "<h2>Cut off</h2>" in page
    likely = copied(run, tmp_path / "likely")
    command[2] = f"--workdir={likely}"
    assert main([*command, "--config.evaluate.answers=likelihood"]) == 0
    assert told(likely)[0]["warnings"] == [] and "Cut off" not in told(likely)[1]


@only("gemma")
def test_a_generator_is_asked_what_it_was_trained_on(made, suite, tmp_path):
    config, _, run = made
    workdir = copied(run, tmp_path / "w")
    for section, changes, expected in (
        (
            "condition",
            {"form": "both", "max_text_length": 9},
            r"condition.form: 'prompt' -> 'both'; condition.max_text_length: \d+ -> 9",
        ),
        ("condition", {"num_prompts": 3}, r"condition.num_prompts: \d -> 3"),
        ("train", {"datasets": 2}, "train.datasets: 0 -> 2"),
    ):
        other = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **changes)}
        )
        with pytest.raises(
            InputError, match=f"{workdir}/generator was made with other settings; .*{expected}"
        ):
            make_candidates(other, suite, "", workdir)


@pytest.mark.parametrize("command", ["evaluate", "lm-eval", "quickstart"])
def test_a_suite_without_unseen_datasets_is_refused_where_it_is_scored(
    suite, tmp_path, command, capsys
):
    bare = shutil.copytree(suite.root, tmp_path / "bare")
    description = json.loads((bare / "suite.json").read_text())
    (bare / "suite.json").write_text(json.dumps({**description, "unseen": []}))
    assert (
        main([command, "--config=tests/tiny.py", f"--suite={bare}", f"--workdir={tmp_path / 'w'}"])
        == 2
    )
    assert (
        capsys.readouterr().err
        == f"dnd: {bare}: names no unseen dataset, so there is nothing to score; add one\n"
    )


def test_a_table_of_several_seeds_is_not_replaced_by_one(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"seeds": [0, 1, 2]}')
    assert main(["evaluate", "--config=mini", f"--workdir={tmp_path}", "--remeasure"]) == 2
    message = capsys.readouterr().err
    assert "results.json is of the seeds 0, 1, 2" in message
    assert f"`dnd quickstart --workdir={tmp_path} --remeasure`" in message
    assert not (tmp_path / "suite").exists()


@pytest.mark.parametrize(("rule", "kept"), [({}, False), ({"rule": 1}, False), (None, True)])
def test_scores_by_an_earlier_rule_are_not_kept(tmp_path, capsys, rule, kept):
    """Of `evaluate`, and of `lm-eval` with the harness' own tasks: both keep them so."""
    settings = evaluation_settings(freeze(load_file("tests/tiny.py")), "print")
    others = {key: value for key, value in settings.items() if key != "rule"}
    then = settings if rule is None else others | rule
    path, scores = tmp_path / "scores.json", {"base": {"mine:arc_easy": {"metric": "acc"}}}
    write_numbered(path, 1, {"settings": then, "scores": scores})
    assert read_kept(path, settings)["scores"] == (scores if kept else {})
    assert ("an earlier version's rule for answers" in capsys.readouterr().out) != kept
    with pytest.raises(InputError, match="suite: 'print' -> 'other'"):  # they are not replaced
        read_kept(path, settings | {"suite": "other"})
