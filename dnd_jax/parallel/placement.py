"""Where the decoder's arrays lie on a device mesh while they are computed with. Where they are kept
in between: `dnd_jax/parallel/rules.py`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

BATCH_AXES = ("slice", "data", "fsdp")


def batch_ways(mesh: jax.sharding.Mesh) -> int:
    """How many parts of a mesh a batch can be split over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The constraints on activations and kernels. Without a mesh there are none.

    A batch is split over slice x data x fsdp. A convolution gathers its kernel from fsdp when it
    needs it, and scatters the sum of its gradient back there; each part of `tensor` computes its
    share of the output channels, which are then gathered: the next convolution slides over that
    axis. A dimension that does not divide stays whole. Each device convolves what it has by itself
    (shard_map): left to the partitioner, gradients of kernels would be summed over the batch as
    spectra, several times as large.
    """

    mesh: jax.sharding.Mesh | None = None

    @property
    def platform(self) -> str:
        """What is compiled for: "cpu", "gpu" or "tpu"."""
        found = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return "gpu" if found in ("cuda", "rocm") else found

    def batch_ways(self, batch: int) -> int:
        """How many parts a batch is split into."""
        ways = 1 if self.mesh is None else batch_ways(self.mesh)
        return ways if batch % ways == 0 else 1

    def channel_ways(self, channels: int) -> int:
        """How many parts the output channels of a convolution are split into."""
        ways = 1 if self.mesh is None else self.mesh.shape["tensor"]
        return ways if channels % ways == 0 else 1

    def parts(
        self, x_BxNxLxC: jax.Array, kernel: jax.Array
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """The shapes of an input and a kernel (k, k, in, out) that one device convolves."""
        batch, *grid = x_BxNxLxC.shape
        *taps, size_out = kernel.shape
        return (
            jax.ShapeDtypeStruct((batch // self.batch_ways(batch), *grid), x_BxNxLxC.dtype),
            jax.ShapeDtypeStruct((*taps, size_out // self.channel_ways(size_out)), kernel.dtype),
        )

    def convolve(
        self, function: Callable, x_BxNxLxC: jax.Array, kernel: jax.Array, axis: int
    ) -> jax.Array:
        """Runs function(x, kernel) on every device's own parts. The result's output channels, on
        `axis`, are gathered again."""
        if self.mesh is None or self.mesh.size == 1:
            return function(x_BxNxLxC, kernel)
        batch = BATCH_AXES if self.batch_ways(len(x_BxNxLxC)) > 1 else None
        channels = "tensor" if self.channel_ways(kernel.shape[3]) > 1 else None
        kernel_axes, gathered = self._kept(kernel.shape, channels)

        def local(x, kernel):
            if gathered is not None:
                kernel = jax.lax.all_gather(kernel, "fsdp", axis=gathered, tiled=True)
            return function(x, kernel)

        split = [batch, None, None, None]
        split[axis] = channels
        specs = PartitionSpec(batch), PartitionSpec(*kernel_axes)
        mapped = jax.shard_map(
            local, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(*split), check_vma=False
        )
        return self.activation(mapped(x_BxNxLxC, kernel))

    def _kept(self, shape: tuple[int, ...], channels: str | None) -> tuple[tuple, int | None]:
        """The mesh axes of a kernel's dimensions (k, k, in, out) while fsdp still splits it, and
        which one that is, if any."""
        ways, (size_in, size_out) = self.mesh.shape["fsdp"], shape[2:]
        if ways > 1 and size_in % ways == 0:
            return (None, None, "fsdp", channels), 2
        if ways > 1 and size_out // self.channel_ways(size_out) % ways == 0:
            return (None, None, None, (channels, "fsdp") if channels else "fsdp"), 3
        return (None, None, None, channels), None

    def activation(self, x_Bx: jax.Array) -> jax.Array:
        """An activation with its batch split."""
        return self._constrain(x_Bx, BATCH_AXES if self.batch_ways(x_Bx.shape[0]) > 1 else None)

    def gather_small(self, params: Any) -> Any:
        """The parameters, of which all but the convolutions' kernels are gathered on every device.
        A kernel is gathered by the convolution that needs it."""
        return jax.tree.map(lambda p: p if p.ndim == 4 else self._constrain(p), params)

    def _constrain(self, x: jax.Array, *axes) -> jax.Array:
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


ANYWHERE = Placement()  # no mesh
