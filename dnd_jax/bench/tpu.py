"""`dnd bench --backend=tpu-aot`: what a TPU compiler says of each method, without a TPU. Needs libtpu (pip install "dnd-jax[tpu]").

    dnd bench --backend=tpu-aot --topology=v5p:2x2x2 --config=configs/qwen2_5_0_5b_commonsense.py

Compiles the real train step on the topology's mesh, for every method of config.bench.methods, and prints operations, bytes and
the compiler's time estimate for one device. Loops are left out of it (a compiler counts their body once).
"""

import dataclasses
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dnd_jax import sharding
from dnd_jax.bench.case import features_of
from dnd_jax.config import Config
from dnd_jax.errors import InputError
from dnd_jax.files import write_json
from dnd_jax.models.hyperconv import convolutions, forward_macs
from dnd_jax.ops.plan import describe
from dnd_jax.train import shard_train_step

RESULTS = "bench_tpu.json"
# The least effort: five times faster to compile, and the estimate of these programs does not change.
COMPILER_OPTIONS = {"exec_time_optimization_effort": -1.0}


def topology_devices(topology: str) -> list:
    """The devices of a TPU topology such as "v5p:2x2x2". Raises InputError when libtpu is missing or does not know it."""
    # No TPU is needed: no questions to a metadata server, no quarrel with a process that has one, and less to read on stderr.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever a missing or refusing plugin raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f'--topology={topology}: cannot compile for it ({reason}); pip install "dnd-jax[tpu]"') from None


def compile_train_step(config: Config, devices: list) -> dict:
    """Compiles the train step for the devices; returns one device's operations, bytes, seconds and memory, by the compiler."""
    features = features_of(config)
    projection = config.generator.length_projection
    condition = (features[0][0], config.condition.max_text_length if projection else features[0][1], features[0][2])
    mesh = sharding.make_mesh(config.mesh, devices)
    sharded = shard_train_step(config, mesh, features, condition, np.ones(features[-1][0], np.float32))
    batch = config.train.batch_size

    def shaped(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    state = jax.tree.map(lambda leaf, where: shaped(leaf.shape, leaf.dtype, where), sharded.shapes, sharded.shardings)
    data = {
        "condition": shaped((batch, *condition), jnp.float32, sharded.over_batch),
        "target": shaped((batch, *features[-1]), jnp.float32, sharded.over_batch),
    }
    started = time.perf_counter()
    compiled = sharded.step.lower(state, data).compile(compiler_options=COMPILER_OPTIONS)
    seconds = time.perf_counter() - started
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    problems = convolutions(
        features, config.generator.kernel_size, -(-batch // sharding.batch_ways(mesh)), config.train.dtype, "tpu"
    )
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "estimate_seconds": cost["optimal_seconds"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "compile_seconds": seconds,
        "direct_flop": 6 * batch * forward_macs(features, config.generator.kernel_size) / len(devices),
        "plans": describe(problems.values(), config.generator.convolution),
        "settings": dataclasses.asdict(config.mesh) | {"batch_size": batch, "dtype": config.train.dtype},
    }


def estimate(config: Config, topology: str, workdir: pathlib.Path) -> dict[str, dict]:
    """Compiles every method, prints the table and writes WORKDIR/bench_tpu.json."""
    devices = topology_devices(topology)
    rows = {}
    for method in tqdm(config.bench.methods, desc=f"compile for {topology}", unit="method", dynamic_ncols=True):
        generator = dataclasses.replace(config.generator, convolution=method)
        rows[method] = compile_train_step(dataclasses.replace(config, generator=generator), devices)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RESULTS, {"topology": topology, "rows": rows})
    print(f"\n{table(rows, topology, len(devices))}\n\nresults: {(workdir / RESULTS).absolute()}", flush=True)
    return rows


def table(rows: dict[str, dict], topology: str, count: int) -> str:
    """The estimates as a Markdown table."""
    lines = [
        f"Train step on {topology} ({count} devices), one device's share, by the compiler:",
        "",
        "| method | TFLOP | GB moved | estimate ms | temporaries GB | arguments GB | compile s | output / gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, r in rows.items():
        lines.append(
            f"| {method} | {r['flops'] / 1e12:.2f} | {r['bytes'] / 1e9:.0f} | {r['estimate_seconds'] * 1e3:.1f} | "
            f"{r['temporary_bytes'] / 1e9:.1f} | {r['argument_bytes'] / 1e9:.1f} | {r['compile_seconds']:.0f} | {r['plans']} |"
        )
    if "direct" in rows:
        for method in rows.keys() - {"direct"}:
            flops, seconds = (rows["direct"][k] / rows[method][k] for k in ("flops", "estimate_seconds"))
            lines.append(f"\n{method} against direct: {flops:.1f} times fewer operations, {1 / seconds:.2f} of the time.")
    return "\n".join(lines)
