"""What the compiler says of one program: its memory on a device, operations, bytes, collectives and
time, for devices that need not be there."""

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from dnd_jax.core.chips import Chip, chip_of
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.costs import hlo
from dnd_jax.loop.prefetch import AHEAD
from dnd_jax.parallel.placement import Placement
from dnd_jax.parallel.rules import held_bytes

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


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's persistent cache, which takes programs for devices that are not there but
    cannot read them back."""
    used = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # else JAX keeps to the one that it has opened
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        compilation_cache.reset_cache()


def compile_for(platform: str, function: Any, *arguments: Any) -> jax.stages.Compiled:
    """A jitted function's program for a platform: a TPU's with the compiler's least effort, whether
    or not one is there."""
    absent = platform not in {device.platform for device in jax.devices()}
    effort = {"exec_time_optimization_effort": FAST} if platform == "tpu" else None
    with _uncached() if absent else contextlib.nullcontext():
        return function.lower(*arguments).compile(compiler_options=effort)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step costs one device. Bytes, operations and seconds are the compiler's; None where
    it does not say."""

    step: str
    devices: str
    mesh: dict[str, int]
    batch: int  # samples of the whole step; of a "collect" step its tasks
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
    host_bytes: int = 0  # of a "train" step's batch, that one host reads and sends to its devices
    flops: float | None = None
    direct_flops: float | None = None  # of the same step by the direct method
    bytes: float | None = None
    estimate_seconds: float | None = None
    collectives: dict[str, dict] = dataclasses.field(default_factory=dict)
    link_seconds: float | None = None
    tasks: int | None = None  # LoRAs that have room at once, of a "collect" step that fits
    length: int = 0  # tokens of the rows that a base reads
    answer: int = 0  # and of these of the answer
    rows: int = 0  # that each generated LoRA is asked, of a "train" step on answers
    # of such a step without the base: the same step on weights
    decoder_seconds: float | None = None
    decoder_peak_bytes: int | None = None
    layers: str = ""  # by which of the base's layers operations and time are counted
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


def compiled_cost(
    plan: StepCost,
    function: Any,
    arguments: tuple,
    mesh: jax.sharding.Mesh,
    once: Callable[[str], Mapping] = lambda platform: {},
    measure: bool = False,
) -> StepCost:
    """A plan with what the compiler says of its program. arguments: state, batch, others; of
    a "collect" step the base first.

    once: platform -> the compiler's cost of what stands outside the loop over micro-batches, whose
    body the compiler counts once.
    """
    devices = list(mesh.devices.flat)
    chip, parts = chip_of(devices[0].device_kind), plan.micro_batches
    started = time.perf_counter()
    platform = Placement(mesh).platform
    try:
        compiled = compile_for(platform, function, *arguments)
    except jax.errors.JaxRuntimeError as error:
        wanted = _too_much(error, plan.state_bytes)
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
    ahead = 0
    if plan.step != "generate":
        batch = arguments[2 if plan.step == "collect" else 1]
        ahead = (AHEAD + 1) * held_bytes(batch)
    outside = once(platform) if parts > 1 else {}

    def whole(name: str) -> float:
        return parts * cost.get(name, 0.0) - (parts - 1) * outside.get(name, 0.0)

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


def _link_seconds(traffic: dict[str, hlo.Traffic], chip: Chip) -> float:
    """Rings that use a link both ways, and the network between slices."""
    inside, between = (
        sum(getattr(t, name) for t in traffic.values()) for name in ("link_bytes", "network_bytes")
    )
    return (
        inside / (2 * chip.link if chip.platform == "tpu" else chip.link) + between / chip.network
    )


def _measured(compiled, arguments: tuple) -> float:
    """Seconds of the fastest of REPEATS runs with arrays of ones; the state of a training is given
    away, and comes back first."""
    given = [
        jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), x) for x in arguments
    ]
    states = [i for i, x in enumerate(given) if isinstance(x, dict) and "opt" in x]
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        out = jax.block_until_ready(compiled(*given))
        times.append(time.perf_counter() - started)
        for i in states:
            given[i] = out[0]
    return min(times[1:])


def devices_of(topology: str, slices: int) -> list:
    """Those of a TPU topology, or this machine's own."""
    return topology_devices(topology, max(1, slices)) if topology else jax.devices()
