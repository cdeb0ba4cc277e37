"""Stage `plan`: the real steps compiled for devices that need not be there;
one plan, or a sweep of them.

dnd plan --config=qwen2_5_0_5b_commonsense --topology=v5p:2x2x4
dnd plan --config=qwen2_5_7b_math --step=collect --topology=v5p:2x2x2
dnd plan --sweep --config=ablate_sharding --workdir=runs/sharding
"""

import dataclasses
import os

import jax

from dnd_jax.config.studies import STEPS
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.stage import Given
from dnd_jax.costs import compiled, describe, feeding, step_cost, sweep
from dnd_jax.parallel.mesh import make_mesh


def run(given: Given) -> None:
    """Runs the stage."""
    config, topology, swept = given.config, given["topology"], given["sweep"]
    away = bool(topology or (swept and config.sweep.topologies and not given["devices"]))
    steps = (given["step"],) if given["step"] else STEPS[:2]
    if steps[0] not in STEPS or (given["step"] and swept):
        mend = "config.sweep.steps says it of a sweep" if swept else f"one of {', '.join(STEPS)}"
        raise InputError(f"--step={given['step']}: {mend}")
    if given["devices"] and topology:
        raise InputError(
            "--devices (virtual CPU devices) and --topology (TPU chips) exclude each other"
        )
    if given["measure"] and away:
        raise InputError(
            "--measure runs on this machine's devices; leave --topology and "
            "config.sweep.topologies empty"
        )
    for name in ("answer-tokens", "lora-checkpoints"):
        if given[name] and swept:
            raise InputError(f"--{name} is of a single plan; leave out --sweep")
    if given["lora-checkpoints"] and steps[0] != "train":
        raise InputError("--lora-checkpoints is of train steps; leave out --step")
    kept = config.train.targets_on == "devices" and config.train.from_loras
    if kept and steps[0] == "train" and not swept and not given["lora-checkpoints"]:
        raise InputError(
            "config.train.targets_on = devices: say by --lora-checkpoints how many LoRA "
            "checkpoints all training datasets have together"
        )
    if not given["host-rate"]:
        raise InputError("--host-rate=0: expected GB/s of a host, such as 10")
    if given["devices"]:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = (
            f"{flags} --xla_force_host_platform_device_count={given['devices']}"
        )
    if given["devices"] or away:  # nothing runs
        jax.config.update("jax_platforms", "cpu")
    if topology or given["devices"]:
        config = dataclasses.replace(
            config, sweep=dataclasses.replace(config.sweep, topologies=(topology,))
        )
    if swept:
        plans = sweep.sweep(config, given.workdir, given["measure"])
        more = ", scaling.png" if (given.workdir / "scaling.png").is_file() else ""
        print(
            f"\n{sweep.as_markdown(plans)}\n\nplans: "
            f"{given.workdir.absolute()}/plans.{{json,csv,md,png}}{more}",
            flush=True,
        )
    else:
        devices = compiled.devices_of(topology, config.mesh.slices)
        how = given["measure"], given["answer-tokens"], given["lora-checkpoints"]
        plans = [step_cost.make_plan(config, devices, step, *how) for step in steps]
        texts = [describe.describe_plan(plan) for plan in plans]
        if steps[0] == "train":
            mesh, known = make_mesh(config.mesh, devices), given["lora-checkpoints"]
            fed = config, mesh, plans[0], known, given["host-rate"]
            texts[0] += f"\n{feeding.describe_feeding(*fed)}"
        print("\n\n".join(texts), flush=True)
    if not any(p.fits for p in plans if p.step == plans[0].step):
        raise CheckFailed(sweep.nearest_miss(plans))
