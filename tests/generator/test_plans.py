"""How convolutions are computed stands in a training's record, holds after a resume whatever the
machine has learned since, and is process 0's in all processes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from pipeline import random_loras, tiny_suite, two_processes
from safetensors.numpy import load_file as load_tensors

import dnd_jax.generator.spec
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.costs import step_cost
from dnd_jax.data.suite import load_suite
from dnd_jax.generator import plans
from dnd_jax.generator.plans import planned
from dnd_jax.generator.sizes import spec_of
from dnd_jax.generator.train import train
from dnd_jax.loop.checkpoints import newest_record
from dnd_jax.ops.rates import RATES, rates_file, remember
from dnd_jax.parallel.mesh import make_mesh

LINE = "convolutions (output / gradients): "
SLOW_DIRECT = dataclasses.replace(RATES["cpu"], direct=1e6, direct_kernel_gradient=1e6, shifted=1e6)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    raw = load_file("tests/tiny.py")
    raw.train.update(steps=2, save_every=1, checkpoints=str(root / "loras"))
    raw.generator.features = ((0, 0, 0), (0, 0, 0))
    raw.train.batch_size = 8
    config, suite = freeze(raw), tiny_suite(root / "suite")
    random_loras(root / "loras", suite, config)
    return config, load_suite(suite, config.condition.num_prompts)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DND_JAX_CACHE", str(tmp_path / "cache"))


def test_a_resume_goes_on_by_the_plans_it_began_with(inputs, tmp_path, capsys):
    config, suite = inputs
    folder = tmp_path / "generator"
    remember(SLOW_DIRECT)
    train(config, suite, tmp_path)
    assert f"{LINE}5 dft / dft, by rates learned here\n" in capsys.readouterr().out
    whole = load_tensors(folder / "model.safetensors")
    note = newest_record(folder)[1]["convolutions"]
    assert note["method"] == "auto" and len(note["plans"]) == 5
    assert all(plan["output"] and plan["gradients"] for plan in note["plans"].values())

    rates_file().unlink()
    (folder / "generator.json").unlink()
    shutil.rmtree(folder / "checkpoints/2")
    train(config, suite, tmp_path)
    assert f"{LINE}5 dft / dft, as before\n" in capsys.readouterr().out
    resumed = load_tensors(folder / "model.safetensors")
    for key in whole:
        np.testing.assert_array_equal(resumed[key], whole[key])

    # Another method is another choice.
    generator = dataclasses.replace(config.generator, convolution="direct")
    other = dataclasses.replace(config, generator=generator)
    how = planned(spec_of(other), make_mesh(config.mesh), other, folder)
    assert how.line == "5 direct / direct"


@pytest.mark.parametrize("parts", [1, 2])
def test_every_convolution_of_a_step_has_a_plan(inputs, tmp_path, monkeypatch, parts):
    """None of them is chosen while the step is traced, on any mesh, in however many parts."""
    raw = load_file("tests/tiny.py")
    raw.train.update(batch_size=16, micro_batches=parts)
    raw.mesh.update(data=2, fsdp=2, tensor=2)
    config = freeze(raw)
    mesh = make_mesh(config.mesh)
    how = planned(spec_of(config), mesh, config, tmp_path)
    others = []
    real = dnd_jax.generator.spec.choose
    monkeypatch.setattr(
        dnd_jax.generator.spec, "choose", lambda p, *how: others.append(p) or real(p, *how)
    )
    chosen = {"chosen": how.spec.chosen}
    monkeypatch.setattr(step_cost, "spec_of", lambda c: dataclasses.replace(spec_of(c), **chosen))
    step, arguments = step_cost.train_arguments(config, mesh)
    step.lower(*arguments)
    assert {problem.batch for problem in others} <= {1}  # parameters' shapes, of one sample


def test_the_newest_record_that_can_be_read_counts(tmp_path):
    assert newest_record(tmp_path) == ("", {})
    for step, text in ((2, '{"step": 2}'), (10, "[" * 100_000), (9, "[]"), (11, "{")):
        record = tmp_path / f"checkpoints/{step}/record"
        record.mkdir(parents=True)
        (record / "metadata").write_text(text)
    (tmp_path / "checkpoints/12").mkdir()
    assert newest_record(tmp_path) == (str(tmp_path / "checkpoints/2"), {"step": 2})
    assert newest_record(tmp_path / "x", str(tmp_path / "checkpoints"))[1] == {"step": 2}


def test_what_was_measured_is_recorded_and_measured_nowhere_else(inputs, tmp_path, monkeypatch):
    config = inputs[0]
    generator = dataclasses.replace(config.generator, convolution="tuned")
    config, mesh, asked = (
        dataclasses.replace(config, generator=generator),
        make_mesh(config.mesh),
        [],
    )
    monkeypatch.setattr(plans, "tune", lambda problems: asked.extend(problems))
    how = planned(spec_of(config), mesh, config, tmp_path)
    assert set(asked) == {problem for problem, _ in how.spec.chosen}
    assert how.note["method"] == "tuned" and how.spec.convolution == "auto"


def test_the_shipped_rates_decide_where_none_were_learned(inputs, tmp_path):
    config = inputs[0]
    mesh = make_mesh(config.mesh)
    how = planned(spec_of(config), mesh, config, tmp_path)
    plain = spec_of(config)
    assert [plan for _, plan in how.spec.chosen] == [plain.plan(p) for p, _ in how.spec.chosen]
    assert "learned" not in how.line


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("auto", "checkpoints/3/record, convolutions: is not what dnd writes"),
        ({"method": "auto", "plans": {"stage_0/conv1w": "dft"}}, "'dft' is no choice that dnd"),
    ],
)
def test_a_record_that_says_something_else_is_named(inputs, tmp_path, note, message):
    config = inputs[0]
    record = tmp_path / "checkpoints/3/record"
    record.mkdir(parents=True)
    (record / "metadata").write_text(json.dumps({"convolutions": note}))
    with pytest.raises(InputError, match=message):
        planned(spec_of(config), make_mesh(config.mesh), config, tmp_path)


def test_plans_of_other_shapes_are_chosen_anew(inputs, tmp_path):
    """As after a change of the mesh or the batch."""
    config = inputs[0]
    mesh = make_mesh(config.mesh)
    remember(SLOW_DIRECT)
    how = planned(spec_of(config), mesh, config, tmp_path)
    record = tmp_path / "checkpoints/3/record"
    record.mkdir(parents=True)
    (record / "metadata").write_text(json.dumps({"convolutions": how.note}))
    rates_file().unlink()
    assert planned(spec_of(config), mesh, config, tmp_path).spec.chosen == how.spec.chosen
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16))
    now = planned(spec_of(other), mesh, other, tmp_path)
    assert all(plan == spec_of(other).plan(problem) for problem, plan in now.spec.chosen)


SCRIPT = """
import dataclasses, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
os.environ["DND_JAX_CACHE"] = str(folder / f"cache_{jax.process_index()}")
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.generator.plans import planned
from dnd_jax.generator.sizes import spec_of
from dnd_jax.ops.rates import RATES, remember
from dnd_jax.parallel.mesh import make_mesh
if jax.process_index() == 0:
    remember(dataclasses.replace(RATES["cpu"], direct=1e6, direct_kernel_gradient=1e6, shifted=1e6))
raw = load_file("qwen2_5_0_5b_commonsense")
raw.train.batch_size = 8
config = freeze(raw)
how = planned(spec_of(config), make_mesh(config.mesh), config, folder)
assert all(plan.forward for _, plan in how.spec.chosen)
print("plans", how.line, len(how.spec.chosen))
"""


def test_every_process_has_the_plans_of_process_0(tmp_path):
    first, second = two_processes(SCRIPT, str(tmp_path))
    assert "plans 40 dft / dft, by rates learned here" in first
    assert first.splitlines()[-1] == second.splitlines()[-1]
