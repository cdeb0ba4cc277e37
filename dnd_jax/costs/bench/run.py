"""`dnd bench`: every variant of every case in a process of its own, one after the other and round
after round; a table and JSON.

    dnd bench --config=configs/bench_cpu.py --workdir=runs/bench

A ratio is the best PyTorch variant's median over ours, all measured in this run; its range comes
from the fastest and slowest runs.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import time

from tqdm import tqdm

from dnd_jax.config.load import load_file
from dnd_jax.config.remembered import write_settings
from dnd_jax.config.schema import Config
from dnd_jax.config.studies import WHAT
from dnd_jax.config.validate import freeze
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import write_json
from dnd_jax.core.processes import finished, of_module
from dnd_jax.core.stage import Given
from dnd_jax.core.stopping import stop
from dnd_jax.costs.bench.case import STEPS_THROUGH_BASE, Case
from dnd_jax.costs.bench.feed import feed_table
from dnd_jax.costs.bench.layers import layers_table
from dnd_jax.costs.bench.learned import learn_rates
from dnd_jax.costs.bench.limits import limits_table
from dnd_jax.costs.bench.tpu import estimate

RESULTS = "bench.json"
SETTINGS = "bench_config.json"  # of the cases; what the run remembers stays


def cases_of(config: Config, file: str | os.PathLike) -> list[Case]:
    """The configured cases, or those of the configuration itself, which is in the file."""
    rows = config.bench.cases or tuple(
        (what, os.fspath(file), what, config.train.batch_size, config.train.dtype)
        for what in WHAT
        if what != "gradient" and what not in STEPS_THROUGH_BASE
    )
    return [Case(*row[:5], stages=tuple(row[5:]) or None) for row in rows]


def measure(side: str, case: Case, variant: str, repeats: int) -> dict:
    """One process's result. Raises InputError with its last line when it fails."""
    spec = json.dumps({"case": dataclasses.asdict(case), "variant": variant, "repeats": repeats})
    command = of_module(f"dnd_jax.costs.bench.{side}_worker", spec)
    # The last line is the error's own, not JAX's note that it has left frames out.
    code, out, err = finished(command, {**os.environ, "JAX_TRACEBACK_FILTERING": "off"})
    if code == -9:
        return {"out_of_memory": True}  # the kernel's way of saying so
    if code:
        raise InputError(
            f"bench {case.name}, {side} {variant}: "
            f"{(err.strip().splitlines() or ['no message'])[-1]}"
        )
    return json.loads(out.strip().splitlines()[-1])


def largest_batch(case: Case, variants: list[tuple[str, str]]) -> Case:
    """The case with the training batch, halved until every variant has room for it."""
    batch = freeze(load_file(case.config)).train.batch_size
    while batch >= 1:
        tried = dataclasses.replace(case, batch=batch)
        if not any(
            measure(side, tried, variant, 1).get("out_of_memory") for side, variant in variants
        ):
            return tried
        batch //= 2
    raise InputError(f"bench {case.name}: not even one sample fits")


def run_case(case: Case, config: Config) -> dict:
    """All variants of a case, in rounds."""
    bench = config.bench
    variants = case.variants(bench)
    if not case.batch:
        case = largest_batch(case, variants)
    rows: dict[str, dict] = {}
    for _ in tqdm(range(bench.rounds), desc=case.name, unit="round", dynamic_ncols=True):
        for side, variant in variants:
            stop.check()
            found = measure(side, case, variant, bench.repeats)
            if found.get("out_of_memory"):
                raise InputError(
                    f"bench {case.name}, {side} {variant}: out of memory at batch {case.batch}; "
                    "lower it (0 finds the largest)"
                )
            row = rows.setdefault(f"{side} {variant}", {**found, "seconds": []})
            row["seconds"] += found["seconds"]
            row["peak_bytes"] = max(row["peak_bytes"], found["peak_bytes"])
    flop = case.flop(case.load())
    for row in rows.values():
        row["median"] = statistics.median(row["seconds"])
        row["flops_per_second"] = flop and flop / row["median"]
    torch_rows = [row for label, row in rows.items() if label.startswith("torch")]
    if torch_rows:
        best = min(torch_rows, key=lambda row: row["median"])
        for row in rows.values():
            low, high = (
                min(best["seconds"]) / max(row["seconds"]),
                max(best["seconds"]) / min(row["seconds"]),
            )
            row["speedup"] = {"median": best["median"] / row["median"], "least": low, "most": high}
    return {"case": dataclasses.asdict(case), "direct_flop": flop, "rows": rows}


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| case | variant | seconds (least-most) | against PyTorch (least-most) | GFLOP/s, direct "
        "count | peak GB | compile s |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for result in results:
        case = result["case"]
        for label, row in result["rows"].items():
            seconds = f"{row['median']:.3g} ({min(row['seconds']):.3g}-{max(row['seconds']):.3g})"
            speed = row.get("speedup")
            ratio = (
                f"{speed['median']:.2f} ({speed['least']:.2f}-{speed['most']:.2f})"
                if speed
                else "-"
            )
            how = f" ({row['plans']})" if row.get("plans") else ""
            rate = f"{row['flops_per_second'] / 1e9:.0f}" if row["flops_per_second"] else "-"
            lines.append(
                f"| {case['name']}, batch {case['batch']}, {case['dtype']} | {label}{how} | "
                f"{seconds} | {ratio} | "
                f"{rate} | {row['peak_bytes'] / 1e9:.2f} | "
                f"{row['compile_seconds']:.1f} |"
            )
    return "\n".join(lines)


def bench(config: Config, config_file: str, workdir: pathlib.Path) -> list[dict]:
    """Runs all cases, prints the table and keeps WORKDIR/bench.json, case by case."""
    write_settings(workdir / SETTINGS, config)
    results = []
    for case in cases_of(config, workdir / SETTINGS):
        results.append(run_case(case, config))
        write_json(
            workdir / RESULTS,
            {"date": time.strftime("%Y-%m-%d"), "config": config_file, "results": results},
        )
    print(f"\n{table(results)}\n\nresults: {(workdir / RESULTS).absolute()}", flush=True)
    return results


def run(given: Given) -> None:
    """Runs the stage."""
    if given["limits"]:
        print(limits_table())
    elif given["rates"]:
        print(learn_rates(given.config))
    elif given["input"]:
        print(feed_table(given.config, given.workdir))
    elif given["layers"]:
        print(layers_table(given.config))
    elif given["backend"] not in ("", "tpu-aot"):
        raise InputError(
            f"--backend={given['backend']}: only tpu-aot, or nothing for the devices of this "
            "machine"
        )
    elif given["backend"]:
        estimate(given.config, given["topology"] or "v5p:2x2x1", given.workdir)
    else:
        bench(given.config, given.config_file, given.workdir)


def needs(given: Given) -> tuple[str, ...]:
    """The modules beyond a plain install that the cases need."""
    if given["limits"] or given["layers"] or given["input"] or given["rates"]:
        return ()
    if given["backend"] == "tpu-aot":
        return ("libtpu",)
    cases = cases_of(given.config, given.config_file)
    configs = [case.load() for case in cases]
    models = [name for c in configs for name in (c.base.path, c.condition.encoder)]
    opponents = ("torch", "peft") if any(case.what == "collect" for case in cases) else ("torch",)
    return (*(opponents if given.config.bench.torch else ()), *packages.of_models(*models))
