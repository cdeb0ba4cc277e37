"""What generating an adapter costs against tuning one, on the same task and device, in seconds and
operations."""

import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.base.folder import load_base, load_tokenizer
from dnd_jax.base.sequences import encode, packed_rows, shared_prefix
from dnd_jax.config import schema
from dnd_jax.config.schema import Config
from dnd_jax.core.files import read_object
from dnd_jax.core.workdir import LORAS
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Suite
from dnd_jax.generator.folder import find_generator, read_description
from dnd_jax.generator.trained import Generated, TrainedGenerator
from dnd_jax.loop.optimizers import lora_optimizer
from dnd_jax.loop.prefetch import shuffled_rows
from dnd_jax.lora.collect import DONE
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.lora.task_step import first_state, make_collect_step
from dnd_jax.parallel.programs import compiler_options

PAPER = "2,500 to 12,000"  # times less than full-shot tuning, docs/METHOD.md section 8
REPEATS = 5


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def _weights(params) -> int:
    """Parameters that every token is multiplied with: all but the tables of embeddings (a tied head
    sees the answer alone)."""
    return sum(
        x.size
        for path, x in jax.tree.leaves_with_path(params)
        if "embedding" not in jax.tree_util.keystr(path)
    )


def measure_generation(
    run_dir: str | os.PathLike,
    examples: Sequence[Example],
    scratch: str | os.PathLike,
    seed: int = 0,
) -> dict:
    """Prompts -> adapter on disk, written under `scratch`: seconds of the first, with loading and
    compiling, and of later ones, the medians of REPEATS draws of prompts; operations of a pass by
    the direct method."""
    started = time.perf_counter()
    generator = TrainedGenerator(run_dir)
    prompts = condition_texts(examples, generator.condition.form, seed)

    def once(seed: int) -> tuple[float, float, float]:
        drawn = generator.draw(prompts, seed)
        made: dict = {}
        encoding = _seconds(lambda: made.update(condition=generator.encoder.encode(drawn)))
        decoding = _seconds(
            lambda: made.update(
                tensors=generator.target.decode(generator.tokens(made["condition"]))
            )
        )

        def write():
            generated = Generated(tuple(drawn), made["tensors"])
            generator.save(generated, pathlib.Path(scratch, "adapter"), seed)

        return encoding, decoding, _seconds(write)

    once(0)
    cold = time.perf_counter() - started
    encoding, decoding, writing = (
        statistics.median(x) for x in zip(*map(once, range(1, REPEATS + 1)), strict=True)
    )
    c = generator.condition
    return {
        "generate_seconds": encoding + decoding + writing,
        "encode_seconds": encoding,
        "decode_seconds": decoding,
        "write_seconds": writing,
        "generate_cold_seconds": cold,
        "encode_flop": 2 * _weights(generator.encoder.params) * c.num_prompts * c.max_text_length,
        "decode_flop": 2 * generator.module.spec.forward_macs,
    }


def measure_tuning(
    base: str | os.PathLike,
    examples: Sequence[Example],
    shapes: Mapping[str, tuple[int, int]],
    scale: float,
    lora: schema.Lora,
    max_length: int,
    seed: int = 0,
    limit: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.float32,
) -> dict:
    """One LoRA of these shapes tuned by collect's step: seconds of lora.steps steps, and of all
    with loading and compiling.

    limit: steps that are timed, of which the others are taken to be alike; 0: all. mesh, dtype: of
    the base, as in `load_base`.
    """
    started = time.perf_counter()
    module, params = load_base(base, mesh, dtype)
    optimizer = lora_optimizer(lora)
    step = make_collect_step(module, optimizer, scale)
    options = compiler_options(jax.default_backend())
    step = jax.jit(step, donate_argnums=1, compiler_options=options)
    state = first_state(jax.random.key(seed), shapes, optimizer)
    timed = min(limit or lora.steps, lora.steps)
    batches = _batches(base, examples, max_length, lora.batch_size, seed, timed)
    by_shapes = {str(jax.tree.map(np.shape, batch)): batch for batch in batches}
    one_of_each = list(by_shapes.values())  # what is compiled for
    computed = [batch["ids"].size + batch["prefix"].size for batch in batches]
    tokens = round(float(np.mean(computed)))

    def tune(state, batches: Sequence[Mapping]):
        for batch in batches:
            state, _ = step(params, state, batch)
        return state

    state = jax.block_until_ready(tune(state, one_of_each))
    first = time.perf_counter() - started
    # The state of a fresh run may lie elsewhere, which compiles once more.
    state = jax.block_until_ready(tune(state, one_of_each))
    a_step = _seconds(lambda: tune(state, batches)) / timed
    return {
        "tune_seconds": a_step * lora.steps,
        "tune_cold_seconds": first + a_step * (lora.steps - len(one_of_each)),
        "steps": lora.steps,
        "timed_steps": timed,
        "batch_size": lora.batch_size,
        "step_tokens": tokens,
        "base_weights": _weights(params),
        # Forward, and backwards through the frozen weights to the activations: 2 operations a
        # weight and token each.
        "step_flop": 4 * _weights(params) * tokens,
    }


