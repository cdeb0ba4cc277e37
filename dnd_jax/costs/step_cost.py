"""The real steps as they are compiled ahead of time for devices that need not be there.

    dnd plan --config=configs/qwen2_5_0_5b_commonsense.py --topology=v5p:2x2x4

For a TPU topology (its compiler comes with pip install "dnd-jax[tpu]"), for n virtual CPU devices,
or for this machine's own. Says of one device: memory against the chip's, operations, bytes,
collectives, and the compiler's time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dnd_jax.config.schema import Config
from dnd_jax.config.training import ASKING, OF_LORAS
from dnd_jax.core import digests
from dnd_jax.core.chips import chip_of
from dnd_jax.costs import collect_cost
from dnd_jax.costs.compiled import StepCost, compile_for, compiled_cost
from dnd_jax.costs.feeding import read_by_a_host
from dnd_jax.generator.answers import Answering
from dnd_jax.generator.generation import shard_generation
from dnd_jax.generator.inputs import kept_shape, stay
from dnd_jax.generator.regularisers import squared_sizes
from dnd_jax.generator.sizes import encoder_module, layout_of, sample_shapes, spec_of
from dnd_jax.generator.step import (
    check_batch,
    device_problems,
    shard_train_step,
)
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.lora.targets import Target, from_statistics
from dnd_jax.ops.choice import describe
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import batch_ways
from dnd_jax.parallel.rules import batch_shapes, held_bytes, shaped, shapes_of


def train_arguments(
    config: Config, mesh: jax.sharding.Mesh, answer: int = 0, checkpoints: int = 0
) -> tuple[Any, tuple]:
    """(the jitted train step, the shapes of its arguments: state, batch, what is frozen). answer:
    tokens of one where a base is asked, 0: all that have room. checkpoints: of all datasets, which
    may `stay` on the devices; 0: the host reads them."""
    spec, encoder, answering, beside = spec_of(config), None, None, {}
    if config.condition.in_graph:
        module = encoder_module(config)
        # The encoder's parameters know no length; texts longer than its window are cut.
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        params = shapes_of(module.init, ids, ids)["params"]
        encoder = module, jax.tree.map(lambda x: x.update(dtype=module.dtype), params)
    taught = config.train.taught_at(config.train.weights_first)
    if ASKING & {*taught}:
        answering = _answering(config, mesh)
    if config.train.size_weight:
        target = _target(config)
        tokens = jax.ShapeDtypeStruct((1, *spec.token_grid), jnp.float32)
        beside = {"target": target, "sizes": jax.eval_shape(_sizes, target, tokens)}
    importance = np.ones(spec.token_grid[0], np.float32)
    all_kept = kept_shape(checkpoints, spec.token_grid, mesh)
    kept = checkpoints > 0 and stay(config.train, all_kept)
    given = encoder, answering, beside, kept
    sharded = shard_train_step(config, spec, mesh, importance, *given)
    b = config.train.batch_size
    batch = batch_shapes(sample_shapes(config, kept), b, sharded.over_batch)
    if answering:
        rows = config.train.answer_rows
        of_rows = collect_cost.row_shapes(config, b, rows, answer, sharded.over_batch)
        batch["rows"] = of_rows
        if config.train.shots:  # as long as base.max_length too
            batch["shown"] = of_rows
    frozen = {"encoder": encoder[1]} if encoder else {}
    frozen |= {**(answering[1] if answering else {}), **beside}
    if kept:
        frozen["checkpoints"] = all_kept
    frozen = shaped(frozen, sharded.frozen) if frozen else None
    return sharded.step, (shaped(sharded.shapes, sharded.shardings), batch, frozen)


def _target(config: Config) -> Target:
    """What the decoder learns to output, with the shapes of its statistics."""
    layout = layout_of(config)
    statistics = {
        "mean": jax.ShapeDtypeStruct((layout.num_tokens, *layout.chunk_shape), jnp.float32),
        "scale": jax.ShapeDtypeStruct((layout.num_tokens,), jnp.float32),
    }
    return from_statistics(config.generator.target, layout, statistics)


def _sizes(target: Target, tokens: jax.Array) -> dict[str, jax.Array]:
    """Of one LoRA, shaped as of `tuned_sizes`."""
    return jax.tree.map(lambda x: x[0], squared_sizes(target, tokens))


def _answering(config: Config, mesh: jax.sharding.Mesh) -> tuple[Answering, dict]:
    """The base that generated LoRAs are asked through, and the shapes of what is frozen."""
    module, params = collect_cost.base_shapes(config, mesh, collect_cost.sizes_of(config))
    over_tasks = check_batch(config, mesh)
    answering = Answering(module, config.lora.alpha / config.lora.rank, over_tasks)
    return answering, {"base": params, "target": _target(config)}


def generate_arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """(the jitted generation step, the shapes of its arguments): an adapter for each part of the
    mesh that splits a batch."""
    spec, batch = spec_of(config), batch_ways(mesh)
    sharded = shard_generation(spec, mesh, config.mesh.rules, batch)
    shape = batch, *spec.condition_shape
    condition = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharded.over_batch)
    return sharded.step, (shaped(sharded.shapes, sharded.shardings), condition)


def make_plan(
    config: Config,
    devices: list,
    step: str = "train",
    measure: bool = False,
    answer: int = 0,
    checkpoints: int = 0,
) -> StepCost:
    """Compiles a step of a configuration for devices. measure: also run it on them, which must be
    this machine's. answer, checkpoints: as of `train_arguments`.

    The batch of "generate" is one adapter for each part of the mesh. A step on answers is counted
    through the base's layers as `collect_cost` does, and beside it stands the same step on weights,
    which is the decoder's part. Raises InputError when the configuration does not fit the mesh.
    """
    if step == "collect":
        return collect_cost.make_plan(config, devices, measure, answer)
    mesh = make_mesh(config.mesh, devices)
    if step == "generate":
        return _plan(config, mesh, step, generate_arguments(config, mesh), measure)
    c = config.train
    if not c.through_base:
        made = train_arguments(config, mesh, checkpoints=checkpoints)
        plan = _plan(config, mesh, step, made, measure)
        return _beside_the_base(plan, config, mesh) if c.asks_base else plan

    alone = dataclasses.replace(c, objective="weights", weights_first=0)
    alone = dataclasses.replace(config, train=alone)
    decoder = make_plan(alone, devices, step, measure, checkpoints=checkpoints)
    function, arguments = train_arguments(config, mesh, answer, checkpoints)
    plan = _plan(config, mesh, step, (function, arguments), measure)
    plan = _beside_unused(plan, arguments)
    program_of = functools.partial(_through_base, config, mesh, answer)
    layers = collect_cost.sizes_of(config).num_hidden_layers
    return dataclasses.replace(
        collect_cost.count_layers(plan, program_of, layers, mesh),
        rows=c.answer_rows,
        length=config.base.max_length,
        answer=collect_cost.answer_tokens(config, answer),
        decoder_seconds=decoder.measured_seconds or decoder.estimate_seconds,
        decoder_peak_bytes=decoder.peak_bytes,
    )


def _through_base(
    config: Config, mesh: jax.sharding.Mesh, answer: int, layers: int
) -> tuple[Any, tuple]:
    """(the jitted gradient of a part of a batch's LoRAs through so many layers of the base, one
    after the other, the shapes of its arguments)."""
    c, lora = config.train, config.lora
    tasks, over_tasks = c.batch_size // c.micro_batches, check_batch(config, mesh)
    sizes = dataclasses.replace(collect_cost.sizes_of(config), num_hidden_layers=layers)
    module, params = collect_cost.base_shapes(config, mesh, sizes, unroll=True)
    answering = Answering(module, lora.alpha / lora.rank, over_tasks)

    def loss(matrices, params, rows, teacher, shown):
        return answering.losses_of(params, matrices, rows, teacher, shown)[0].sum()

    matrices = {
        name: jax.ShapeDtypeStruct((tasks, *shape), jnp.float32, sharding=over_tasks)
        for name, shape in sizes.lora_shapes(lora.rank, lora.targets).items()
    }
    rows = collect_cost.row_shapes(config, tasks, c.answer_rows, answer, over_tasks)
    teacher = matrices if "distill" in c.of_loras.keys() & {*c.taught} else None
    shown = rows if c.shots else None
    return jax.jit(jax.grad(loss)), (matrices, params, rows, teacher, shown)


def _beside_the_base(plan: StepCost, config: Config, mesh: jax.sharding.Mesh) -> StepCost:
    """With the base that train.validate_every keeps on the devices."""
    _, params = collect_cost.base_shapes(config, mesh, collect_cost.sizes_of(config))
    more = {
        name: (getattr(plan, name) or 0) + held_bytes(params)
        for name in ("state_bytes", "argument_bytes", "peak_bytes")
    }
    return dataclasses.replace(plan, **more)


def _beside_unused(plan: StepCost, arguments: tuple) -> StepCost:
    """With the LoRA checkpoints that earlier steps, on weights, keep on the devices and this one
    does not take."""
    _, batch, frozen = arguments
    unused = (frozen or {}).get("checkpoints") if not batch.keys() & {*OF_LORAS.values()} else None
    if unused is None or plan.peak_bytes is None:
        return plan
    return dataclasses.replace(plan, peak_bytes=plan.peak_bytes + held_bytes(unused))


def _plan(
    config: Config, mesh: jax.sharding.Mesh, step: str, made: tuple[Any, tuple], measure: bool
) -> StepCost:
    """What the compiler says of a jitted step and the shapes of its arguments."""
    function, arguments = made
    devices = list(mesh.devices.flat)
    chip = chip_of(devices[0].device_kind)
    batch = jax.tree.leaves(arguments[1])[0].shape[0]
    parts = config.train.micro_batches if step == "train" else 1
    spec = spec_of(config)
    plans = [spec.plan(p) for p in device_problems(spec, mesh, batch, parts).values()]
    plan = StepCost(
        step=step,
        devices=f"{len(devices)} {chip.name if chip else devices[0].device_kind}",
        mesh=dict(mesh.shape),
        batch=batch,
        micro_batches=parts,
        remat=config.train.remat if step == "train" else "none",
        method=spec.convolution,
        rules=digests.of_text(repr(config.mesh.rules))[:6],
        convolutions=describe(plans),
        looped=sum(plan.looped and not plan.direct for plan in plans),
        state_bytes=held_bytes(arguments[0]),
        limit_bytes=int(chip.room) if chip else None,
        host_bytes=read_by_a_host(arguments[1]) if step == "train" else 0,
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
