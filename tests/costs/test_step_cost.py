"""`dnd plan`: what it reads out of compiled programs, what it says, and that the paper's settings
fit TPUs."""

import functools
import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from pipeline import dnd
from small_models import write_qwen

from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core.chips import FRACTIONS, chip_of
from dnd_jax.core.errors import InputError
from dnd_jax.costs import hlo, sweep
from dnd_jax.costs.compiled import StepCost, compile_for, topology_devices
from dnd_jax.costs.describe import describe_plan, what_would_help
from dnd_jax.costs.feeding import read_by_a_host
from dnd_jax.costs.step_cost import make_plan, train_arguments
from dnd_jax.generator.sizes import features_of
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.rules import leading

FEATURES = ((4, 8, 8), (8, 8, 8))


def mesh(*sizes: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(
        np.array(jax.devices()).reshape(sizes), ("slice", "a", "b")[-len(sizes) :]
    )


def settings(**changes) -> Config:
    raw = load_file("tests/tiny.py")
    raw.generator.features, raw.generator.kernel_size = FEATURES, 3
    raw.train.batch_size = 8
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return freeze(raw)


def test_collectives_are_counted_with_their_bytes_and_through_loops():
    places = mesh(2, 2, 2)
    everywhere = functools.partial(
        jax.shard_map, mesh=places, out_specs=PartitionSpec(("slice", "a", "b"))
    )

    def program(x):
        def once(total, _):
            return jax.lax.psum(total, "b") * 0.5, None

        # 5 all-reduces of 4 floats over pairs inside a slice.
        x = jax.lax.scan(once, x, length=5)[0]
        # One gather between slices; one all-reduce over four.
        return x[:2] + jax.lax.psum(jax.lax.all_gather(x, "slice").sum(0)[:2], ("a", "b"))

    x = jax.ShapeDtypeStruct(
        (32,), jnp.float32, sharding=NamedSharding(places, PartitionSpec(("slice", "a", "b")))
    )
    text = (
        jax.jit(everywhere(program, in_specs=PartitionSpec(("slice", "a", "b")), check_vma=False))
        .lower(x)
        .compile()
        .as_text()
    )
    found = hlo.collectives(text, 8, slices=2)
    reduce, gather = found["all-reduce"], found["all-gather"]
    assert (reduce.count, reduce.bytes) == (6, 5 * 16 + 8)
    assert reduce.link_bytes == 5 * 2 * 16 / 2 + 2 * 8 * 3 / 4 and reduce.network_bytes == 0
    assert (gather.count, gather.bytes, gather.link_bytes, gather.network_bytes) == (1, 32, 0, 16)
    assert found.keys() == {"all-reduce", "all-gather"}


def test_what_a_tpu_compiler_makes_of_collectives():
    """Two slices: it gathers kernels inside a slice, reduces and scatters gradients there, and
    sends shares between slices."""
    places = jax.sharding.Mesh(
        np.array(topology_devices("v5e:2x2", 2)).reshape(2, 4), ("slice", "fsdp")
    )

    def at(*axes):
        return NamedSharding(places, PartitionSpec(*axes))

    def step(w, x):
        gathered = lambda w: jnp.sum(jnp.tanh(x @ jax.lax.with_sharding_constraint(w, at())) ** 2)
        return w - jax.lax.with_sharding_constraint(jax.grad(gathered)(w), at("fsdp"))

    w = jax.ShapeDtypeStruct((2048, 2048), jnp.float32, sharding=at("fsdp"))
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.float32, sharding=at(("slice", "fsdp")))
    text = compile_for("tpu", jax.jit(step, out_shardings=at("fsdp")), w, x).as_text()
    found, size = hlo.collectives(text, 8, slices=2), 4 * 2048 * 2048
    assert found["reduce-scatter"].link_bytes == pytest.approx(size * 3 / 4, rel=0.02)
    assert (
        found["all-gather"].link_bytes % (size * 3 // 4) == 0
        and found["all-gather"].network_bytes == 0
    )
    assert (
        found["all-reduce"].network_bytes == pytest.approx(size / 4, rel=0.02)
        and found["all-reduce"].link_bytes == 0
    )


@pytest.mark.slow
def test_rematerialisation_saves_memory_and_costs_operations():
    raw = load_file("tests/tiny.py")
    raw.generator.features, raw.generator.kernel_size = ((16, 32, 32),) * 7, 3
    raw.train.batch_size = 8
    plans = {}
    for remat in ("none", "convolutions", "stages"):
        raw.train.remat = remat
        plans[remat] = make_plan(freeze(raw), topology_of_one())
    none, some, most = plans.values()
    assert most.temporary_bytes < some.temporary_bytes < none.temporary_bytes
    assert none.flops <= some.flops < 0.9 * most.flops


def topology_of_one() -> list:
    """One TPU chip, whose compiler keeps what it is told to keep."""
    return topology_devices("v5e:2x2")[:1]


def test_a_tpu_program_is_kept_out_of_the_cache_that_could_not_read_it(tmp_path, recwarn):
    """JAX would write it there, and warn of it when another process (here another function)
    compiles it again."""
    mesh = jax.sharding.Mesh(np.array(topology_of_one()), ("data",))
    x = jax.ShapeDtypeStruct((8,), np.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        for _ in range(2):
            compile_for("tpu", jax.jit(lambda x: 2 * x), x)
        assert not recwarn.list and not list(tmp_path.iterdir())
        jax.jit(lambda x: 3 * x)(np.ones(4))
        assert list(tmp_path.iterdir()), "programs of this machine are kept as before"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def asked(**changes) -> Config:
    """A step on answers through a base of 5 layers."""
    base = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
    raw = load_file("tests/tiny.py")
    raw.base.update(**base, vocab_size=512, max_length=64)
    raw.lora.update(targets=("q_proj",))
    raw.generator.features, raw.generator.kernel_size = ((4, 8, 0), (0, 0, 0)), 3
    raw.condition.update(num_prompts=4, max_text_length=8)
    raw.train.update(objective="answers", answer_rows=3, batch_size=8)
    raw.update_from_flattened_dict({key.replace("__", "."): x for key, x in changes.items()})
    return freeze(raw)


def test_a_step_on_answers_is_planned_with_the_base():
    """More than the decoder alone; longer answers take more; the base in bfloat16 takes less."""
    config = asked()
    plan = make_plan(config, jax.devices()[:1], answer=2)
    assert (plan.rows, plan.length, plan.answer, plan.layers) == (3, 64, 2, "2 and 3 of 5")
    assert plan.decoder_peak_bytes < plan.peak_bytes and plan.flops > 2 * plan.direct_flops
    alone = make_plan(asked(train__objective="weights"), jax.devices()[:1])
    assert alone.peak_bytes == plan.decoder_peak_bytes and not alone.rows
    text = describe_plan(plan)
    assert "base: 3 rows a sample of 64 tokens, 2 of them learned; operations and time" in text
    assert "by those of 2 and 3 of 5 layers" in text
    assert "of this without the base" in text and "without the base" not in describe_plan(alone)
    assert make_plan(config, jax.devices()[:1]).peak_bytes > plan.peak_bytes
    shown = make_plan(
        asked(train__objective="distill", train__shots=2), jax.devices()[:1], answer=2
    )
    assert shown.flops > 1.2 * plan.flops  # what the base reads in its context, of 64 tokens too
    half = asked(lora__dtype="bfloat16")
    assert make_plan(half, jax.devices()[:1], answer=2).argument_bytes < plan.argument_bytes


@pytest.mark.parametrize("objective", ["weights", pytest.param("answers", marks=pytest.mark.slow)])
def test_a_step_that_looks_at_sizes_is_planned_with_them(objective):
    """Beside the base or without one."""
    plain, sizes = (
        make_plan(asked(train__objective=objective, **more), jax.devices()[:1], answer=2)
        for more in ({}, {"train__size_weight": 0.1, "train__wording_weight": 0.1})
    )
    assert sizes.flops > plain.flops


def test_the_base_that_validates_is_beside_the_step():
    plain, validating = (
        make_plan(asked(train__objective="weights", train__validate_every=n), jax.devices()[:1])
        for n in (0, 5)
    )
    layer = 3 * 32 * 64 + 2 * 32 * 32  # of the base, at the least
    more = validating.peak_bytes - plain.peak_bytes
    assert more >= 4 * (512 * 32 + 5 * layer) and validating.flops == plain.flops


@pytest.mark.slow
def test_a_step_on_answers_over_a_mesh_keeps_parts_of_the_base():
    whole, parts = (
        make_plan(asked(mesh__fsdp=n, mesh__data=8 // n), jax.devices(), answer=2) for n in (1, 8)
    )
    assert parts.argument_bytes < whole.argument_bytes / 2
    assert parts.collectives["all-gather"]["count"] > 0


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}",
            [[0, 2], [1, 3], [4, 6], [5, 7]],
        ),
        ("channel_id=1, dimensions={0}", None),
    ],
)
def test_groups_in_every_notation(text, groups):
    found = hlo.replica_groups(text)
    assert (found is None and groups is None) or found.tolist() == groups


