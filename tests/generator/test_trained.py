"""A trained generator in use: many adapters at once, their strength, the training tasks that
prompts are close to, and `dnd generate` of a folder of prompts."""

import dataclasses
import json

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel
from pipeline import tiny_generator
from small_models import write_qwen
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import load_suite
from dnd_jax.encoders.cache import mean_pooled
from dnd_jax.generator.folder import STATISTICS
from dnd_jax.generator.nearest import TrainedTasks, nearest, tasks_of
from dnd_jax.generator.trained import AT_ONCE, TrainedGenerator
from dnd_jax.lora.adapter import load_adapter, save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig, load_adapter_config
from dnd_jax.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_generator(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def generator(run):
    return TrainedGenerator(run, at_once=AT_ONCE)


@pytest.fixture(scope="module")
def suite(run, generator):
    return load_suite(run / "suite", generator.condition.num_prompts)


def sets_of(count: int, n: int = 4) -> list[list[str]]:
    return [[f"where is town {i} of {s} ?" for i in range(n)] for s in range(count)]


def alike(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        np.allclose(one[key], other[key], rtol=0, atol=1e-5 * np.abs(one[key]).max()) for key in one
    )


@pytest.mark.parametrize("count", [1, 3, AT_ONCE + 2])
def test_many_are_those_made_one_by_one(generator, count):
    sets = sets_of(count)
    many = generator.generate_many(sets)
    assert len(many) == count
    for prompts, tensors in zip(sets, many, strict=True):
        assert alike(generator.tensors(prompts), tensors)
    assert count == 1 or not alike(many[0], many[1])


def test_programs_are_compiled_for_powers_of_two(generator):
    before = generator._step._cache_size()
    for count in range(1, AT_ONCE + 1):
        generator.generate_many(sets_of(count))
    assert generator._step._cache_size() <= before + 4  # 1, 2, 4, 8


def test_a_cpu_makes_one_after_the_other(run, generator):
    alone = TrainedGenerator(run)
    assert alone.at_once == 1
    for one, other in zip(alone.generate_many(sets_of(3)), sets_of(3), strict=True):
        expected = generator.tensors(other)
        assert all(np.array_equal(one[key], expected[key]) for key in one)


def test_sets_of_another_number_are_refused(generator):
    with pytest.raises(ValueError, match="takes 4"):
        generator.generate_many([["one ?"] * 3])
    assert generator.generate_many([]) == []


def test_closest_tasks_are_those_of_the_embeddings(generator, suite):
    tasks, encoder = generator.tasks, generator.encoder
    assert tasks.names == tuple(d.name for d in suite.train)
    pooled = {
        d.name: mean_pooled(
            encoder.encode([e.prompt for e in d.train]),
            encoder.tokenize([e.prompt for e in d.train])[1],
        )
        for d in suite.train
    }
    means = np.stack([x.mean(axis=0) for x in pooled.values()])
    assert np.allclose(tasks.means, means, atol=1e-5)
    for dataset in suite.train:
        prompts = [e.prompt for e in dataset.train[:4]]
        made = next(generator.make([prompts]))
        assert made.prompts == tuple(prompts)
        assert made.closest[0][0] == nearest(pooled[dataset.name][:4], pooled)
        assert [c for _, c in made.closest] == sorted((c for _, c in made.closest), reverse=True)


def test_a_set_is_far_when_tasks_are_nearer_to_each_other():
    rng = np.random.default_rng(0)
    of_kind = rng.standard_normal((8, 16))  # pairs of tasks that look alike
    pooled = {f"t{i}": of_kind[i // 2] + 0.3 * rng.standard_normal((20, 16)) for i in range(16)}
    tasks = TrainedTasks.of(pooled, 4, seed=0)
    own = pooled["t3"][:4]
    assert {name for name, _ in tasks.closest(own)[:2]} == {"t2", "t3"}
    assert 0 < tasks.how_far(own) < 1 < tasks.how_far(rng.standard_normal((4, 16)) + 3)
    with_own = [tasks.how_far(x[rng.choice(20, 4)]) for x in pooled.values() for _ in range(10)]
    assert np.mean(np.array(with_own) >= 1) < 0.05
    left_out = TrainedTasks(tasks.names[1:], tasks.means[1:], tasks.far_from)
    draws = [left_out.how_far(pooled["t0"][rng.choice(20, 4)]) for _ in range(50)]
    assert np.mean(np.array(draws) >= 1) < 0.5  # a task like another one is not far


def test_prompts_are_not_far_for_being_few():
    """Their mean is, by chance: what is far is counted for as many different ones as there are."""
    rng = np.random.default_rng(0)
    centres = 0.5 * rng.standard_normal((12, 16))
    pooled = {f"t{i}": centre + rng.standard_normal((40, 16)) for i, centre in enumerate(centres)}
    tasks = TrainedTasks.of(pooled, 8, seed=0)

    def share(far) -> float:
        return np.mean([far(np.resize(rng.permutation(x)[:count], (8, 16))) for x in sets])

    sets = [*pooled.values()] * 5
    for count in (1, 2, 4, 8):
        assert share(lambda x: tasks.how_far(x) >= 1) < 0.1, count
    count = 1
    assert share(lambda x: tasks.distances(x).min() > tasks.far_from) > 0.7
    assert tasks.how_far(np.resize(rng.standard_normal((1, 16)) + 9, (8, 16))) > 2


def test_few_tasks_tell_nothing_of_what_is_far():
    tasks = TrainedTasks.of({"a": np.eye(4), "b": -np.eye(4)}, 2, seed=0)
    assert tasks.far_from is None and tasks.how_far(np.full((2, 4), 100.0)) == 0
    for pooled in ({"a": np.eye(4)}, {name: np.eye(4)[i : i + 1] for i, name in enumerate("abcd")}):
        tasks = TrainedTasks.of(pooled, 2, seed=0)
        stored = tasks_of(json.loads(json.dumps(tasks.to_json())))["task_distances"]
        assert dataclasses.replace(tasks, **stored).to_json() == tasks.to_json()


@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.float32, (5, 3), elements=st.floats(-10, 10, width=32)),
    hypothesis.extra.numpy.arrays(np.float32, (2, 3), elements=st.floats(-10, 10, width=32)),
)
def test_cosines_are_cosines(means, prompts):
    found = TrainedTasks(tuple("abcde"), means).cosines(prompts)
    assert found.shape == (5,) and np.all(np.abs(found) <= 1 + 1e-5)


def test_a_generator_that_does_not_know_its_tasks_generates(run, generator, tmp_path):
    older = tmp_path / "older"
    older.mkdir()
    for file in (run / "generator").iterdir():
        if file.is_file():
            (older / file.name).write_bytes(file.read_bytes())
    description = json.loads((older / "generator.json").read_text())
    del description["tasks"]
    (older / "generator.json").write_text(json.dumps(description))
    made = next(TrainedGenerator(older).make(sets_of(1)))
    assert made.closest == () and alike(made.tensors, generator.tensors(sets_of(1)[0]))


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ({"names": ["a"], "far_from": None}, "task_means"),
        ({"names": [1], "far_from": None}, "tasks.names"),
        ({"names": ["a"], "far_from": -2.0}, "far_from"),
        ({"names": ["a"], "far_from": 2.0, "within": "1"}, "within"),
        ({"far_from": None}, "names"),
    ],
)
def test_damaged_descriptions_of_tasks_are_refused(run, tmp_path, tasks, says):
    for file in (run / "generator").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    description = json.loads((tmp_path / "generator.json").read_text())
    (tmp_path / "generator.json").write_text(json.dumps(description | {"tasks": tasks}))
    with pytest.raises(InputError, match=says) as refused:
        TrainedGenerator(tmp_path)
    assert STATISTICS in str(refused.value) or "generator.json" in str(refused.value)


