"""Where the decoder's arrays lie on a device mesh while they are computed with. Where they are kept
in between: `dnd_jax/parallel/rules.py`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import DTypeLike

BATCH_AXES = ("slice", "data", "fsdp")


def batch_ways(mesh: jax.sharding.Mesh) -> int:
    """How many parts of a mesh a batch can be split over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The constraints on activations and kernels. Without a mesh there are none.

    A batch is split over slice x data x fsdp. A convolution gathers its kernel from fsdp when it
    needs it, once forwards and once backwards, and scatters the sum of its gradient back there;
    each part of `tensor` computes its share of the output channels, which are then gathered: the
    next convolution slides over that axis. A dimension that does not divide stays whole. Each
    device convolves what it has by itself (shard_map): left to the partitioner, gradients of
    kernels would be summed over the batch as spectra, several times as large.
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
        self,
        function: Callable,
        x_BxNxLxC: jax.Array,
        kernel: jax.Array,
        axis: int,
        dtype: DTypeLike = None,
    ) -> jax.Array:
        """Runs function(x, kernel) on every device's own parts. The result's output channels, on
        `axis`, are gathered again.

        dtype: what the kernel is rounded to before it is gathered (default: its own type). Its
        gradient is summed over the devices in the kernel's own type.
        """
        dtype = dtype or kernel.dtype
        if self.mesh is None or self.mesh.size == 1:
            return function(x_BxNxLxC, kernel.astype(dtype))
        batch = BATCH_AXES if self.batch_ways(len(x_BxNxLxC)) > 1 else None
        channels = "tensor" if self.channel_ways(kernel.shape[3]) > 1 else None
        kernel_axes, gathered = self._kept(kernel.shape, channels)
        summed = tuple(axis for axis in batch or () if self.mesh.shape[axis] > 1)
        local = _Local(function, dtype, gathered, summed, channels)
        y_axes = [batch, None, None, None]
        y_axes[axis] = channels
        of_x, of_kernel = PartitionSpec(batch), PartitionSpec(*kernel_axes)
        of_y = PartitionSpec(*y_axes)

        def mapped(function, given, made):
            return jax.shard_map(
                function, mesh=self.mesh, in_specs=given, out_specs=made, check_vma=False
            )

        forward = jax.custom_vjp(mapped(local.forward, (of_x, of_kernel), of_y))
        backward = mapped(local.backward, (of_x, of_kernel, of_y), (of_x, of_kernel))
        forward.defvjp(
            lambda x, kernel: (forward(x, kernel), (x, kernel)),
            lambda kept, dy: backward(*kept, dy),
        )
        return self.activation(forward(x_BxNxLxC, kernel))

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


@dataclasses.dataclass(frozen=True)
class _Local:
    """A convolution and its gradients as one device computes them, inside shard_map.

    Both passes are written out. Of a derived one the gathered kernel would be kept until the
    backward pass, and gradients be summed over axes of one member and over equal parts.
    """

    function: Callable  # of x and a whole kernel
    dtype: DTypeLike  # of a kernel when it is gathered
    gathered: int | None  # the kernel's dimension that is gathered from fsdp
    summed: tuple[str, ...]  # the axes over which the batch is split
    channels: str | None  # the axis that splits the output channels

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self.function(x, self._whole(kernel))

    def backward(
        self, x: jax.Array, kernel: jax.Array, dy: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if self.gathered is not None:  # again, and not before dy is there
            kernel, dy = jax.lax.optimization_barrier((kernel, dy))
        _, gradients_of = jax.vjp(self.function, x, self._whole(kernel))
        dx, dkernel = gradients_of(dy)
        if self.channels:
            dx = jax.lax.psum(dx, self.channels)
        return dx, self._summed(dkernel.astype(kernel.dtype), kernel.shape)

    def _whole(self, kernel: jax.Array) -> jax.Array:
        kernel = kernel.astype(self.dtype)
        if self.gathered is None:
            return kernel
        return jax.lax.all_gather(kernel, "fsdp", axis=self.gathered, tiled=True)

    def _summed(self, dkernel: jax.Array, kept: tuple[int, ...]) -> jax.Array:
        """The part of that shape of a whole kernel's gradient, summed over the batch."""
        over, axis = self.summed, self.gathered
        if axis is not None and "fsdp" in over:
            dkernel = jax.lax.psum_scatter(dkernel, "fsdp", scatter_dimension=axis, tiled=True)
            over = tuple(a for a in over if a != "fsdp")
        elif axis is not None:  # each device has the whole batch
            start = kept[axis] * jax.lax.axis_index("fsdp")
            dkernel = jax.lax.dynamic_slice_in_dim(dkernel, start, kept[axis], axis)
        return jax.lax.psum(dkernel, over) if over else dkernel


ANYWHERE = Placement()  # no mesh