def test_a_plan_of_virtual_devices_is_measured_and_adds_up():
    config = settings(mesh__fsdp=2, mesh__tensor=2)
    plans = {
        step: make_plan(config, jax.devices(), step, measure=True) for step in ("train", "generate")
    }
    train, generate = plans["train"], plans["generate"]
    assert (
        train.fits
        and train.limit_bytes is None
        and train.measured_seconds > 0 < generate.measured_seconds
    )
    assert (train.batch, generate.batch) == (8, 4)
    assert train.mesh == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert train.state_bytes > 2.9 * generate.state_bytes  # two moments beside the parameters
    assert train.argument_bytes > train.state_bytes
    assert 0.3 < train.flops / train.direct_flops < 3
    assert (
        train.collectives["all-gather"]["count"] > generate.collectives["all-gather"]["count"] > 0
    )
    batch = train_arguments(config, make_mesh(config.mesh))[1][1]
    assert train.host_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) > 0
    assert not generate.host_bytes
    assert make_plan(config, jax.devices()).hash == train.hash
    assert (
        make_plan(
            settings(mesh__fsdp=2, mesh__tensor=2, train__micro_batches=2), jax.devices()
        ).hash
        != train.hash
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_1_5b_code", "qwen2_5_7b_math"])
def test_the_step_of_long_texts_can_encode_them(name):
    """26624 and 4608 tokens are beyond the encoder's window of 512; by shape alone."""
    raw = load_file(str(SETTINGS / f"{name}.py"))
    raw.condition.in_graph = True
    raw.mesh.update(data=1, fsdp=8)
    step, (state, batch, encoder) = train_arguments(freeze(raw), make_mesh(freeze(raw).mesh))
    assert batch.keys() == {"ids", "valid", "target"} and batch["ids"].shape == (
        48,
        16,
        raw.condition.max_text_length,
    )
    new, metrics = jax.eval_shape(step, state, batch, encoder)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["sample_loss"].shape == (48,)


@pytest.mark.slow
def test_operations_in_loops_are_said_to_be_counted_once():
    fourier = make_plan(settings(generator__convolution="dft"), jax.devices())
    assert fourier.looped == 5 and "both too low: 5 convolutions loop" in describe_plan(fourier)
    row = sweep.as_markdown([fourier]).splitlines()[2].split("|")
    assert row[10].strip("* ") == row[11].strip("* ") == "-"
    direct = make_plan(settings(generator__convolution="direct"), jax.devices())
    assert direct.looped == 0 and "too low" not in describe_plan(direct)


def test_slices_of_the_configuration_stay_in_a_sweep():
    config = settings(mesh__slices=2, mesh__data=4, sweep__meshes=((4, 1, 1), (1, 2, 2, 2)))
    assert [variant.mesh.slices for _, _, variant in sweep.variants(config)] == [2, 1]


@pytest.mark.slow
def test_more_chips_hold_less_each():
    held = [
        make_plan(settings(mesh__fsdp=n, mesh__data=8 // n), jax.devices()).state_bytes
        for n in (1, 2, 4, 8)
    ]
    assert held == sorted(held, reverse=True) and held[3] < held[0] / 7.5


def test_a_sweep_of_collecting_has_one_program_a_mesh():
    lists = {"meshes": ((8, 1, 1), (2, 2, 2)), "remat": ("none", "stages"), "batches": (8, 16)}
    lists |= {"methods": ("dft", "direct"), "steps": ("collect", "train")}
    config = settings(**{f"sweep__{key}": value for key, value in lists.items()})
    found = [(step, variant) for _, step, variant in sweep.variants(config)]
    collecting = [variant for step, variant in found if step == "collect"]
    assert [variant.mesh.data for variant in collecting] == [8, 2]
    assert len(found) - len(collecting) == 16 and found[0][0] == "collect"


@pytest.mark.slow
def test_a_sweep_writes_its_tables_and_goes_on_where_it_was(tmp_path):
    config = settings(
        sweep__meshes=((8, 1, 1), (2, 2, 2), (3, 1, 1)),
        sweep__remat=("none", "stages"),
        sweep__steps=("train", "generate"),
    )
    first = sweep.sweep(config, tmp_path)
    assert len(first) == 8  # the mesh that does not fit is left out
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "plans").iterdir()}
    assert sweep.sweep(config, tmp_path) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "plans").iterdir()} == kept
    rows = json.loads((tmp_path / "plans.json").read_text())
    assert {
        (r["step"], tuple(r["mesh"].values()), r["remat"]) for r in rows if r["step"] == "train"
    } == {("train", m, remat) for m in ((1, 8, 1, 1), (1, 2, 2, 2)) for remat in ("none", "stages")}
    header, *lines = (tmp_path / "plans.csv").read_text().splitlines()
    assert len(lines) == 8 and {"mesh_fsdp", "all-gather_bytes", "peak_bytes", "hash"} <= set(
        header.split(",")
    )
    table = (tmp_path / "plans.md").read_text()
    assert table.count("\n| ") == 8 and "**" in table and "2x2x2" in table
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "scaling.png").exists()  # one number of devices


