"""Whether a host keeps up with its devices: what it reads and sends for a train step, what else
would do, and what that costs the devices."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dnd_jax.config.schema import Config
from dnd_jax.config.training import OF_LORAS
from dnd_jax.core.chips import chip_of
from dnd_jax.core.errors import InputError
from dnd_jax.costs.compiled import StepCost
from dnd_jax.encoders.lm import LmEncoder
from dnd_jax.encoders.load import encode_windows
from dnd_jax.generator.inputs import kept_shape, stay
from dnd_jax.generator.sizes import encoder_module, sample_shapes, spec_of
from dnd_jax.parallel.placement import batch_ways
from dnd_jax.parallel.rules import batch_shapes, held_bytes, leading, shapes_of


def read_by_a_host(batch: Any) -> int:
    """Bytes of a batch's samples that the devices of one host hold, of the host that has most."""
    hosts: dict[int, int] = {}
    for leaf in jax.tree.leaves(batch):
        parts: dict[int, set] = {}  # replicas share what was read
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            part = index[0].indices(leaf.shape[0])[:2]
            parts.setdefault(device.process_index, set()).add(part)
        of_sample = leaf.dtype.itemsize * math.prod(leaf.shape[1:])
        for host, read in parts.items():
            samples = sum(last - first for first, last in read)
            hosts[host] = hosts.get(host, 0) + of_sample * samples
    return max(hosts.values())


def encoder_flops(config: Config) -> float | None:
    """Operations that encode the N prompts of one sample; None where the encoder's sizes are not at
    hand. A window of a text is counted, which the others repeat."""
    n, length = config.condition.num_prompts, config.condition.max_text_length
    try:
        module = encoder_module(config)
    except InputError:
        return None
    window = min(length, module.window or length)
    ids = jax.ShapeDtypeStruct((n, window), jnp.int32)

    def counted(module: nn.Module) -> float:
        params = shapes_of(module.init, ids, ids)["params"]
        encode = jax.jit(lambda params, *texts: encode_windows(module, params, *texts))
        return encode.lower(params, ids, ids).cost_analysis()["flops"]

    flops = counted(module)
    if isinstance(module, LmEncoder) and module.layer > 1:  # a loop, whose body is counted once
        flops += (module.layer - 1) * (
            counted(module.clone(layer=1)) - counted(module.clone(layer=0))
        )
    return flops * length / window


def describe_feeding(
    config: Config, mesh: jax.sharding.Mesh, plan: StepCost, checkpoints: int, rate: float
) -> str:
    """What a host gives of a planned train step, each part with its other way, and whether it keeps
    up. checkpoints: LoRA checkpoints of all datasets, 0: not known; rate: GB/s of a host."""
    size = config.train.batch_size
    over_batch = leading(mesh, size, "config.train.batch_size")

    def of_host(shapes: Mapping) -> float:
        """GB a step."""
        return read_by_a_host(batch_shapes(shapes, size, over_batch)) / 1e9

    def samples(in_graph: bool) -> dict:
        condition = dataclasses.replace(config.condition, in_graph=in_graph)
        return sample_shapes(dataclasses.replace(config, condition=condition))

    def line(name: str, a_step: float, other: str) -> str:
        a_second = f", {a_step / seconds:.3g} GB/s" if seconds else ""
        return f"  {name:<31} {a_step:>10.4g} GB{a_second}{other}"

    of_loras = {key: x for key, x in samples(True).items() if key in OF_LORAS.values()}
    prompts = {
        in_graph: of_host({k: x for k, x in samples(in_graph).items() if k not in of_loras})
        for in_graph in (False, True)
    }
    total, seconds, given = plan.host_bytes / 1e9, plan.measured_seconds or plan.seconds, 0.0
    lines = [f"each host, a step{f' of {seconds:.3g} s' if seconds else ''}:"]

    # Conditions, or the tokens of their texts.
    encoding = _encoding(config, mesh)
    if config.condition.in_graph:
        given += prompts[True]
        lines.append(line("tokens of the prompts", prompts[True], f" (in_graph: {encoding})"))
    else:
        given += prompts[False]
        other = f" (or condition.in_graph=true: {prompts[True]:.3g} GB, and {encoding})"
        lines.append(line("conditions", prompts[False], other))

    # LoRA checkpoints, or their numbers.
    if of_loras:
        grid = spec_of(config).token_grid
        a_device = held_bytes(kept_shape(1, grid, mesh)) / 2**20
        if checkpoints and stay(config.train, kept_shape(checkpoints, grid, mesh)):
            many = f"{checkpoints * a_device / 1024:.3g} GiB of each"
            lines.append(line("LoRA checkpoints", 0.0, f" (on the devices: {many})"))
        else:
            given += of_host(of_loras)
            room = _room(plan, a_device, checkpoints)
            other = f" (or train.targets_on=devices: {a_device:.3g} MiB of each a checkpoint{room})"
            lines.append(line("LoRA checkpoints", of_host(of_loras), other))
    if total - given > 1e-3:
        lines.append(line("questions", total - given, ""))
    return "\n".join([*lines, _verdict(total, seconds, rate)])


def _encoding(config: Config, mesh: jax.sharding.Mesh) -> str:
    """What encoding takes of a device in a step."""
    flops = encoder_flops(config)
    if flops is None:
        return "the encoder's own time"
    flops *= config.train.batch_size / batch_ways(mesh)
    chip = chip_of(mesh.devices.flat[0].device_kind)
    least = f", {1e3 * flops / chip.peak:.3g} ms at its peak" if chip else ""
    return f"{flops / 1e12:.3g} TFLOP of encoding a device{least}"


def _room(plan: StepCost, a_device: float, checkpoints: int) -> str:
    """How many checkpoints have room beside the step; a_device: MiB that one takes."""
    if plan.limit_bytes is None or plan.peak_bytes is None or not plan.fits:
        return ""
    many = int((plan.limit_bytes - plan.peak_bytes) / 2**20 / a_device)
    asked = f", and not for {checkpoints}" if checkpoints > many else ""
    return f", with room for {many}{asked}"


def _verdict(total: float, seconds: float | None, rate: float) -> str:
    if not seconds:
        return f"  {total:.3g} GB in all; `dnd bench --input` measures what a host gives"
    needed = total / seconds
    says = f"  {needed:.3g} GB/s in all, of {rate:.3g} that a host is taken to give (--host-rate; "
    says += "`dnd bench --input` measures it): "
    if needed <= rate:
        return f"{says}it keeps up"
    return f"{says}THIS HOST CANNOT FEED IT, a step takes {total / rate:.3g} s"
