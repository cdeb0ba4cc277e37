"""`dnd bench --backend=tpu-aot`: what a TPU compiler says of each method, without a TPU. Needs
libtpu (pip install "dnd-jax[tpu]").

    dnd bench --backend=tpu-aot --topology=v5p:2x2x2 --config=configs/qwen2_5_0_5b_commonsense.py

Compiles the real train step on the topology's mesh, for every method of config.bench.methods, and
prints operations, bytes and the compiler's time estimate for one device.
"""

import dataclasses
import pathlib

from tqdm import tqdm

from dnd_jax.config.schema import Config
from dnd_jax.core.files import write_json
from dnd_jax.costs.compiled import StepCost, topology_devices
from dnd_jax.costs.step_cost import make_plan

RESULTS = "bench_tpu.json"


def estimate(config: Config, topology: str, workdir: pathlib.Path) -> dict[str, StepCost]:
    """Compiles every method, prints the table and writes WORKDIR/bench_tpu.json."""
    devices = topology_devices(topology)
    plans = {}
    for method in tqdm(
        config.bench.methods, desc=f"compile for {topology}", unit="method", dynamic_ncols=True
    ):
        generator = dataclasses.replace(config.generator, convolution=method)
        plans[method] = make_plan(dataclasses.replace(config, generator=generator), devices)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(
        workdir / RESULTS,
        {"topology": topology, "rows": {m: dataclasses.asdict(p) for m, p in plans.items()}},
    )
    print(f"\n{table(plans, topology)}\n\nresults: {(workdir / RESULTS).absolute()}", flush=True)
    return plans


def table(plans: dict[str, StepCost], topology: str) -> str:
    """The estimates as a Markdown table."""
    first = next(iter(plans.values()))
    lines = [
        f"Train step on {topology} ({first.devices}), one device's share, by the compiler:",
        "",
        "| method | TFLOP | GB moved | estimate ms | temporaries GB | arguments GB | compile s | "
        "output / gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, p in plans.items():
        if p.error:
            lines.append(
                f"| {method} | {p.error} | | | | | {p.compile_seconds:.0f} | {p.convolutions} |"
            )
            continue
        lines.append(
            f"| {method} | {p.flops / 1e12:.2f} | {p.bytes / 1e9:.0f} | "
            f"{p.estimate_seconds * 1e3:.1f} | "
            f"{p.temporary_bytes / 1e9:.1f} | {p.argument_bytes / 1e9:.1f} | "
            f"{p.compile_seconds:.0f} | {p.convolutions} |"
        )
    direct = plans.get("direct")
    for method, p in plans.items():
        if direct is not None and p is not direct and not p.error and not direct.error:
            flops, seconds = direct.flops / p.flops, p.estimate_seconds / direct.estimate_seconds
            lines.append(
                f"\n{method} against direct: {flops:.1f} times fewer operations, {seconds:.2f} of "
                "the time."
            )
    return "\n".join(lines)