def _batches(
    base: str | os.PathLike,
    examples: Sequence[Example],
    max_length: int,
    batch_size: int,
    seed: int,
    count: int,
) -> list[dict]:
    """The first batches of the tuning of one LoRA, as collect draws them."""
    tokenizer = load_tokenizer(base)
    data = encode(tokenizer, examples, max_length)
    rows = [shuffled_rows(len(data), batch_size, seed, i) for i in range(count)]
    how = shared_prefix([data]), tokenizer.pad_token_id
    return [packed_rows([data], [index], *how) for index in rows]


def compare(generation: Mapping, tuning: Mapping) -> dict:
    """Both measurements with their ratios and a note in words, which says what the ratio is made
    of."""
    g, t = generation, tuning
    ratio = t["tune_seconds"] / g["generate_seconds"]
    cold = t["tune_cold_seconds"] / g["generate_cold_seconds"]
    parts = {
        "the text encoder": g["encode_seconds"],
        "the decoder": g["decode_seconds"],
        "writing the file": g["write_seconds"],
    }
    times = lambda x: f"{x:.0f}" if x >= 10 else f"{x:.2g}"
    steps, a_step = t["steps"], t["tune_seconds"] / t["steps"]
    timed = "" if t["timed_steps"] == steps else f", {t['timed_steps']} of them timed"
    note = (
        f"Tuning one LoRA takes {t['tune_seconds']:.2f} s ({steps} steps of {t['batch_size']} at "
        f"{a_step * 1e3:.1f} ms{timed}), "
        f"generating one {g['generate_seconds']:.3f} s (prompts {g['encode_seconds']:.3f}, "
        f"weights {g['decode_seconds']:.3f}, file "
        f"{g['write_seconds']:.3f}): a ratio of {times(ratio)} ({times(cold)} when both start "
        f"cold). The paper reports {PAPER}. "
        f"What decides it: {steps} steps of about {t['step_flop'] / 1e12:.3g} TFLOP "
        f"(4 x {t['base_weights'] / 1e6:.3g}M weights of the base x "
        f"{t['step_tokens']} tokens) against one pass of "
        f"{g['encode_flop'] / 1e12:.3g} TFLOP in the text "
        f"encoder and {g['decode_flop'] / 1e12:.3g} in the decoder, where most of the time goes "
        f"to {max(parts, key=parts.get)}. A "
        "larger base or more steps raise the ratio in proportion; the pass grows with the tokens "
        "of the adapter alone."
    )
    return {**t, **g, "ratio": ratio, "cold_ratio": cold, "note": note}


def lora_of(run_dir: str | os.PathLike) -> tuple[dict[str, tuple[int, int]], AdapterConfig]:
    """({key: shape}, settings) of the LoRA that a generator makes."""
    description = read_description(find_generator(run_dir))
    return {m.key: m.shape for m in description.layout.matrices}, description.adapter


def measure_overhead(
    config: Config,
    suite: Suite,
    workdir: pathlib.Path,
    base_path,
    limit: int,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.float32,
) -> dict:
    """Generation and tuning on an unseen dataset (a training one where none has answers) of a run,
    in this process; limit, mesh, dtype: as in `measure_tuning`."""
    dataset = next((d for d in suite.unseen if d.labeled), suite.train[0])
    shapes, adapter = lora_of(workdir)
    with tempfile.TemporaryDirectory(dir=workdir, prefix=".overhead.") as scratch:
        generation = measure_generation(workdir, dataset.train, scratch, config.seed)
    tuning = measure_tuning(
        base_path,
        dataset.train,
        shapes,
        adapter.scale,
        _as_it_ended(config.lora, workdir, dataset.name),
        config.base.max_length,
        config.seed,
        limit,
        mesh,
        dtype,
    )
    return compare(generation, tuning)


def _as_it_ended(c: schema.Lora, workdir: pathlib.Path, dataset: str) -> schema.Lora:
    """The settings of a LoRA with the steps that it took, where a task's loss may end it."""
    if not c.flat_window or not (workdir / LORAS / DONE).is_file():
        return c
    steps = read_object(workdir / LORAS / DONE).get("steps", {})
    return dataclasses.replace(c, steps=steps.get(dataset, c.steps))
