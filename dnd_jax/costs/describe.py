"""What one step costs, as text: the table of a plan, and what would make it fit."""

import math

from dnd_jax.costs.compiled import StepCost


def what_would_help(plan: StepCost) -> str:
    """For a plan that does not fit: what its memory goes to, and the settings that take less."""
    limit, peak = plan.limit_bytes or 0, plan.peak_bytes or 0
    if plan.step == "collect":
        return _what_would_help_collect(plan)
    if plan.state_bytes > 0.5 * limit:
        ways = math.prod(plan.mesh.values())
        fsdp = plan.mesh["fsdp"] * 2
        more = (
            f"--config.mesh.fsdp={fsdp}"
            if fsdp <= ways and plan.mesh["fsdp"] < ways
            else "more chips"
        )
        share = f"parameters and optimiser state take {plan.state_bytes / 2**30:.1f} GiB of it"
        return f"{share}: {more}, or --config.train.optimizer=adafactor"
    tips = []
    if plan.step == "train":
        if plan.remat != "stages":
            tips.append("--config.train.remat=stages")
        too_large = max(peak - plan.state_bytes, 1) / max(limit - plan.state_bytes, 1)
        needed = plan.micro_batches * 2 ** max(1, math.ceil(math.log2(too_large)))
        ways = plan.mesh["slice"] * plan.mesh["data"] * plan.mesh["fsdp"]
        if plan.batch // ways >= needed:
            tips.append(f"--config.train.micro_batches={needed}")
        if plan.batch > ways * plan.micro_batches:
            tips.append(f"--config.train.batch_size={max(ways, plan.batch // 2)}")
    tips.append("more chips over which data or fsdp split the batch")
    return f"activations take most of it: {' or '.join(tips)}"


def _what_would_help_collect(plan: StepCost) -> str:
    """The settings of `lora` and `base` that take less, and meshes that split more."""
    tips = ["--config.lora.remat=True"] * (plan.remat == "none")
    tips += ["--config.lora.dtype=bfloat16"] * (plan.method == "float32")
    tips += ["a smaller --config.lora.batch_size or --config.base.max_length"]
    return f"{' or '.join(tips)} or a larger mesh.fsdp or mesh.tensor"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**30:.4g}"


def _rows(plan: StepCost) -> str:
    """Of a step that asks the base: the rows, and what was compiled of it."""
    some = f"; operations and time by those of {plan.layers} layers" if plan.layers else ""
    learned = f"{plan.answer} of them learned" if plan.answer < plan.length - 1 else "all learned"
    what = f"base in {plan.method}; rows" if not plan.rows else f"base: {plan.rows} rows a sample"
    return f"{what} of {plan.length} tokens, {learned}{some}"


def _parts(plan: StepCost) -> list[str]:
    """Of a train step through the base: what is the decoder's."""
    if plan.decoder_peak_bytes is None:
        return []
    time = "" if plan.decoder_seconds is None else f", {plan.decoder_seconds * 1e3:.4g} ms"
    return [f"  of this without the base        {_gib(plan.decoder_peak_bytes):>10} GiB{time}"]


def describe_plan(plan: StepCost) -> str:
    """A plan as text for someone who has never seen one."""
    mesh = " x ".join(
        f"{axis} {size}" for axis, size in plan.mesh.items() if axis != "slice" or size > 1
    )
    collects = plan.step == "collect"
    whose = {"train": "batch", "generate": "adapters at once", "collect": "tasks at once"}[
        plan.step
    ]
    held = "base, LoRAs, optimiser" if collects else "state (parameters, optimiser)"
    lines = [
        f"{plan.step} step on {plan.devices}: mesh {mesh}; {whose} {plan.batch}"
        + (f" in {plan.micro_batches} parts" if plan.micro_batches > 1 else "")
        + (f", remat {plan.remat}" if plan.step != "generate" else ""),
        *[f"convolutions (output / gradients): {plan.convolutions}"] * (not collects),
        *[_rows(plan)] * bool(plan.length),
        "",
        "one device:",
        f"  {held:<31} {_gib(plan.state_bytes):>10} GiB",
    ]
    if plan.error:
        wanted = f"{_gib(plan.peak_bytes)} of " if plan.peak_bytes else "more than "
        lines.append(
            f"  {plan.error}: {wanted}{_gib(plan.limit_bytes)} GiB; {what_would_help(plan)}"
        )
        return "\n".join(lines)
    limit = f" of {_gib(plan.limit_bytes)}" if plan.limit_bytes else ""
    verdict = "" if plan.limit_bytes is None else ": fits" if plan.fits else ": DOES NOT FIT"
    lines += [
        f"  arguments                       {_gib(plan.argument_bytes):>10} GiB",
        f"  temporaries                     {_gib(plan.temporary_bytes):>10} GiB",
        f"  output beyond the arguments     {_gib(plan.output_bytes):>10} GiB",
        f"  batches that wait               {_gib(plan.ahead_bytes):>10} GiB",
        f"  peak                            {_gib(plan.peak_bytes):>10} GiB{limit}{verdict}",
        f"  operations                      {plan.flops / 1e12:>10.4g} TFLOP"
        + (f" ({plan.direct_flops / 1e12:.4g} by the direct method)" if plan.direct_flops else ""),
        f"  bytes moved                     {plan.bytes / 1e9:>10.4g} GB",
    ]
    if plan.looped:
        lines.append(
            f"  (both too low: {plan.looped} convolutions loop over frequencies, and the compiler "
            "counts a loop's body once)"
        )
    for kind, t in sorted(plan.collectives.items()):
        network = (
            f", {t['network_bytes'] / 1e9:.3g} GB between slices" if t["network_bytes"] else ""
        )
        lines.append(
            f"  {kind:<31} {t['count']:>10} times, {t['bytes'] / 1e9:.3g} GB; "
            f"{t['link_bytes'] / 1e9:.3g} GB over links{network}"
        )
    if plan.estimate_seconds is not None:
        lines.append(f"  time, by the compiler           {plan.estimate_seconds * 1e3:>10.4g} ms")
    if plan.link_seconds is not None:
        lines.append(f"  time of links, not overlapped   {plan.link_seconds * 1e3:>10.4g} ms")
    if plan.measured_seconds is not None:
        lines.append(f"  time, measured here             {plan.measured_seconds * 1e3:>10.4g} ms")
    lines += _parts(plan)
    if plan.samples_per_second:
        what = {"train": "samples", "generate": "adapters", "collect": "LoRAs a step further"}
        lines.append(f"all devices: {plan.samples_per_second:.4g} {what[plan.step]} a second")
    if plan.tasks:
        lines.append(f"room for {plan.tasks} tasks at once, by what one of them takes")
    least = " with the compiler's least effort" if "TPU" in plan.devices else ""
    lines.append(f"compiled in {plan.compile_seconds:.0f} s{least}, program {plan.hash}")
    if not plan.fits:
        lines.append(f"does not fit: {what_would_help(plan)}")
    return "\n".join(lines)
