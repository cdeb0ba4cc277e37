"""What a train step computes with: LoRA checkpoints that stay on the devices, conditions in the
compute type."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Mesh
from dnd_jax.config.validate import freeze
from dnd_jax.core.chips import chip_of
from dnd_jax.costs.compiled import compile_for, topology_devices
from dnd_jax.generator import inputs
from dnd_jax.generator.inputs import condition_of, kept_checkpoints, with_tokens
from dnd_jax.generator.pairs import PairedDataset, Pairs
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import ANYWHERE, BATCH_AXES
from dnd_jax.parallel.rules import held_bytes

# Checkpoints of each dataset; 13 tokens, which nothing divides, of several rows a device.
COUNTS, GRID = (4, 2, 7), (13, 30, 50)
MESHES = [(1, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (2, 2, 2, 1), (2, 1, 4, 1)]


def mesh_of(sizes: tuple[int, int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(Mesh(*sizes, rules=()), jax.devices()[: int(np.prod(sizes))])


def train_settings(**changes):
    return dataclasses.replace(freeze(load_file("tests/tiny.py")).train, **changes)


def targets() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = [rng.standard_normal((count, *GRID), np.float32) for count in COUNTS]
    for of_dataset in found:
        of_dataset[:, -1, :, 3:] = np.nan  # cells that do not count
    return found


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_what_is_picked_is_the_checkpoint_and_each_device_holds_its_part(sizes, capsys):
    mesh, whole = mesh_of(sizes), np.concatenate(targets())
    kept = kept_checkpoints(train_settings(targets_on="devices"), targets(), mesh)["checkpoints"]
    parts = sizes[1] * sizes[2]  # each slice has them all
    assert {shard.data.shape[0] for shard in kept.addressable_shards} == {len(whole)}
    held = kept.nbytes / parts
    assert {shard.data.nbytes for shard in kept.addressable_shards} == {held}
    assert f"stay on the devices: {held / 1e9:.3g} GB of each" in capsys.readouterr().out

    numbers = np.random.default_rng(1).integers(0, len(whole), 16).astype(np.int32)
    over_batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    batch = {"target": numbers, "teacher": numbers[::-1].copy(), "condition": np.ones((16, 2))}
    pick = jax.jit(lambda kept, batch: with_tokens(batch, kept, GRID, mesh))
    found = pick(kept, jax.device_put(batch, over_batch))
    np.testing.assert_array_equal(found["target"], whole[numbers])
    np.testing.assert_array_equal(found["teacher"], whole[numbers[::-1]])
    np.testing.assert_array_equal(found["condition"], batch["condition"])
    assert found["target"].sharding.is_equivalent_to(over_batch, 4)


def test_picking_moves_the_batch_once_and_gathers_no_checkpoint():
    mesh = mesh_of((1, 4, 2, 1))
    kept = kept_checkpoints(train_settings(targets_on="devices"), targets(), mesh)["checkpoints"]
    over_batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    numbers = jax.device_put({"target": np.zeros(16, np.int32)}, over_batch)
    pick = jax.jit(lambda kept, batch: with_tokens(batch, kept, GRID, mesh))
    program = pick.lower(kept, numbers).compile().as_text()
    moved = [line for line in program.splitlines() if "f32" in line.partition("(")[0]]
    assert any("all-to-all" in line for line in moved)
    assert not [x for x in moved if any(k in x for k in ("all-gather(", "all-reduce("))]


def test_where_they_stay_unasked(monkeypatch):
    """On a known chip with room for eight times as much, and only if a step needs them."""
    mesh, some = mesh_of((1, 1, 1, 1)), targets()
    held = held_bytes(inputs.kept_shape(sum(COUNTS), GRID, mesh))
    assert not kept_checkpoints(train_settings(), some, mesh), "a CPU's memory is the host's"
    chip = chip_of("TPU v5p")
    for memory, stay in ((8 * held, True), (8 * held - 1, False)):
        known = dataclasses.replace(chip, memory=memory)
        monkeypatch.setattr(inputs, "chip_of", lambda kind, known=known: known)
        assert bool(kept_checkpoints(train_settings(), some, mesh)) == stay
    monkeypatch.setattr(inputs, "chip_of", lambda kind: chip)
    assert not kept_checkpoints(train_settings(targets_on="host"), some, mesh)
    for without in (
        {"objective": "answers", "size_weight": 0.1},  # which reads checkpoints, but in no step
        {"objective": "distill", "shots": 2},
    ):
        assert not kept_checkpoints(train_settings(**without), some, mesh)
        assert not kept_checkpoints(train_settings(**without), [None] * len(some), mesh)
    first = train_settings(objective="answers", weights_first=1)
    assert kept_checkpoints(first, some, mesh)


def test_a_batch_has_the_numbers_of_the_checkpoints_that_it_would_have():
    rng, whole = np.random.default_rng(0), np.concatenate(targets())
    datasets = [
        PairedDataset(f"d{i}", {"condition": rng.standard_normal((6, 2, 3), np.float32)}, x)
        for i, x in enumerate(targets())
    ]
    how = datasets, 16, 4, 0
    given, numbered = Pairs(*how), Pairs(*how, kept=True)
    seen = set()
    for step in range(8):
        batch, numbers = given.batch_at(step), numbered.batch_at(step)
        assert numbers["target"].shape == (16,) and numbers["target"].dtype == np.int32
        np.testing.assert_array_equal(whole[numbers["target"]], batch["target"])
        np.testing.assert_array_equal(numbers["condition"], batch["condition"])
        np.testing.assert_array_equal(
            numbered.batch_at(step, 4, 7)["target"], numbers["target"][4:7]
        )
        seen |= {*numbers["target"].tolist()}
    assert seen == {*range(sum(COUNTS))}


@pytest.mark.slow
def test_a_tpu_picks_without_a_copy_of_all_that_is_kept():
    """What it needs beside its arguments, by its compiler, is the same for ten times as many."""
    mesh = make_mesh(Mesh(1, 4, 1, 1, rules=()), topology_devices("v5e:2x2"))
    grid, over_batch = (300, 10, 130), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    numbers = jax.ShapeDtypeStruct((16,), np.int32, sharding=over_batch)
    pick = jax.jit(lambda kept, at: with_tokens({"target": at}, kept, grid, mesh)["target"])
    held, beside = [], []
    for count in (20, 200):
        kept = inputs.kept_shape(count, grid, mesh)
        memory = compile_for("tpu", pick, kept, numbers).memory_analysis()
        held.append(memory.argument_size_in_bytes / held_bytes(kept))
        beside.append(memory.temp_size_in_bytes)
    assert max(held) < 1.01, "as much as is planned"
    assert beside[1] < 1.1 * beside[0]


def test_noise_is_added_in_float32_to_a_condition_in_bfloat16():
    """1e-4 beside 1 is none in bfloat16; what the decoder's own rounding leaves of it is little for
    values beyond 1/8, and all for small ones."""
    stored = np.ones((2, 3, 4, 5), ml_dtypes.bfloat16)
    condition = condition_of({"condition": stored}, None, None, ANYWHERE)
    assert condition.dtype == np.float32
    noise = inputs.noisy(condition, 1e-4, jax.random.key(0)) - 1
    assert 0.5e-4 < float(np.std(noise)) < 2e-4
    small = condition_of({"condition": stored / 1024}, None, None, ANYWHERE)
    for x, changed in ((condition, False), (small, True)):
        seen = inputs.noisy(x, 1e-4, jax.random.key(0)).astype(ml_dtypes.bfloat16)
        assert bool(np.any(seen != x.astype(ml_dtypes.bfloat16))) == changed