# --- dnd generate


def generate(run, prompts, out, *more: str) -> int:
    return main(["generate", f"--generator={run}", f"--prompts={prompts}", f"--out={out}", *more])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for i, prompts in enumerate(sets_of(3)):
        (folder / f"task {i}.txt").write_text("\n".join(prompts) + "\n")
    (folder / ".DS_Store").write_bytes(b"\0")
    return folder


def test_a_folder_of_prompts_gives_an_adapter_each(run, folder, tmp_path, capsys):
    assert generate(run, folder, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["task 0", "task 1", "task 2"]
    for i in range(3):
        name = f"task {i}"
        assert str(tmp_path / "out" / name) in said
        assert generate(run, folder / f"{name}.txt", tmp_path / f"alone_{i}") == 0
        one, alone = load_adapter(tmp_path / "out" / name), load_adapter(tmp_path / f"alone_{i}")
        assert alike(alone, one)


def test_samples_of_a_folder_lie_in_folders_of_their_own(run, folder, tmp_path):
    assert generate(run, folder, tmp_path / "out", "--samples=2") == 0
    assert (tmp_path / "out/task 1/sample_1/adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("few.txt", "only one\n", "few.txt"),
        ("notes.md", "no prompts\n", "notes.md"),
        ("task 0.jsonl", '{"prompt": "x"}\n', "the same name"),
        ("Task 1.txt", "a\nb\nc\nd\n", "one folder on some systems"),
        ("a:b.txt", "a\nb\nc\nd\n", "rename the file"),
    ],
)
def test_one_bad_file_of_a_folder_is_named_and_nothing_written(
    run, folder, tmp_path, capsys, name, content, says
):
    (folder / name).write_text(content)
    assert generate(run, folder, tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_and_one_in_another_are_refused(run, tmp_path, capsys):
    (tmp_path / "prompts").mkdir()
    assert generate(run, tmp_path / "prompts", tmp_path / "out") == 2
    assert "no files of prompts" in capsys.readouterr().err
    (tmp_path / "prompts/more").mkdir()
    assert generate(run, tmp_path / "prompts", tmp_path / "out") == 2
    assert "a folder among" in capsys.readouterr().err


def test_strength_is_alpha_alone(run, folder, tmp_path):
    prompts = folder / "task 0.txt"
    assert generate(run, prompts, tmp_path / "whole") == 0
    assert generate(run, prompts, tmp_path / "weaker", "--strength=0.7") == 0
    whole, weaker = (load_adapter_config(tmp_path / name) for name in ("whole", "weaker"))
    assert weaker.alpha == pytest.approx(0.7 * whole.alpha) and weaker.rank == whole.rank
    for key, value in load_adapter(tmp_path / "whole").items():
        assert np.array_equal(value, load_adapter(tmp_path / "weaker")[key])
    assert "--strength=0.7" in (tmp_path / "weaker/README.md").read_text()
    assert "strength" not in (tmp_path / "whole/README.md").read_text()


def test_peft_applies_the_strength(tmp_path):
    base = write_qwen(tmp_path / "base", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    module, rng = "model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    rows, columns = dict(model.named_modules())[module].weight.shape
    tensors = {
        f"{module}.lora_A.weight": rng.standard_normal((2, columns), np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((rows, 2), np.float32),
    }
    effects = []
    with torch.no_grad():
        plain = dict(model.named_modules())[module].weight.clone()
        for alpha in (4.0, 4.0 * 0.7):
            save_adapter(tmp_path / "a", tensors, AdapterConfig(str(base), 2, alpha, ("q_proj",)))
            tuned = PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload()
            effects.append(dict(tuned.named_modules())[module].weight - plain)
            model = AutoModelForCausalLM.from_pretrained(base).eval()
    assert torch.allclose(effects[1], 0.7 * effects[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", ["0", "101", "nan"])
def test_a_strength_that_cannot_be_is_refused(run, folder, tmp_path, capsys, strength):
    words = f"--strength={strength}"
    assert generate(run, folder / "task 0.txt", tmp_path / "out", words) == 2
    assert "--strength" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_prompts_far_from_all_tasks_are_said_to_be(run, tmp_path, capsys):
    prompts = tmp_path / "far.txt"
    prompts.write_text("".join(f"x ** {i} % 7 != 2\n" for i in range(4)))
    assert generate(run, prompts, tmp_path / "out") == 0
    assert f"warning: {prompts}: the prompts are far" in capsys.readouterr().err
    card = (tmp_path / "out/README.md").read_text()
    assert "closest training tasks" in card and "far from everything" in card


def test_names_for_a_server_of_a_wrapped_base(run, tmp_path, capsys):
    """A real wrapper takes them: PEFT finds a module for each, in transformers' Qwen2.5-VL."""
    prefix = "model.language_model."
    (tmp_path / "prompts.txt").write_text("\n".join(f"where is town {i} ?" for i in range(8)))
    words = ["generate", f"--generator={run}", f"--prompts={tmp_path / 'prompts.txt'}"]
    assert main([*words, f"--out={tmp_path / 'plain'}"]) == 0
    assert main([*words, f"--out={tmp_path / 'named'}", f"--key-prefix={prefix}"]) == 0
    plain, named = load_adapter(tmp_path / "plain"), load_adapter(tmp_path / "named")
    assert {key.replace(prefix, "model.") for key in named} == plain.keys() != named.keys()
    assert all(np.array_equal(x, plain[key.replace(prefix, "model.")]) for key, x in named.items())
    assert f"--key-prefix={prefix}" in (tmp_path / "named/README.md").read_text()

    d, layers = 32, 1 + max(int(key.split(".")[2]) for key in plain)
    text = {
        **{"vocab_size": 64, "hidden_size": d, "intermediate_size": 64},
        **{"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2},
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": d}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    wrapper = Qwen2_5_VLForConditionalGeneration(config)
    adapted = PeftModel(wrapper, PeftConfig.from_pretrained(tmp_path / "named"))
    for name, fits in (("named", True), ("plain", False)):
        loaded = adapted.load_adapter(tmp_path / name, name)
        of_text = f"language_model.layers.0.self_attn.q_proj.lora_A.{name}"
        missing = [key for key in loaded.missing_keys if of_text in key]
        assert (not missing, not loaded.unexpected_keys) == (fits, fits)

    for flags, says in (
        (["--key-prefix=model"], "--key-prefix=model: expected"),
        ([f"--key-prefix={prefix}", f"--merge={tmp_path / 'm'}"], "leave out --merge"),
    ):
        assert main([*words, f"--out={tmp_path / 'no'}", *flags]) == 2
        assert says in capsys.readouterr().err
