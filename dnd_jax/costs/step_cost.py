"""The real steps as they are compiled ahead of time for devices that need not be there.

    dnd plan --config=configs/qwen2_5_0_5b_commonsense.py --topology=v5p:2x2x4

For a TPU topology (its compiler comes with pip install "dnd-jax[tpu]"), for n virtual CPU devices,
or for this machine's own. Says of one device: memory against the chip's, operations, bytes,
collectives, and the compiler's time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core.chips import chip_of
from dnd_jax.core.errors import InputError
from dnd_jax.costs import collect_cost
from dnd_jax.costs.compiled import StepCost, compile_for, compiled_cost
from dnd_jax.generator.sizes import encoder_module, spec_of
from dnd_jax.generator.step import device_problems, shard_generation, shard_train_step
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.ops.cost_model import choose, describe
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import batch_ways
from dnd_jax.parallel.rules import bytes_per_device, shaped


def train_arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """(the jitted train step, the shapes of its arguments: state, batch, what is frozen)."""
    if config.train.taught_at(0) != ("weights",):
        raise InputError(
            f'config.train.objective = {config.train.objective}: only the step of "weights" is '
            "planned; --config.train.objective=weights shows that part"
        )
    spec, encoder = spec_of(config), None
    if config.condition.in_graph:
        module = encoder_module(config)
        # The encoder's parameters know no length; texts longer than its window are cut.
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        encoder = module, jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    importance = np.ones(spec.token_grid[0], np.float32)
    sharded = shard_train_step(config, spec, mesh, importance, encoder)
    b, (n, length, _) = config.train.batch_size, spec.condition_shape
    if encoder:
        inputs = {key: ((b, n, length), jnp.int32) for key in ("ids", "valid")}
    else:
        inputs = {"condition": ((b, *spec.condition_shape), jnp.float32)}
    inputs["target"] = (b, *spec.token_grid), jnp.float32
    batch = {
        key: jax.ShapeDtypeStruct(shape, kind, sharding=sharded.over_batch)
        for key, (shape, kind) in inputs.items()
    }
    frozen = encoder and shaped({"encoder": encoder[1]}, sharded.frozen)
    return sharded.step, (shaped(sharded.shapes, sharded.shardings), batch, frozen)


def generate_arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """(the jitted generation step, the shapes of its arguments): an adapter for each part of the
    mesh that splits a batch."""
    spec, batch = spec_of(config), batch_ways(mesh)
    sharded = shard_generation(spec, mesh, config.mesh.rules, batch)
    shape = batch, *spec.condition_shape
    condition = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharded.over_batch)
    return sharded.step, (shaped(sharded.shapes, sharded.shardings), condition)


def make_plan(
    config: Config, devices: list, step: str = "train", measure: bool = False
) -> StepCost:
    """Compiles a step of a configuration for devices. measure: also run it on them, which must be
    this machine's.

    The batch of "generate" is one adapter for each part of the mesh. Raises InputError when the
    configuration does not fit it.
    """
    if step == "collect":
        return collect_cost.make_plan(config, devices, measure)
    mesh = make_mesh(config.mesh, devices)
    function, arguments = (train_arguments if step == "train" else generate_arguments)(config, mesh)
    chip = chip_of(devices[0].device_kind)
    batch = jax.tree.leaves(arguments[1])[0].shape[0]
    parts = config.train.micro_batches if step == "train" else 1
    spec, method = spec_of(config), config.generator.convolution
    problems = list(device_problems(spec, mesh, batch, parts).values())
    _, state = bytes_per_device(arguments[0], jax.tree.map(lambda x: x.sharding, arguments[0]))
    plan = StepCost(
        step=step,
        devices=f"{len(devices)} {chip.name if chip else devices[0].device_kind}",
        mesh=dict(mesh.shape),
        batch=batch,
        micro_batches=parts,
        remat=config.train.remat if step == "train" else "none",
        method=method,
        rules=digests.of_text(repr(config.mesh.rules))[:6],
        convolutions=describe(problems, method),
        looped=sum(
            plan.looped and not plan.direct
            for plan in (choose(problem, method) for problem in problems)
        ),
        state_bytes=state,
        limit_bytes=int(chip.memory) if chip else None,
        direct_flops=(6 if step == "train" else 2) * batch * spec.forward_macs / len(devices),
    )
    once = functools.partial(_update_cost, config, arguments[0])
    return compiled_cost(plan, function, arguments, mesh, once, measure)


def _update_cost(config: Config, state: Any, platform: str) -> dict:
    """The compiler's cost of the optimiser alone."""
    optimizer = train_optimizer(config.train)

    def update(state, gradient):
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        return optax.apply_updates(state["params"], updates), opt

    return compile_for(platform, jax.jit(update), state, state["params"]).cost_analysis()
