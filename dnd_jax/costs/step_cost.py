"""`dnd plan`: the real train step and generation step compiled ahead of time for devices that need
not be there.

    dnd plan --config=configs/qwen2_5_0_5b_commonsense.py --topology=v5p:2x2x4

For a TPU topology (its compiler comes with pip install "dnd-jax[tpu]"), for n virtual CPU devices,
or for this machine's own. Says of one device: memory against the chip's, operations, bytes,
collectives, and the compiler's time.
"""

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core.chips import Chip, chip_of
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.costs import hlo
from dnd_jax.generator.sizes import encoder_module, spec_of
from dnd_jax.generator.step import device_problems, shard_generation, shard_train_step
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.loop.prefetch import AHEAD
from dnd_jax.ops.cost_model import choose, describe
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import Placement, batch_ways
from dnd_jax.parallel.rules import bytes_per_device, shaped

# the compiler's least effort: several times faster, and neither its estimate nor its memory differs
# much
FAST = -1.0
REPEATS = 3


def topology_devices(topology: str, slices: int = 1) -> list:
    """The devices of so many TPU slices of a topology such as "v5p:2x2x2". Raises InputError when
    its compiler refuses."""
    # No TPU is needed: no questions to a metadata server, and no quarrel with a process that has
    # one.
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    more |= {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        with _quiet():
            return list(
                topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
            )
    except Exception as error:  # whatever a missing or refusing plugin raises
        reason = first_line(error)[:200]
        raise InputError(
            f'--topology={topology}: cannot compile for it ({reason}); pip install "dnd-jax[tpu]"'
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that libtpu writes to stderr while it looks for a TPU."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def train_arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """(the jitted train step, the shapes of its arguments: state, batch, text encoder)."""
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
    encoder_params = encoder and shaped(encoder[1], sharded.encoder)
    return sharded.step, (shaped(sharded.shapes, sharded.shardings), batch, encoder_params)


def generate_arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """(the jitted generation step, the shapes of its arguments): an adapter for each part of the
    mesh that splits a batch."""
    spec, batch = spec_of(config), batch_ways(mesh)
    sharded = shard_generation(spec, mesh, config.mesh.rules, batch)
    shape = batch, *spec.condition_shape
    condition = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharded.over_batch)
    return sharded.step, (shaped(sharded.shapes, sharded.shardings), condition)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step costs one device. Bytes, operations and seconds are the compiler's; None where
    it does not say."""

    step: str
    devices: str
    mesh: dict[str, int]
    batch: int  # samples of the whole step
    micro_batches: int
    remat: str
    method: str
    rules: str  # a short hash of the sharding rules
    convolutions: str  # how many go which way, output / gradients
    state_bytes: int
    # convolutions whose loops the compiler counts once, in operations and bytes (not on a TPU)
    looped: int = 0
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    output_bytes: int | None = None  # beyond what the arguments give away
    ahead_bytes: int | None = None  # batches that wait on the device for their step
    peak_bytes: int | None = None  # all of these
    limit_bytes: int | None = None
    flops: float | None = None
    direct_flops: float | None = None  # of the same step by the direct method
    bytes: float | None = None
    estimate_seconds: float | None = None
    collectives: dict[str, dict] = dataclasses.field(default_factory=dict)
    link_seconds: float | None = None
    compile_seconds: float | None = None
    hash: str = ""
    measured_seconds: float | None = None
    error: str = ""

    @property
    def fits(self) -> bool:
        return not self.error and (
            self.limit_bytes is None or (self.peak_bytes or 0) <= self.limit_bytes
        )

    @property
    def seconds(self) -> float | None:
        """Compute and links one after the other: what no overlap would take."""
        return (
            None
            if self.estimate_seconds is None
            else self.estimate_seconds + (self.link_seconds or 0.0)
        )

    @property
    def samples_per_second(self) -> float | None:
        return (
            self.batch / (self.measured_seconds or self.seconds)
            if self.measured_seconds or self.seconds
            else None
        )


def _too_much(error: Exception, arguments: int) -> int | None:
    """Bytes that a program wanted which the compiler refused for want of memory, 0 if it does not
    say; None for another reason."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found = re.search(r"[Uu]sed ([\d.]+)([KMG]?) of|temporaries \(([\d.]+)([KMG]?)\)", text)
    if not found:
        return 0
    value, unit = found[1] or found[3], found[2] or found[4]
    return int(float(value) * 1024 ** " KMG".index(unit or " ")) + (arguments if found[3] else 0)


def make_plan(
    config: Config, devices: list, step: str = "train", measure: bool = False
) -> StepCost:
    """Compiles a step of a configuration for devices. measure: also run it on them, which must be
    this machine's.

    The batch of "generate" is one adapter for each part of the mesh. Raises InputError when the
    configuration does not fit it.
    """
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
    started = time.perf_counter()
    effort = {"exec_time_optimization_effort": FAST} if Placement(mesh).platform == "tpu" else None
    try:
        compiled = function.lower(*arguments).compile(compiler_options=effort)
    except jax.errors.JaxRuntimeError as error:
        wanted = _too_much(error, state)
        if wanted is None:
            raise
        return dataclasses.replace(
            plan,
            peak_bytes=wanted or None,
            compile_seconds=time.perf_counter() - started,
            error="out of memory",
        )
    seconds = time.perf_counter() - started
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    traffic = hlo.collectives(text, len(devices), mesh.shape["slice"])
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    ahead = (AHEAD + 1) * bytes_per_device(
        arguments[1], jax.tree.map(lambda x: x.sharding, arguments[1])
    )[1]
    ahead = ahead if step == "train" else 0
    once = _update_cost(config, arguments[0], effort) if parts > 1 else {}

    def whole(name: str) -> float:
        """The compiler counts a loop's body once; the optimiser stands outside the loop over
        micro-batches."""
        return parts * cost.get(name, 0.0) - (parts - 1) * once.get(name, 0.0)

    estimate = whole("optimal_seconds")
    return dataclasses.replace(
        plan,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=output,
        ahead_bytes=ahead,
        peak_bytes=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + output
        + memory.generated_code_size_in_bytes
        + ahead,
        flops=whole("flops"),
        bytes=whole("bytes accessed"),
        estimate_seconds=estimate if estimate > 0 else None,
        collectives={kind: dataclasses.asdict(t) for kind, t in traffic.items()},
        link_seconds=_link_seconds(traffic, chip) if chip else None,
        compile_seconds=seconds,
        hash=hlo.fingerprint(text),
        measured_seconds=_measured(compiled, arguments) if measure else None,
    )


def _update_cost(config: Config, state: Any, effort: dict | None) -> dict:
    """The compiler's cost of the optimiser alone."""
    optimizer = train_optimizer(config.train)

    def update(state, gradient):
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        return optax.apply_updates(state["params"], updates), opt

    return (
        jax.jit(update)
        .lower(state, state["params"])
        .compile(compiler_options=effort)
        .cost_analysis()
    )


def _link_seconds(traffic: dict[str, hlo.Traffic], chip: Chip) -> float:
    """Rings that use a link both ways, and the network between slices."""
    inside, between = (
        sum(getattr(t, name) for t in traffic.values()) for name in ("link_bytes", "network_bytes")
    )
    return (
        inside / (2 * chip.link if chip.platform == "tpu" else chip.link) + between / chip.network
    )


def _measured(compiled, arguments: tuple) -> float:
    """Seconds of the fastest of REPEATS runs with arrays of ones; the first argument of a train
    step is given away."""

    state, *others = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), arguments
    )
    trains = isinstance(state, dict) and "opt" in state
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        out = jax.block_until_ready(compiled(state, *others))
        times.append(time.perf_counter() - started)
        state = out[0] if trains else state
    return min(times[1:])


def devices_of(topology: str, slices: int) -> list:
    """Those of a TPU topology, or this machine's own."""
    return topology_devices(topology, max(1, slices)) if topology else jax.devices()