def test_parts_that_do_not_divide_a_batch_are_left_out(tmp_path, capsys):
    with pytest.raises(InputError, match="no combination fits"):
        sweep.sweep(settings(sweep__micro_batches=(3,)), tmp_path)
    assert "left out: micro_batches = 3 does not divide batch_size = 8" in capsys.readouterr().out


def test_a_given_base_lends_its_sizes(tmp_path):
    """The zeros of generator.features, from the base's config.json alone."""
    base = write_qwen(tmp_path / "base")
    (base / "model.safetensors").unlink()
    given = settings(
        base__path=str(base), generator__features=((0, 0, 0), (0, 0, 0)), generator__target="chunk"
    )
    assert features_of(given) == ((4, 16, 384), (58, 4, 10))  # 2 layers of 29 chunks of 8, rank 2
    with pytest.raises(
        InputError,
        match="whose zeros take the base's sizes: /nowhere: no such model folder; `dnd "
        "init-config`",
    ):
        features_of(settings(base__path="/nowhere", generator__features=((0, 0, 0), (0, 0, 0))))


def plan_of(**changes) -> StepCost:
    gib = 2**30
    usual = dict(
        step="train",
        devices="8 TPU v5e",
        mesh={"slice": 1, "data": 8, "fsdp": 1, "tensor": 1},
        batch=64,
        micro_batches=1,
        remat="none",
        method="auto",
        rules="",
        convolutions="",
        state_bytes=2 * gib,
        peak_bytes=40 * gib,
        limit_bytes=16 * gib,
        flops=1e12,
        estimate_seconds=0.1,
    )
    return StepCost(**usual | changes)


