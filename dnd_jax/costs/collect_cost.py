"""What a step of `dnd collect` costs, one task a device, for devices that need not be there.

Rows have base.max_length tokens, and all but the first are an answer, the most that rows can take,
unless it is said how many. The base's layers are a loop, whose body the compiler counts once:
memory and collectives are of the program as it is, operations, bytes and time of one with a few
layers that stand one after the other, the rest counted as more of the same.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dnd_jax.base.architecture import RULES, BaseLM, LmConfig, sizes_to_pretrain
from dnd_jax.base.known import base_sizes
from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core.chips import chip_of
from dnd_jax.costs.compiled import StepCost, compiled_cost
from dnd_jax.loop.optimizers import lora_optimizer
from dnd_jax.lora.task_step import first_state, make_collect_step
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import batch_ways
from dnd_jax.parallel.rules import held_bytes, leading, replicated, shaped, shard_by_rules

FEW = (2, 3)  # layers without a loop that a base of more is compiled with
COUNTED = ("flops", "bytes", "estimate_seconds")  # of a plan, by layers without a loop


def sizes_of(config: Config) -> LmConfig:
    """The sizes of the configured base. Raises InputError when a given one's cannot be had."""
    base = config.base
    if base.path:
        return base_sizes(base.path, text_part=True)
    return sizes_to_pretrain(base, base.vocab_size)


def base_shapes(
    config: Config, mesh: jax.sharding.Mesh, sizes: LmConfig, unroll: bool = False
) -> tuple[BaseLM, Mapping]:
    """(a base of these sizes, the shapes of its parameters on the mesh). unroll: its layers stand
    one after the other."""
    c = config.lora
    module = BaseLM(sizes, jnp.dtype(c.dtype), c.remat, mesh, unroll)

    def base(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return jax.tree.map(lambda x: x.astype(c.dtype), params)

    params = jax.eval_shape(base, jax.random.key(0))
    return module, shaped(params, shard_by_rules(mesh, RULES, params))


def row_shapes(
    config: Config, tasks: int, rows: int, answer: int, over_tasks: jax.sharding.NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Of so many questions and answers of each task; answer: tokens, 0: all that have room."""
    length = config.base.max_length
    answer = min(answer or length, max(1, length - 1))
    return {
        key: jax.ShapeDtypeStruct((tasks, rows, width), jnp.int32, sharding=over_tasks)
        for key, width in {"ids": length, "at": answer, "labels": answer}.items()
    }


def collect_arguments(
    config: Config,
    mesh: jax.sharding.Mesh,
    sizes: LmConfig,
    tasks: int,
    answer: int = 0,
    unroll: bool = False,
) -> tuple[Any, tuple]:
    """(the jitted step, the shapes of its arguments: the base, the tasks' state, their batch).
    answer: its tokens, 0: all that have room. unroll: as of `base_shapes`."""
    c = config.lora
    module, params = base_shapes(config, mesh, sizes, unroll)
    optimizer, over_tasks = lora_optimizer(c), leading(mesh, tasks, "the number of tasks")

    def state(key):
        return first_state(key, sizes.lora_shapes(c.rank, c.targets), optimizer, tasks)

    states = jax.eval_shape(state, jax.random.key(0))
    batch = row_shapes(config, tasks, c.batch_size, answer, over_tasks)
    step = jax.jit(
        make_collect_step(module, optimizer, c.alpha / c.rank, over_tasks),
        out_shardings=(over_tasks, replicated(mesh)),
        donate_argnums=1,
    )
    where = jax.tree.map(lambda _: over_tasks, states)
    return step, (params, shaped(states, where), batch)


def make_plan(config: Config, devices: list, measure: bool = False, answer: int = 0) -> StepCost:
    """As step_cost.make_plan; `tasks` of what fits says how many would have room at once."""
    mesh, sizes = make_mesh(config.mesh, devices), sizes_of(config)

    def plan_of(sizes: LmConfig, unroll: bool) -> StepCost:
        return _of_layers(config, mesh, sizes, unroll, measure and not unroll, answer)

    plan = by_layers(plan_of, sizes)
    return dataclasses.replace(plan, tasks=_tasks(plan, config, mesh, sizes, answer))


def by_layers(plan_of: Callable[[LmConfig, bool], StepCost], sizes: LmConfig) -> StepCost:
    """The plan of a step through a base of these sizes. plan_of: gives it for a base of any, whose
    layers are a loop, or stand one after the other (True)."""
    layers = sizes.num_hidden_layers
    few = FEW if layers > FEW[-1] else (layers,)
    whole = plan_of(sizes, False)
    plans = [plan_of(dataclasses.replace(sizes, num_hidden_layers=n), True) for n in few]

    def counted(name: str) -> Any:
        found = [getattr(plan, name) for plan in plans]
        if len(few) == 1 or None in found:
            return found[-1]
        return max(found[0], found[0] + (layers - few[0]) * (found[1] - found[0]))

    every = (whole, *plans)
    return dataclasses.replace(
        whole,
        **{name: counted(name) for name in COUNTED},
        layers=f"{few[0]} and {few[1]} of {layers}" if len(few) > 1 else "",
        compile_seconds=sum(plan.compile_seconds or 0 for plan in every),
    )


def _of_layers(
    config: Config,
    mesh: jax.sharding.Mesh,
    sizes: LmConfig,
    unroll: bool,
    measure: bool,
    answer: int = 0,
) -> StepCost:
    """What the compiler says of the step through a base of these sizes."""
    tasks, device = batch_ways(mesh), mesh.devices.flat[0]
    step, arguments = collect_arguments(config, mesh, sizes, tasks, answer, unroll)
    chip = chip_of(device.device_kind)
    held = sum(held_bytes(tree) for tree in arguments[:2])
    plan = StepCost(
        step="collect",
        devices=f"{mesh.size} {chip.name if chip else device.device_kind}",
        mesh=dict(mesh.shape),
        batch=tasks,
        micro_batches=1,
        remat="layers" if config.lora.remat else "none",
        method=config.lora.dtype,
        rules=digests.of_text(repr(RULES))[:6],
        convolutions="",
        state_bytes=held,
        length=config.base.max_length,
        answer=arguments[2]["at"].shape[-1],
        limit_bytes=int(chip.memory) if chip else None,
    )
    return compiled_cost(plan, step, arguments, mesh, measure=measure)


def _tasks(
    plan: StepCost, config: Config, mesh: jax.sharding.Mesh, sizes: LmConfig, answer: int
) -> int | None:
    """How many tasks have room at once: all that a device holds beside its part of the base counts
    as one task's, though gathered weights are there once."""
    if not plan.fits or not plan.limit_bytes or not plan.peak_bytes:
        return None
    _, arguments = collect_arguments(config, mesh, sizes, batch_ways(mesh), answer)
    base = held_bytes(arguments[0])
    each = max(1, plan.peak_bytes - base)
    return math.floor((plan.limit_bytes - base) / each) * batch_ways(mesh)
