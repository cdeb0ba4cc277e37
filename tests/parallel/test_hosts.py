"""How arrays that lie over several processes come to one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from pipeline import two_processes

from dnd_jax.config import schema
from dnd_jax.parallel import hosts
from dnd_jax.parallel.mesh import make_mesh

SPECS = {
    "one dimension": PartitionSpec(None, "fsdp"),
    "two dimensions": PartitionSpec("tensor", "fsdp"),
    "two axes of one": PartitionSpec(("fsdp", "tensor")),
}


def values() -> np.ndarray:
    """float32 (8, 12) with numbers whose bits a sum would change."""
    x = np.random.default_rng(0).standard_normal((8, 12), np.float32)
    x[::3, ::2], x[1::3, ::5], x[2, 3] = -0.0, np.nan, np.float32(1e-45)
    return x


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_part_comes_to_all_devices_and_never_the_whole(spec):
    mesh = make_mesh(schema.Mesh(1, 2, 2, 2, ()))
    for dtype in (np.float32, jnp.bfloat16):
        x = jax.device_put(values().astype(dtype), NamedSharding(mesh, spec))
        program, found = hosts.part_on_all(x.sharding), np.empty_like(values().astype(dtype))
        parts = hosts.parts_of(x)
        for number, (index, _) in parts.items():
            part = program(x, number)
            assert part.is_fully_replicated and part.nbytes * len(parts) == x.nbytes
            found[index] = part
        assert found.tobytes() == values().astype(dtype).tobytes()


SCRIPT = """
import jax, sys
from jax.sharding import NamedSharding
from dnd_jax.config import schema
from dnd_jax.parallel import hosts
from dnd_jax.parallel.mesh import make_mesh
sys.path.insert(0, "tests/parallel")
from test_hosts import SPECS, values
mesh = make_mesh(schema.Mesh(1, 1, 4, 2, ()))
sent = []
of = hosts.part_on_all
hosts.part_on_all = lambda sharding: lambda x, i: sent.append(i) or of(sharding)(x, i)
for spec in SPECS.values():
    where = NamedSharding(mesh, spec)
    x = jax.make_array_from_callback((8, 12), where, lambda at: values()[at])
    found = hosts.to_host(x)
    assert found.tobytes() == values().tobytes() if hosts.lead() else found is None
print("sent", len(sent))
"""


def test_process_0_has_all_of_an_array_of_two_processes():
    """Of 4, 8 and 8 parts the other process alone has half."""
    for out in two_processes(SCRIPT):
        assert "sent 10" in out, out