@pytest.mark.parametrize(
    "changes, fits",
    [
        ({"peak_bytes": 16, "limit_bytes": 16}, True),
        ({"peak_bytes": 17, "limit_bytes": 16}, False),
        ({"peak_bytes": 17, "limit_bytes": None}, True),  # virtual devices
        ({"peak_bytes": None, "limit_bytes": 16, "error": "out of memory"}, False),
    ],
)
def test_a_plan_fits_up_to_its_chips_memory(changes, fits):
    assert plan_of(**changes).fits is fits


def test_of_a_gpu_xla_takes_three_quarters_unless_told(monkeypatch):
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    gpu, tpu = chip_of("NVIDIA H100 80GB HBM3"), chip_of("TPU v5p")
    assert gpu.room == 60 * 2**30 and tpu.room == tpu.memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert gpu.room == pytest.approx(72 * 2**30) and tpu.room == tpu.memory
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    assert gpu.room == 40 * 2**30
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "90%")
    with pytest.raises(InputError, match="XLA_CLIENT_MEM_FRACTION=90%: expected a share"):
        print(gpu.room)


def test_scaling_compares_what_differs_in_the_number_of_devices_alone(tmp_path):
    def of(size, batch, **changes):
        mesh = {"slice": 1, "data": size, "fsdp": 1, "tensor": 1}
        return plan_of(
            devices=f"{size} TPU v5e",
            mesh=mesh,
            batch=batch,
            **{"peak_bytes": 2**30, "link_seconds": 0.05} | changes,
        )

    small, strong, weak, big = of(8, 64), of(16, 64), of(16, 128), of(256, 2048)
    other = [of(32, 64, remat="stages"), of(32, 64, step="generate"), of(32, 64, peak_bytes=2**40)]
    lines = {"64 samples a step": [small, strong], "8 samples a device": [small, weak, big]}
    assert sweep.scaling([big, strong, small, weak, *other[1:]]) == lines
    assert sweep.scaling([big, strong, small, weak, *other]) == {
        f"{name}, remat none": line for name, line in lines.items()
    }
    assert sweep.scaling([small, *other]) == sweep.scaling([]) == {}
    sweep.plot_scaling([big, strong, small], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_batches_that_come_to_the_same_are_one_plan(tmp_path):
    plans = sweep.sweep(settings(sweep__batches=(16, -2)), tmp_path)
    assert [p.batch for p in plans] == [16]


def test_the_nearest_miss_says_what_would_make_it_fit():
    gib = 2**30
    misses = [plan_of(), plan_of(peak_bytes=20 * gib, error="out of memory")]
    assert sweep.nearest_miss(misses) == (
        "nothing fits; the nearest is train on 8 TPU v5e, mesh 8x1x1, which wants 20.0 GiB of "
        "16.0; activations take most of it: "
        "--config.train.remat=stages or --config.train.micro_batches=2 or "
        "--config.train.batch_size=32 or "
        "more chips over which data or fsdp split the batch"
    )
    assert "micro_batches=4" in what_would_help(plan_of())
    assert "--config.mesh.fsdp=2" in what_would_help(plan_of(state_bytes=15 * gib))
    assert (
        sweep.best(
            [plan_of(), plan_of(peak_bytes=gib), plan_of(peak_bytes=gib, estimate_seconds=0.05)],
            "train",
        ).estimate_seconds
        == 0.05
    )
    assert sweep.best([plan_of()], "train") is None


LARGE = ("--config=tests/large.py", "--topology=v5e:2x2")


@pytest.mark.slow
def test_what_does_not_fit_a_tpu_exits_with_1_and_says_what_would(tmp_path):
    done = dnd("plan", *LARGE, f"--workdir={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert (
        "nothing fits; the nearest is train on 4 TPU v5e, mesh 4x1x1, which wants " in done.stderr
    )
    assert "--config.mesh.fsdp=2" in done.stderr
    fits = dnd(
        "plan", *LARGE, f"--workdir={tmp_path}", "--config.mesh.data=1", "--config.mesh.fsdp=4"
    )
    assert fits.returncode == 0, fits.stderr
    assert (
        "GiB of 15.75: fits" in fits.stdout
        and "generate step on 4 TPU v5e: mesh data 1 x fsdp 4 x tensor 1" in fits.stdout
    )
    assert not fits.stderr.strip(), fits.stderr  # libtpu has nothing to tell a user


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--topology=v99:1x1",), "--topology=v99:1x1: cannot compile for it"),
        (
            ("--topology=v5e:2x2", "--devices=4"),
            "--devices (virtual CPU devices) and --topology (TPU chips) exclude each other",
        ),
        (("--topology=v5e:2x2", "--measure"), "--measure runs on this machine's devices"),
        (
            ("--topology=v5e:2x2", "--config.mesh.fsdp=3"),
            "data ? x fsdp 3 x tensor 1 = a multiple of 3, but 4 devices; this works: ",
        ),
    ],
)
def test_bad_plans_are_one_line(tmp_path, arguments, message):
    done = dnd("plan", "--config=tests/tiny.py", f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )


