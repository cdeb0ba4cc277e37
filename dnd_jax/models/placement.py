"""Where the decoder's arrays lie on a device mesh while they are computed with. `dnd_jax/sharding.py` says where they are kept."""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

AXES = ("slice", "data", "fsdp", "tensor")  # from the slowest network to the fastest
BATCH_AXES = ("slice", "data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Placement:
    """The constraints on activations and kernels. Without a mesh there are none.

    A batch is split over slice x data x fsdp. A convolution gathers its kernel from fsdp when it needs it, and each part of
    `tensor` computes its share of the output channels, which are then gathered: the next convolution slides over that axis.
    A dimension that does not divide stays whole.
    """

    mesh: jax.sharding.Mesh | None = None

    @property
    def platform(self) -> str:
        """What is compiled for: "cpu", "gpu" or "tpu"."""
        found = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return "gpu" if found in ("cuda", "rocm") else found

    def batch_ways(self, batch: int) -> int:
        """How many parts a batch is split into."""
        ways = 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return ways if batch % ways == 0 else 1

    def channel_ways(self, channels: int) -> int:
        """How many parts the output channels of a convolution are split into."""
        ways = 1 if self.mesh is None else self.mesh.shape["tensor"]
        return ways if channels % ways == 0 else 1

    def kernel(self, kernel: jax.Array) -> jax.Array:
        """A convolution's kernel (k, k, in, out) as it is used."""
        return self._constrain(kernel, None, None, None, "tensor" if self.channel_ways(kernel.shape[3]) > 1 else None)

    def activation(self, x_Bx: jax.Array, channel_axis: int | None = None) -> jax.Array:
        """An activation with its batch split, and with the channels of a convolution's output on `channel_axis` split as well."""
        axes = [BATCH_AXES if self.batch_ways(x_Bx.shape[0]) > 1 else None, *(None,) * (x_Bx.ndim - 1)]
        if channel_axis is not None and self.channel_ways(x_Bx.shape[channel_axis]) > 1:
            axes[channel_axis] = "tensor"
        return self._constrain(x_Bx, *axes)

    def whole(self, x: jax.Array) -> jax.Array:
        """A small array, gathered."""
        return self._constrain(x)

    def _constrain(self, x: jax.Array, *axes) -> jax.Array:
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


ANYWHERE = Placement()  # no mesh
