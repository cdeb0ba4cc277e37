"""What generating an adapter costs against tuning one, on the same task and machine."""

import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dnd_jax.collect import init_lora, make_collect_step, make_optimizer
from dnd_jax.config import Config
from dnd_jax.forms import condition_texts
from dnd_jax.generate import TrainedGenerator, draw_prompts
from dnd_jax.lm_data import encode
from dnd_jax.models import hf
from dnd_jax.pretrain import shuffled_rows
from dnd_jax.suite import Suite

PAPER = "2,500 to 12,000"  # times less than full-shot tuning, METHOD.md section 8


def measure_overhead(config: Config, suite: Suite, workdir: pathlib.Path, base_path, repeats: int = 5) -> dict:
    """Seconds to tune one LoRA on an unseen dataset (a training one where none has answers) and to generate one from its
    prompts, both compiled beforehand.

    Generation is split into encoding the prompts and decoding weights; medians over `repeats`.
    """
    dataset, c = next((d for d in suite.unseen if d.labeled), suite.train[0]), config.lora
    generator = TrainedGenerator(workdir / "generator")
    prompts = condition_texts(dataset.train, config.condition.form, config.seed)

    def seconds(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - started

    def generate(seed: int) -> tuple[float, float]:
        drawn = draw_prompts(prompts, generator.condition.num_prompts, seed)
        condition = []
        encoding = seconds(lambda: condition.append(generator.encoder.encode(drawn)))
        return encoding, seconds(lambda: generator.target.decode(generator.tokens(condition[0])))

    cold = sum(generate(0))
    encoding, decoding = (statistics.median(x) for x in zip(*map(generate, range(1, repeats + 1)), strict=True))

    module, params = hf.load_base(base_path)
    optimizer = make_optimizer(c)
    step = jax.jit(make_collect_step(module, optimizer, c.alpha / c.rank), donate_argnums=1)
    lora = init_lora(jax.random.key(config.seed), module.config.lora_shapes(c.rank, c.targets))
    state = jax.tree.map(lambda x: jnp.asarray(x)[None], {"lora": lora, "opt": optimizer.init(lora)})
    data = encode(hf.load_tokenizer(base_path), dataset.train, config.base.max_length)

    def tune(state, steps: int):
        for i in range(steps):
            batch = data.batch(shuffled_rows(len(data), c.batch_size, config.seed, i), data.response_width)
            state, _ = step(params, state, jax.tree.map(lambda x: x[None], batch))
        return state

    state = jax.block_until_ready(tune(state, 2))
    tuning = seconds(lambda: tune(state, c.steps))
    ratio = tuning / (encoding + decoding)
    size = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    return {
        "tune_seconds": tuning,
        "generate_seconds": encoding + decoding,
        "encode_seconds": encoding,
        "decode_seconds": decoding,
        "generate_cold_seconds": cold,
        "ratio": ratio,
        "note": (
            f"Tuning one LoRA took {tuning:.2f} s ({c.steps} steps of {c.batch_size}), generating one {encoding + decoding:.3f} s "
            f"(prompts {encoding:.3f}, weights {decoding:.3f}): a ratio of {ratio:.0f}. The paper reports {PAPER}. The ratio grows "
            f"with the cost of tuning, that is with the base's size and its steps; this base has {size:.1f}M parameters, so "
            "tuning it costs next to nothing while the text encoder and the decoder stay what they are."
        ),
    }