SETTINGS = pathlib.Path("configs")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "name, topology, mesh_sizes, changes, peak, limit",
    [
        ("qwen2_5_0_5b_commonsense", "v5p:2x2x2", (8, 1, 1), {}, 36.6, 95.74),
        (
            "qwen2_5_0_5b_commonsense",
            "v5e:4x4",
            (2, 8, 1),
            {"remat": "stages", "micro_batches": 2},
            15.5,
            15.75,
        ),
        ("qwen2_5_7b_code", "v5p:4x4x4", (2, 8, 4), {}, 24.8, 95.74),
    ],
)
def test_the_papers_settings_fit(name, topology, mesh_sizes, changes, peak, limit):
    """The GiB of docs/SCALING.md."""
    raw = load_file(str(SETTINGS / f"{name}.py"))
    raw.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh_sizes, strict=True)))
    raw.train.update(changes)
    plan = make_plan(freeze(raw), topology_devices(topology))
    assert plan.fits and plan.limit_bytes / 2**30 == pytest.approx(limit, abs=0.01), plan
    assert plan.peak_bytes / 2**30 == pytest.approx(peak, rel=0.02), plan
    parts = plan.argument_bytes + plan.temporary_bytes + plan.output_bytes + plan.ahead_bytes
    assert parts == pytest.approx(plan.peak_bytes, rel=0.01)  # beside them, the program
    assert plan.flops < plan.direct_flops and plan.estimate_seconds > 0 and plan.hash


