"""What a step of `dnd collect` costs, one task a device, for devices that need not be there.

Rows have base.max_length tokens, and all but the first are an answer, the most that rows can take,
unless it is said how many. The base's layers are a loop, whose body the compiler counts once:
memory and collectives are of the program as it is; to its operations, bytes and time come those of
the other turns, each what a layer more costs where a few stand one after the other.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dnd_jax.base.architecture import RULES, BaseLM, LmConfig, sizes_to_pretrain
from dnd_jax.base.known import base_sizes
from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core.chips import chip_of
from dnd_jax.costs.compiled import StepCost, compile_for, compiled_cost
from dnd_jax.loop.optimizers import lora_optimizer
from dnd_jax.lora.task_step import first_state, make_collect_step
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import Placement, batch_ways
from dnd_jax.parallel.rules import held_bytes, leading, replicated, shaped, shard_by_rules

FEW = (2, 3)  # layers without a loop, whose difference is a turn of one
# Of a plan, with the compiler's names.
COUNTED = {"flops": "flops", "bytes": "bytes accessed", "estimate_seconds": "optimal_seconds"}


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
    """`packed_rows` of so many questions and answers of each task; answer: tokens, 0: all that have
    room."""
    length = config.base.max_length
    answers, whole = rows * answer_tokens(config, answer), rows * length
    shapes = {"ids": (whole,), "token": (rows, length), "place": (whole,), "prefix": (0,)}
    shapes |= dict.fromkeys(("at", "labels"), (answers,))
    return {
        key: jax.ShapeDtypeStruct((tasks, *shape), jnp.int32, sharding=over_tasks)
        for key, shape in shapes.items()
    }


def answer_tokens(config: Config, answer: int) -> int:
    """Of a row's answer; 0: all that have room."""
    length = config.base.max_length
    return min(answer or length, max(1, length - 1))


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
    tasks, device = batch_ways(mesh), mesh.devices.flat[0]
    step, arguments = collect_arguments(config, mesh, sizes, tasks, answer)
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
        answer=answer_tokens(config, answer),
        limit_bytes=int(chip.room) if chip else None,
    )
    plan = compiled_cost(plan, step, arguments, mesh, measure=measure)

    def program_of(layers: int) -> tuple[Any, tuple]:
        some = dataclasses.replace(sizes, num_hidden_layers=layers)
        return collect_arguments(config, mesh, some, tasks, answer, unroll=True)

    plan = count_layers(plan, program_of, sizes.num_hidden_layers, mesh)
    return dataclasses.replace(plan, tasks=_tasks(plan, config, mesh, sizes, answer))


def count_layers(
    plan: StepCost,
    program_of: Callable[[int], tuple[Any, tuple]],
    layers: int,
    mesh: jax.sharding.Mesh,
) -> StepCost:
    """A plan with the operations, bytes and time of all turns of the loop over a base's layers, of
    which the compiler counts one. program_of: gives (a jitted function, its arguments) through so
    many layers that stand one after the other; what one more of them costs, a turn does."""
    if layers < 2 or plan.error:
        return plan
    started, platform = time.perf_counter(), Placement(mesh).platform
    few, more = (
        compile_for(platform, function, *arguments).cost_analysis()
        for function, arguments in map(program_of, FEW)
    )
    turns, found = plan.micro_batches * (layers - 1), {}
    for name, theirs in COUNTED.items():
        turn = max(0.0, more.get(theirs, 0.0) - few.get(theirs, 0.0))
        before = getattr(plan, name)
        found[name] = before if before is None else before + turns * turn
    seconds = (plan.compile_seconds or 0.0) + time.perf_counter() - started
    return dataclasses.replace(
        plan, **found, layers=f"{FEW[0]} and {FEW[1]} of {layers}", compile_seconds=seconds
    )


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
