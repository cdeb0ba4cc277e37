"""`dnd plan --step=collect`: what it says of a small base, and of how much a task is taken to
hold."""

import jax
import numpy as np
import pytest

from dnd_jax.base.sequences import Sequences
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.costs.collect_cost import collect_arguments, make_plan, sizes_of
from dnd_jax.costs.compiled import compile_for, topology_devices
from dnd_jax.costs.describe import describe_plan
from dnd_jax.lora.tuning import bytes_of_task
from dnd_jax.main import main
from dnd_jax.parallel.mesh import make_mesh


def settings(lora=(), base=(), mesh=()):
    raw = load_file("tests/tiny.py")
    raw.base.update(vocab_size=512, max_length=64, num_hidden_layers=1)
    raw.base.update(dict(base))
    raw.lora.update({"targets": ("q_proj",)} | dict(lora))
    raw.mesh.update(dict(mesh))
    return freeze(raw)


@pytest.mark.parametrize(
    "dtype, remat",
    [("float32", False), pytest.param("float32", True, marks=pytest.mark.slow)],
)
def test_what_a_task_is_taken_to_hold_is_what_the_compiler_gives_it(dtype, remat):
    """Within a factor of two."""
    base = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    config = settings({"dtype": dtype, "remat": remat, "batch_size": 8}, base)
    plan = make_plan(config, jax.devices()[:1])
    rows = np.zeros((8, 64), np.int32), np.full(8, 1, np.int32), np.full(8, 64, np.int32)
    estimate = bytes_of_task(sizes_of(config), config.lora, Sequences(*rows))
    assert 0.5 < estimate / plan.temporary_bytes < 2, (estimate, plan.temporary_bytes)


def test_half_the_bits_and_recomputed_layers_take_less():
    def size(**lora):
        rows = np.zeros((8, 64), np.int32), np.full(8, 60, np.int32), np.full(8, 64, np.int32)
        config = settings(lora, {"num_hidden_layers": 8})
        return bytes_of_task(sizes_of(config), config.lora, Sequences(*rows))

    whole = size()
    assert size(remat=True) < whole / 2 and whole / 2 < size(dtype="bfloat16") < whole


def test_a_base_in_parts_is_gathered_and_its_activations_are_not_summed():
    """What crosses the links are the base's matrices, once forward and once backward, and not what
    all tasks compute with them."""
    config = settings(base={"intermediate_size": 512}, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    plan = make_plan(config, jax.devices())
    assert plan.batch == 4 and plan.mesh["fsdp"] == 2 and plan.fits and plan.tasks is None
    rows = config.lora.batch_size * config.base.max_length
    inner = 4 * rows * 512  # bytes of one task's inner states
    reduced = plan.collectives.get("all-reduce", {"bytes": 0})["bytes"]
    assert plan.collectives["all-gather"]["count"] >= 7 and reduced < 2 * inner, plan.collectives
    text = describe_plan(plan)
    assert "tasks at once 4, remat none\nbase in float32; rows of 64 tokens" in text, text


def test_an_unknown_step_is_refused(capsys):
    assert main(["plan", "--config=tests/tiny.py", "--step=tune"]) == 2
    assert "--step=tune: one of train, generate, collect" in capsys.readouterr().err


@pytest.mark.slow
def test_layers_that_were_not_compiled_are_counted_as_more_of_the_same():
    """A base of 6 layers by a turn of its loop and by 2 and 3 of them, beside what the TPU's
    compiler says of all six one after the other, where the gradient stops in the first one; a loop
    makes that of its input."""
    base = {"hidden_size": 512, "intermediate_size": 1024, "max_length": 256}
    chips = topology_devices("v5e:2x2")
    of = [settings({"batch_size": 8}, base | {"num_hidden_layers": n}) for n in (3, 6)]
    few, more = (make_plan(config, chips[:1]) for config in of)
    mesh = make_mesh(of[1].mesh, chips[:1])
    step, arguments = collect_arguments(of[1], mesh, sizes_of(of[1]), 1, unroll=True)
    whole = compile_for("tpu", step, *arguments)
    cost, memory = whole.cost_analysis(), whole.memory_analysis()
    assert few.layers == "2 and 3 of 3" and more.layers == "2 and 3 of 6"
    assert cost["flops"] < more.flops < 1.05 * cost["flops"]
    assert more.temporary_bytes < 1.1 * memory.temp_size_in_bytes, "of the loop, not of the sum"
    assert more.estimate_seconds == pytest.approx(cost["optimal_seconds"], rel=0.1)
    assert more.flops > 1.5 * few.flops and more.peak_bytes > few.peak_bytes
    assert more.tasks and more.estimate_seconds > few.estimate_seconds


@pytest.mark.slow
@pytest.mark.long
def test_loras_of_the_7b_base_fit_eight_chips():
    raw = load_file("qwen2_5_7b_math")
    raw.base.max_length = 1024
    raw.lora.update(dtype="bfloat16", remat=True)
    raw.mesh.update(data=1, fsdp=8, tensor=1)
    plan = make_plan(freeze(raw), topology_devices("v5p:2x2x2"))
    assert plan.fits and plan.tasks >= 8 and plan.batch == 8 and plan.estimate_seconds > 0, plan
