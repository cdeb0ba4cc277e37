"""What processes read of a checkpoint, and how shares of it become the state."""

import math

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from pipeline import two_processes

from dnd_jax.parallel.rules import finest

AXES = ("slice", "data", "fsdp", "tensor")


@st.composite
def sharded(draw):
    """(a sharding over 8 devices, the shape of an array that it divides)."""
    ways = draw(st.sampled_from([(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 8, 1)]))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(ways), AXES)
    shape = [draw(st.sampled_from([1, 2, 3, 4, 6, 12, 15])) for _ in range(draw(st.integers(0, 3)))]
    spec = [None] * len(shape)
    for axis, size in zip(AXES, ways, strict=True):
        at = draw(st.integers(-1, len(shape) - 1))
        if at >= 0:
            spec[at] = (*(spec[at] or ()), axis)
            shape[at] *= size
    return NamedSharding(mesh, PartitionSpec(*spec)), tuple(shape)


@settings(max_examples=60, deadline=None)
@given(sharded())
def test_the_finest_sharding_splits_parts_among_those_that_have_them(case):
    where, shape = case
    fine = finest(where, shape)
    before, after = (
        {device: np.zeros(shape, bool) for device in where.mesh.devices.flat} for _ in range(2)
    )
    for sharding, marks in ((where, before), (fine, after)):
        for device, index in sharding.devices_indices_map(shape).items():
            marks[device][index] = True
    assert all(np.all(before[device] >= after[device]) for device in before)
    # As many parts as there can be: where two devices still have the same, no size of it is even.
    part = fine.shard_shape(shape)
    same = 8 * math.prod(part) // math.prod(shape)
    assert same == 1 or all(size % 2 for size in part)
    assert list(fine.mesh.devices.flat) == list(where.mesh.devices.flat)
    assert fine == where or not fine.is_equivalent_to(where, len(shape))


SCRIPT = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp, tensorstore
from jax.sharding import NamedSharding, PartitionSpec
from dnd_jax.config import schema
from dnd_jax.loop import checkpoints
from dnd_jax.parallel.mesh import make_mesh
mesh = make_mesh(schema.Mesh(1, 4, 2, 1, ()))
everywhere, split = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), (None, "fsdp")))
shapes = {"whole": ((300, 4000), everywhere), "split": ((75, 4000), split),
          "odd": ((37, 1001), everywhere), "scalar": ((), everywhere)}
values = {name: np.random.default_rng(len(name)).standard_normal(shape, np.float32)
          for name, (shape, _) in shapes.items()}
values["scalar"] = np.float32(3)
state = {name: jax.make_array_from_callback(shape, where, lambda at: values[name][at])
         for name, (shape, where) in shapes.items()}
manager = checkpoints.open_checkpoints(sys.argv[1])
record = {"format": 1, "settings": {}, "step": 7, "sums": checkpoints.sums(state)}
manager.save(7, args=ocp.args.Composite(
    state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)))
manager.wait_until_finished()
read = lambda: sum(
    of["values"][0]["value"]
    for of in tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"))
before = read()
step, found = checkpoints.restore(manager, state, {})
assert step == 7
for name, x in state.items():
    assert found[name].sharding == x.sharding, name  # mesh included: the step is compiled once
    for mine, was in zip(found[name].addressable_shards, x.addressable_shards, strict=True):
        assert np.array_equal(mine.data, was.data), name
total = sum(x.nbytes for name, x in state.items() if name != "odd")
print("read", (read() - before - state["odd"].nbytes) / total)
"""


def test_each_process_reads_its_share_of_what_all_have(tmp_path):
    """Half of the arrays that 8 devices can divide; compressed, and with some bytes of tables."""
    for out in two_processes(SCRIPT, str(tmp_path / "checkpoints")):
        share = float(out.rpartition("read ")[2])
        assert share < 0.55, out
