"""`dnd overhead`: what generating an adapter costs against tuning one, on the same task and device,
in time and peak memory.

    dnd overhead --generator=DIR --prompts=FILE [--base=FOLDER] [--config.lora.steps=675] \\
        [--limit=50] [--workdir=DIR]

FILE is the task's JSONL: its prompts condition the generator, its examples tune the LoRA (that of
the generator: its base, rank and modules; config.lora says how long). Each side has a process of
its own, started cold. The report of `dnd quickstart` has the same measurements, made in its own
process and so without memory.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping

import jax

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.sequences import encode
from dnd_jax.config import schema
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import write_json
from dnd_jax.core.processes import finished, of_module
from dnd_jax.core.stage import Given
from dnd_jax.costs.bench.case import peak_memory
from dnd_jax.data.rows import kind_of
from dnd_jax.data.sources import read_jsonl
from dnd_jax.scoring.generate_vs_tune import (
    PAPER,
    compare,
    lora_of,
    measure_generation,
    measure_tuning,
)

RESULT = "overhead.json"


def _alone(side: str, spec: Mapping) -> dict:
    """What a side measures in a process of its own. Raises InputError with its message."""
    code, out, err = finished(of_module("dnd_jax.studies.overhead", side, json.dumps(spec)))
    if code:
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            last.removeprefix("dnd: ")
            if code == 2
            else f"overhead, {side}: ended with status {code} ({last})"
        )
    return json.loads(out.strip().splitlines()[-1])


def overhead(
    config: Config,
    run_dir: str | os.PathLike,
    prompts: str | os.PathLike,
    workdir: pathlib.Path,
    base: str = "",
    limit: int = 0,
) -> dict:
    """Measures both sides, each in a fresh process, and writes WORKDIR/overhead.json. base: empty
    for the one the generator names.

    Raises InputError for prompts without responses or longer than config.base.max_length, a damaged
    generator, and a base that is not at hand or not supported.
    """
    if not kind_of(prompts)[0]:
        raise InputError(
            f"{prompts}: tuning needs the task's answers; give a JSONL file with prompt and "
            "response in each line"
        )
    _, adapter = lora_of(run_dir)
    spec = {
        "generator": os.fspath(run_dir),
        "prompts": os.fspath(prompts),
        "base": os.fspath(base or adapter.base),
        "lora": dataclasses.asdict(config.lora),
        "max_length": config.base.max_length,
        "seed": config.seed,
        "limit": limit,
        "scratch": os.fspath(workdir),
    }
    load_base_config(spec["base"])
    # Prompts that are too long are refused now, not after minutes.
    encode(load_tokenizer(spec["base"]), read_jsonl(prompts), config.base.max_length)
    workdir.mkdir(parents=True, exist_ok=True)
    generation, tuning = (_alone(side, spec) for side in ("generate", "tune"))
    result = {"prompts": os.fspath(prompts), "base": spec["base"], **compare(generation, tuning)}
    write_json(workdir / RESULT, result)
    return result


def describe(result: Mapping) -> str:
    """The measurements of `overhead` as a table, and the note."""
    gib = lambda side: f"{result[f'{side}_peak_bytes'] / 2**30:.2f}"
    rows = [
        ("tune one LoRA", result["tune_seconds"], result["tune_cold_seconds"], gib("tune")),
        (
            "generate one",
            result["generate_seconds"],
            result["generate_cold_seconds"],
            gib("generate"),
        ),
    ]
    lines = [
        f"on {result['device']}   seconds, warm   from a cold start   GiB at most "
        f"({result['memory_of']})"
    ]
    first = len(f"on {result['device']}")
    lines += [
        f"{name:<{first}}{warm:>16.3f}{cold:>20.3f}{peak:>14}" for name, warm, cold, peak in rows
    ]
    return "\n".join(
        [*lines, f"ratio {result['ratio']:.0f}; the paper's {PAPER}", "", result["note"]]
    )


def main(side: str, raw: str) -> int:
    """One side of `overhead`, as a process: prints its result as JSON; 2 and one line on stderr for
    bad input."""
    spec = json.loads(raw)
    try:
        examples = read_jsonl(spec["prompts"])
        if side == "generate":
            with tempfile.TemporaryDirectory(dir=spec["scratch"], prefix=".overhead.") as scratch:
                result = measure_generation(spec["generator"], examples, scratch, spec["seed"])
        else:
            shapes, adapter = lora_of(spec["generator"])
            lora = schema.Lora(**spec["lora"])
            result = measure_tuning(
                spec["base"],
                examples,
                shapes,
                adapter.scale,
                lora,
                spec["max_length"],
                spec["seed"],
                spec["limit"],
            )
    except InputError as error:
        print(f"dnd: {error}", file=sys.stderr)
        return 2
    peak, whose = peak_memory()
    print(
        json.dumps(
            {
                **result,
                f"{side}_peak_bytes": peak,
                "memory_of": whose,
                "device": jax.devices()[0].device_kind,
            }
        )
    )
    return 0


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("generator", "prompts")
    result = overhead(
        given.config,
        given["generator"],
        given["prompts"],
        given.workdir,
        given["base"],
        given["limit"],
    )
    print(f"{describe(result)}\nmeasurements: {(given.workdir / RESULT).absolute()}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
