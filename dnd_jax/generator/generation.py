"""The one generation step of a configuration, sharded over a mesh (docs/METHOD.md section 7)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dnd_jax.config import schema
from dnd_jax.generator.model import Generator, param_shapes
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.parallel.placement import Placement
from dnd_jax.parallel.programs import compiler_options
from dnd_jax.parallel.rules import leading, replicated, shard_by_rules

ONE_DEVICE = schema.Mesh(slices=1, data=1, fsdp=1, tensor=1, rules=((r".", ()),))


@dataclasses.dataclass(frozen=True)
class ShardedGeneration:
    """The generation step as it runs on a mesh."""

    module: Generator
    shapes: dict  # of the parameters
    shardings: dict  # of the parameters
    over_batch: jax.sharding.NamedSharding  # of conditions and tokens
    step: Callable  # (params, condition (B, N, L, C)) -> tokens (B, T, h, w) float32, jitted


def shard_generation(
    spec: DecoderSpec, mesh: jax.sharding.Mesh, rules: tuple, batch: int = 1
) -> ShardedGeneration:
    """The one generation step of a decoder, for use and ahead-of-time compilation.

    batch: adapters at once, which every device makes by itself where the mesh does not divide them.
    Raises InputError for a parameter without a rule.
    """
    place = Placement(mesh)
    module = Generator(dataclasses.replace(spec, remat="none"), place)  # no backward pass here
    shapes = param_shapes(module)
    shardings = shard_by_rules(mesh, rules, shapes)
    over_batch = (
        leading(mesh, batch, "the adapters") if place.batch_ways(batch) > 1 else replicated(mesh)
    )

    def generate(params, condition):
        return module.apply({"params": place.gather_small(params)}, condition).astype(jnp.float32)

    step = jax.jit(
        in_precision(spec, generate),
        in_shardings=(shardings, over_batch),
        out_shardings=over_batch,
        compiler_options=compiler_options(place.platform),
    )
    return ShardedGeneration(module, shapes, shardings, over_batch, step)


def in_precision(spec: DecoderSpec, function: Callable) -> Callable:
    """The function, whose products of float32 have the spec's precision, those of its gradients
    too."""
    if spec.precision == "default":
        return function

    @functools.wraps(function)
    def computed(*arguments):
        with jax.default_matmul_precision(spec.precision):
            return function(*arguments)

    return computed
