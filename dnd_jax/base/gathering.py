"""How a base is computed with that lies in parts over the mesh axis fsdp.

A device gathers the matrix that a product needs for the product alone, and once more for the
gradient. Left to itself, the partitioner sums products of parts: activations of all tasks, which
are far larger.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "fsdp"


def gathers(mesh: Mesh | None) -> bool:
    """Whether there are parts to gather."""
    return mesh is not None and mesh.shape[AXIS] > 1


def gathered_dot(mesh: Mesh | None, *axes: str | None) -> Callable | None:
    """For nn.Dense: `jax.lax.dot_general` whose kernel is gathered from fsdp; None where nothing
    is. axes: the mesh axes that still split the kernel's dimensions in the product."""
    if not gathers(mesh):
        return None
    here = NamedSharding(mesh, PartitionSpec(*axes))

    def dot(x: jax.Array, kernel: jax.Array, dimensions, precision=None, **more) -> jax.Array:
        @jax.checkpoint  # what is kept for the gradient is the part, not what was gathered
        def product(x, kernel):
            kernel = jax.lax.with_sharding_constraint(kernel, here)
            return jax.lax.dot_general(x, kernel, dimensions, precision, **more)

        return product(x, kernel)

    return dot


def whole(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Activations that no longer lie as the parts that they were made of; what vmap goes over may
    stay split (its spmd_axis_name)."""
    if not gathers(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