def test_a_host_reads_what_its_devices_hold_once():
    """Of 8 samples over four devices of two hosts; of what is whole on each device all of it."""
    devices = [type("Device", (), {"process_index": k // 2})() for k in range(4)]

    def leaf(parts: int) -> SimpleNamespace:
        step = 8 // parts
        at = [(slice(k % parts * step, (k % parts + 1) * step),) for k in range(4)]
        where = SimpleNamespace(
            devices_indices_map=lambda shape: dict(zip(devices, at, strict=True))
        )
        return SimpleNamespace(shape=(8, 5), dtype=np.dtype(np.float32), sharding=where)

    assert [read_by_a_host([leaf(parts)]) for parts in (4, 2, 1)] == [80, 160, 160]
    assert read_by_a_host([leaf(4), leaf(1)]) == 240


def test_every_process_would_read_only_its_samples():
    from dnd_jax.generator.pairs import PairedDataset, Pairs

    read = []

    class Prompts(np.ndarray):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    rng = np.random.default_rng(0)
    datasets = [
        PairedDataset(
            name,
            {"condition": rng.standard_normal((9, 3, 2)).view(Prompts)},
            rng.standard_normal((4, 5, 2, 2)),
        )
        for name in ("one", "two")
    ]
    pairs = Pairs(datasets, batch_size=8, num_prompts=4, seed=3)
    whole = pairs.batch_at(7)
    read.clear()
    over_batch = leading(make_mesh(settings(mesh__data=4, mesh__tensor=2).mesh), 8, "batch")
    placed = pairs.placed(7, over_batch)
    assert len(read) == 8 * 4  # prompts, once each, though two devices hold every sample
    for key, value in placed.items():
        assert value.sharding == over_batch
        np.testing.assert_array_equal(value, np.asarray(whole[key], value.dtype))
    np.testing.assert_array_equal(pairs.batch_at(7, 2, 4)["target"], whole["target"][2:4])
    assert pairs.names(7) == ["one" if d == 0 else "two" for d, _, _ in pairs.draw(7)]
