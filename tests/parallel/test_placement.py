"""A convolution on 8 virtual devices: what is kept between its passes, what is exchanged, and in
which type gradients are summed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dnd_jax.config import schema
from dnd_jax.costs.compiled import compile_for, topology_devices
from dnd_jax.ops.convolution import convolve, direct
from dnd_jax.ops.cost_model import ConvPlan
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import BATCH_AXES, Placement
from dnd_jax.parallel.rules import held_bytes

AXIS, TAPS = 3, 3
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all three": (2, 2, 2), "tensor": (1, 2, 4)}


def place_of(data: int, fsdp: int, tensor: int) -> Placement:
    return Placement(make_mesh(schema.Mesh(1, data, fsdp, tensor, ())))


def problem(place: Placement, channels: tuple[int, int], batch: int = 16, dtype=jnp.float32):
    """(x, kernel, gradient of y), on the mesh as a train step has them."""
    size_in, size_out = channels
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, 4, 6, size_in))
    kernel = rng.normal(size=(TAPS, TAPS, *channels)) / np.sqrt(TAPS**2 * size_in)
    dy = rng.normal(size=(batch, 4, 6, size_out))
    axes, _ = place._kept(kernel.shape, "tensor" if place.channel_ways(size_out) > 1 else None)
    over = BATCH_AXES if place.batch_ways(batch) > 1 else None
    x, dy = (
        jax.device_put(a.astype(dtype), NamedSharding(place.mesh, PartitionSpec(over)))
        for a in (x, dy)
    )
    where = NamedSharding(place.mesh, PartitionSpec(*axes))
    return x, jax.device_put(kernel.astype(np.float32), where), dy


def convolved(place: Placement, dtype=None):
    function = functools.partial(direct, axis=AXIS)
    return lambda x, kernel: place.convolve(function, x, kernel, AXIS, dtype)


def with_gradients(function, x, kernel, dy):
    y, gradients_of = jax.vjp(function, x, kernel)
    return y, *gradients_of(dy)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("channels", [(16, 24), (6, 16), (16, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("batch", [16, 3])
def test_every_mesh_gives_the_gradients_of_one_device(mesh, channels, batch):
    """Also of channels that it does not divide, and of a batch that each device has whole."""
    place = place_of(*mesh)
    values = problem(place, channels, batch)
    found = jax.jit(functools.partial(with_gradients, convolved(place)))(*values)
    expected = with_gradients(functools.partial(direct, axis=AXIS), *jax.device_get(values))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("channels", [(16, 24), (6, 16)], ids=["of the input", "of the output"])
def test_a_gathered_kernel_is_not_kept_for_the_backward_pass(channels):
    """What lies between the passes is what went in."""
    place = place_of(1, 8, 1)
    x, kernel, _ = problem(place, channels)
    kept = jax.jit(lambda x, kernel: jax.vjp(convolved(place), x, kernel)[1])(x, kernel)
    assert held_bytes(kept) == held_bytes((x, kernel)) and held_bytes(kernel) * 8 == kernel.nbytes


def exchanged(place: Placement, channels: tuple[int, int], dtype=jnp.float32) -> list[tuple]:
    """(what, type) of every exchange in both passes."""
    values = problem(place, channels, dtype=dtype)
    step = jax.jit(functools.partial(with_gradients, convolved(place, dtype)))
    text = step.lower(*values).as_text()
    kinds = r'"?stablehlo\.(all_gather|all_reduce|reduce_scatter)"?\(.*?\) -> tensor<[\dx]*(\w+)>'
    return sorted(re.findall(kinds, text, re.DOTALL))


@pytest.mark.parametrize(
    ("mesh", "channels", "expected"),
    [
        ("data", (16, 24), [("all_reduce", "f32")]),
        ("fsdp", (16, 24), [("all_gather", "bf16")] * 2 + [("reduce_scatter", "f32")]),
        ("fsdp", (5, 7), [("all_reduce", "f32")]),
        (
            "all three",
            (16, 24),
            [("all_gather", "bf16")] * 2
            + [("all_reduce", "bf16"), ("all_reduce", "f32"), ("reduce_scatter", "f32")],
        ),
        ("tensor", (5, 7), [("all_reduce", "f32")]),
    ],
)
def test_what_devices_exchange(mesh, channels, expected):
    """A kernel is gathered once a pass, rounded; its gradient is summed once, in float32; that of
    the input only where parts of the channels were computed. Nothing is summed over axes of one
    member, nor over parts that are equal."""
    assert exchanged(place_of(*MESHES[mesh]), channels, jnp.bfloat16) == expected


def test_a_tpu_holds_no_kernel_with_taps_innermost():
    """There 9 of them would take the room of 16, in a kernel, its gradient and both at once: so the
    compiler chose in a large conv_n, and needed 6.7 times the kernel's bytes."""
    place = Placement(make_mesh(schema.Mesh(1, 4, 1, 1, ()), topology_devices("v5e:2x2")))
    tiles, channels = (1, 26), (256, 512)
    plan = ConvPlan(tiles, tiles, "tpu", ordered=True)

    def given(shape, dtype, *axes):
        where = NamedSharding(place.mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    x, dy = (given((8, size, 10, 130), jnp.bfloat16, BATCH_AXES) for size in channels)
    kernel = given((9, 9, *channels), jnp.float32)
    function = functools.partial(convolve, axis=1, method=plan)
    step = jax.jit(
        lambda *values: with_gradients(
            lambda x, kernel: place.convolve(function, x, kernel, 1), *values
        )
    )
    memory = compile_for("tpu", step, x, kernel, dy).memory_analysis()
    assert memory.temp_size_in_bytes < 4.5 * held_bytes(kernel)
