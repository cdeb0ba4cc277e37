"""The mesh, the sharding rules and the train step on 8 virtual devices."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.costs.compiled import topology_devices
from dnd_jax.costs.step_cost import train_arguments
from dnd_jax.generator.generation import shard_generation
from dnd_jax.generator.model import Generator
from dnd_jax.generator.sizes import spec_of
from dnd_jax.generator.step import shard_train_step
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.parallel.mesh import describe_mesh, make_mesh, mesh_record
from dnd_jax.parallel.rules import bytes_per_device, path_name, shard_by_rules, sharding_table

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FEATURES = ((4, 16, 16), (8, 8, 16), (16, 8, 16))
MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "all three": (2, 2, 2), "tensor 4": (1, 2, 4)}


def settings(mesh: tuple[int, int, int] = (1, 1, 1), **train) -> Config:
    raw = load_file("tests/tiny.py")
    raw.generator.features, raw.generator.kernel_size = FEATURES, 3
    raw.train.update(batch_size=16, learning_rate=1e-3, steps=20, **train)
    raw.mesh.update(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    return freeze(raw)


def batches(steps: int, batch: int = 16):
    """The same pairs for every mesh, with some cells that do not count."""
    for step in range(steps):
        rng = np.random.default_rng(step % 2)
        target = rng.standard_normal((batch, *FEATURES[-1]), np.float32)
        target[:, -1, :, 7:] = np.nan
        yield {
            "condition": rng.standard_normal((batch, *FEATURES[0]), np.float32),
            "target": target,
        }


@functools.lru_cache
def first_params():
    """The parameters that every run starts from."""
    module = Generator(spec_of(settings()))
    return jax.device_get(
        jax.jit(module.init)(jax.random.key(0), np.zeros((1, *FEATURES[0]), np.float32))["params"]
    )


def train(config: Config, steps: int = 20):
    """(losses, final parameters, state, shardings) of a few steps on the configured mesh."""
    m = config.mesh
    mesh = make_mesh(m, jax.devices()[: m.data * m.fsdp * m.tensor])
    importance = np.linspace(0.5, 1.5, FEATURES[-1][0], dtype=np.float32)
    sharded = shard_train_step(config, spec_of(config), mesh, importance)
    state = {
        "params": first_params(),
        "opt": train_optimizer(config.train).init(first_params()),
        "step": np.zeros((), np.int32),
    }
    state, losses = jax.device_put(state, sharded.shardings), []
    for batch in batches(steps):
        state, metrics = sharded.step(state, jax.device_put(batch, sharded.over_batch), None)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state["params"]), state, sharded


@functools.lru_cache
def on_one_device(**train_settings):
    return train(settings(**train_settings))


def assert_same(run, reference, tolerance: float = 1e-5):
    np.testing.assert_allclose(run[0], reference[0], rtol=tolerance)
    for (path, got), expected in zip(
        jax.tree.leaves_with_path(run[1]), jax.tree.leaves(reference[1]), strict=True
    ):
        # It has no effect before a norm: Adam walks on rounding errors.
        if path_name(path) != "decoder/stage_0/bias_n":
            np.testing.assert_allclose(
                got, expected, atol=tolerance, rtol=0, err_msg=path_name(path)
            )


FEWER = [
    pytest.param(mesh, id=name, marks=[pytest.mark.slow] * (name != "all three"))
    for name, mesh in MESHES.items()
]


@pytest.mark.parametrize("mesh", FEWER)
def test_every_mesh_trains_as_one_device(mesh):
    run = train(settings(mesh))
    assert run[0][-1] < run[0][0]
    assert_same(run, on_one_device())
    state, sharded = run[2:]
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(sharded.shardings), strict=True):
        # Nothing is replicated that a rule says is sharded.
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
        assert leaf.addressable_shards[0].data.shape == where.shard_shape(leaf.shape)


@pytest.mark.parametrize(
    "mesh, change",
    [
        pytest.param((1, 1, 1), {"micro_batches": 4}, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), {"remat": "convolutions"}, marks=pytest.mark.slow),
        ((2, 2, 2), {"micro_batches": 2, "remat": "stages"}),
    ],
    ids=str,
)
def test_micro_batches_and_remat_change_nothing(mesh, change):
    assert_same(train(settings(mesh, **change)), on_one_device())


def test_a_mesh_and_parts_keep_two_sets_of_prompts_together():
    """Samples 2i and 2i + 1, one of which would else be in another part."""
    run = train(settings((2, 2, 2), wording_weight=0.5, micro_batches=2), steps=5)
    assert_same(run, train(settings(wording_weight=0.5), steps=5))


def test_a_mesh_starts_as_one_device_and_fsdp_divides_its_state():
    config = settings((1, 8, 1))
    sharded = shard_train_step(
        config, spec_of(config), make_mesh(config.mesh), np.ones(FEATURES[-1][0])
    )
    state = sharded.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), first_params())
    total, held = bytes_per_device(sharded.shapes, sharded.shardings)
    assert held <= total / 8 * 1.05
    assert held == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_every_mesh_generates_as_one_device(mesh):
    """One adapter, which every part of data and fsdp makes whole, and as many as they are."""
    config, one = settings(mesh), generation(settings(), 1)
    condition = np.random.default_rng(0).standard_normal((8, *FEATURES[0]), np.float32)
    for batch in (1, mesh[0] * mesh[1]):
        sharded = generation(config, batch)
        params = jax.device_put(first_params(), sharded.shardings)
        got = sharded.step(params, condition[:batch])
        assert got.sharding.is_equivalent_to(sharded.over_batch, 4) and got.dtype == np.float32
        expected = np.concatenate(
            [one.step(first_params(), condition[i : i + 1]) for i in range(batch)]
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
        assert all(
            leaf.addressable_shards[0].data.size * mesh[1] * mesh[2] == leaf.size
            for leaf in kernels
        )


def generation(config: Config, batch: int):
    m = config.mesh
    mesh = make_mesh(m, jax.devices()[: m.data * m.fsdp * m.tensor])
    return shard_generation(spec_of(config), mesh, m.rules, batch)


@pytest.mark.parametrize(
    "optimizer", [pytest.param("adamw_bfloat16_moment", marks=pytest.mark.slow), "adafactor"]
)
def test_lean_optimizers_take_less_memory_and_learn(optimizer):
    lean, full = train(settings(optimizer=optimizer)), on_one_device()
    fall = lambda losses: losses[0] - losses[-1]
    *_, last = batches(20)
    importance = np.linspace(0.5, 1.5, FEATURES[-1][0], dtype=np.float32)
    nothing = np.nanmean(importance[:, None, None] * last["target"] ** 2)  # of an output of zero
    assert full[0][0] - nothing < 0.7 * fall(full[0])  # which would not do
    assert fall(lean[0]) > 0.9 * fall(full[0])

    def bytes_of(run):
        return sum(x.nbytes for x in jax.tree.leaves(run[2]["opt"]))

    assert bytes_of(lean) < {"adamw_bfloat16_moment": 0.76, "adafactor": 0.3}[optimizer] * bytes_of(
        full
    )


# The share of the state that a device holds under fsdp = 8, in eighths: 300 = 4 x 75 and 500 = 4 x
# 125 channels do not divide by 8.
PAPER = {
    "qwen2_5_0_5b_commonsense": 1.01,
    "qwen2_5_1_5b_code": 1.24,
    "qwen2_5_1_5b_math": 1.48,
    "qwen2_5_7b_code": 1.06,
    "qwen2_5_7b_math": 1.06,
    "qwen2_5_vl_3b_math": 1.18,
}


def sharded_setting(name: str, fsdp: int, tensor: int):
    """The train step of a configuration over one part of data; nothing is compiled."""
    raw = load_file(f"configs/{name}.py")
    raw.mesh.update(data=1, fsdp=fsdp, tensor=tensor)
    config = freeze(raw)
    spec = spec_of(config)
    mesh = make_mesh(config.mesh, jax.devices()[: fsdp * tensor])
    return shard_train_step(config, spec, mesh, np.ones(spec.token_grid[0], np.float32))


@pytest.mark.parametrize("name", ["qwen2_5_0_5b_commonsense", "qwen2_5_7b_math"])
def test_the_base_lies_beside_a_decoder_of_the_same_shardings(name, update_golden):
    """The settings that train it through the base: the decoder's state as in the setting on
    weights, and of the base each device an eighth of all but norms, biases and the two tables."""
    raw = load_file(f"{name}_answers")
    raw.mesh.update(data=1, fsdp=4, tensor=2)
    _, (state, _, frozen) = train_arguments(freeze(raw), make_mesh(freeze(raw).mesh))
    where = jax.tree.map(lambda x: x.sharding, (state, frozen["base"]))
    decoder, base = map(sharding_table, (state, frozen["base"]), where)
    assert "\n".join(decoder) + "\n" == (GOLDEN / f"sharding_{name}.txt").read_text()
    path, table = GOLDEN / f"sharding_{name}_answers_base.txt", "\n".join(base) + "\n"
    if update_golden:
        path.write_text(table)
    assert table == path.read_text()
    layers = frozen["base"]["layers"]
    total, held = bytes_per_device(layers, where[1]["layers"])
    assert held < 1.01 * total / 8


@pytest.mark.parametrize("name, limit", PAPER.items())
def test_fsdp_divides_the_state_of_the_papers_settings(name, limit):
    """By 8 whatever has a dimension that divides, whole what has none; by 4 nearly all."""
    sharded = sharded_setting(name, 8, 1)
    total, held = bytes_per_device(sharded.shapes, sharded.shardings)
    assert held <= limit * total / 8
    for leaf, where in zip(
        jax.tree.leaves(sharded.shapes), jax.tree.leaves(sharded.shardings), strict=True
    ):
        ways = 8 if any(size % 8 == 0 for size in leaf.shape) else 1
        assert math.prod(where.shard_shape(leaf.shape)) * ways == math.prod(leaf.shape), leaf.shape
    sharded = sharded_setting(name, 4, 1)
    total, held = bytes_per_device(sharded.shapes, sharded.shardings)
    assert held <= 1.005 * total / 4


@pytest.mark.parametrize("name", [*PAPER, "mini", "real_text_small"])
def test_the_shardings_of_all_settings_are_these(name, update_golden):
    sharded = sharded_setting(name, 4, 2)
    table = "\n".join(sharding_table(sharded.shapes, sharded.shardings)) + "\n"
    path = GOLDEN / f"sharding_{name}.txt"
    if update_golden:
        path.write_text(table)
    assert table == path.read_text()


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            {"data": 4, "fsdp": 4, "tensor": 2},
            "config.mesh: data 4 x fsdp 4 x tensor 2 = 32, but 8 devices; this works: "
            "--config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2",
        ),
        (
            {"data": -1, "fsdp": 3, "tensor": 1},
            "config.mesh: data ? x fsdp 3 x tensor 1 = a multiple of 3, but 8 devices; this "
            "works: "
            "--config.mesh.data=8 --config.mesh.fsdp=1 --config.mesh.tensor=1",
        ),
        (
            {"data": -1, "fsdp": -1, "tensor": 1},
            "config.mesh: slices 1, data -1, fsdp -1, tensor 1; each is at least 1, and one of "
            "data, fsdp and tensor may be -1 "
            "(the rest)",
        ),
        (
            {"data": 1, "fsdp": 1, "tensor": 1, "slices": 3},
            "config.mesh: slice 3 x data 1 x fsdp 1 x tensor 1 = 3, but 8 devices; this works: "
            "--config.mesh.slices=1 --config.mesh.data=8 --config.mesh.fsdp=1 "
            "--config.mesh.tensor=1",
        ),
    ],
    ids=["too many", "no divisor", "two unknown", "slices"],
)
def test_a_mesh_that_does_not_fit_says_which_one_does(sizes, message):
    mesh = dataclasses.replace(settings().mesh, **sizes)
    with pytest.raises(InputError) as error:
        make_mesh(mesh)
    assert str(error.value) == message


def test_groups_of_hosts_make_slices():
    mesh = make_mesh(dataclasses.replace(settings().mesh, slices=2, data=-1, fsdp=2, tensor=1))
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [d.id for d in mesh.devices.flat] == list(range(8))


@dataclasses.dataclass(frozen=True)
class Gpu:
    """As JAX shows one of a cluster of hosts: each host calls itself a slice."""

    id: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"

    @property
    def process_index(self) -> int:
        return self.id // 8

    slice_index = process_index


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({"data": 16}, (1, 16, 1, 1)),
        ({"data": 2, "fsdp": 8}, (1, 2, 8, 1)),
        ({"data": 1, "fsdp": 16}, (1, 1, 16, 1)),
        ({"slices": 1, "data": -1, "tensor": 4}, (1, 4, 1, 4)),
        ({"slices": 2, "data": 1, "fsdp": 8}, (2, 1, 8, 1)),
        ({"slices": 4, "data": -1, "fsdp": 2}, (4, 2, 2, 1)),
    ],
)
def test_hosts_of_gpus_take_any_mesh_and_keep_the_inner_axes_together(asked, shape):
    """Two hosts of eight; JAX lists them in any order."""
    gpus = [Gpu(int(i)) for i in np.random.default_rng(0).permutation(16)]
    mesh = make_mesh(
        dataclasses.replace(settings().mesh, **{"slices": 0, "fsdp": 1, "tensor": 1} | asked), gpus
    )
    assert mesh.devices.shape == shape
    inside = math.prod(shape[2:])  # fsdp x tensor
    hosts = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(-1, inside)
    assert inside > 8 or all(len({*row}) == 1 for row in hosts)
    assert describe_mesh(mesh).endswith("over 16 devices (2 hosts x 8) (NVIDIA H100 80GB HBM3)")


def test_slices_of_tpus_are_kept_together_and_their_order_is_recorded():
    """Two slices of 2x2x2 chips, whatever the order that JAX lists them in: neighbours on the mesh
    have a link between them."""
    devices = topology_devices("v5p:2x2x2", 2)
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    mesh = make_mesh(
        dataclasses.replace(settings().mesh, slices=0, data=2, fsdp=2, tensor=2), shuffled
    )
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 2}
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    coords = np.vectorize(lambda d: np.array(d.coords), signature="()->(n)")(mesh.devices)
    for axis in (1, 2, 3):
        assert (np.abs(np.diff(coords, axis=axis)).sum(-1) == 1).all()
    mesh = make_mesh(
        dataclasses.replace(settings().mesh, slices=0, data=1, fsdp=4, tensor=2), shuffled
    )
    record = json.loads(json.dumps(mesh_record(mesh)))
    assert record["axes"] == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 2}
    assert record["devices"] != sorted(record["devices"])  # an order that is worth a record
    by_id = {d.id: d for d in devices}
    again = np.array([by_id[i] for i in record["devices"]]).reshape(tuple(record["axes"].values()))
    assert (again == mesh.devices).all()
    with pytest.raises(
        InputError, match="config.mesh.slices = 4, but the devices are in 2 slices; leave it at 0"
    ):
        make_mesh(
            dataclasses.replace(settings().mesh, slices=4, data=-1, fsdp=1, tensor=1), devices
        )


def test_a_parameter_without_a_rule_is_named():
    config = settings((1, 8, 1))
    mesh = make_mesh(config.mesh)
    rules = ((r"kernel$", ("fsdp", None)),)
    shapes = {"a": {"kernel": np.zeros((6, 8))}, "b": np.zeros(3), "step": np.zeros(())}
    with pytest.raises(InputError) as error:
        shard_by_rules(mesh, rules, shapes)
    assert "a/kernel (6, 8) has no rule in config.mesh.rules: ('fsdp', None) does not fit" in str(
        error.value
    )
    assert "b (3,) has no rule in config.mesh.rules" in str(error.value)


def test_a_batch_that_does_not_divide_names_one_that_does():
    with pytest.raises(
        InputError,
        match=r"config.train.batch_size = 12 is not divisible by slice x data x fsdp = 8; 8 is",
    ):
        config = settings((8, 1, 1))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=12))
        train(config, steps=1)
