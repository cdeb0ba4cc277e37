"""What `dnd quickstart` has to do and about how long it takes here, said before hours are spent.

The operations of every stage are counted from the settings and the suite, and divided by what one
device does on a matrix product, measured on the spot, times about the share of that which the
programs reach on a CPU. A GPU or TPU reaches smaller shares of a higher rate.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dnd_jax.base.architecture import LmConfig
from dnd_jax.config.schema import Config
from dnd_jax.costs.collect_cost import sizes_of
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Suite
from dnd_jax.generator.sizes import spec_of
from dnd_jax.lora.controls import FEW_SHOT

SIZE = 1024  # of the matrices that are multiplied
SHARE = 0.4  # of that product's rate
OF_EACH_SEED = ("train", "evaluate")  # with --share
# Tokens of a word, and of a chat template, without what all questions begin with: computed once.
WORD, TEMPLATE = 1.4, 8


def product_rate() -> float:
    """Operations a second of a float32 matrix product on the first device."""
    x = jnp.ones((SIZE, SIZE))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(seconds)


def operations(config: Config, suite: Suite) -> dict[str, tuple[float, str]]:
    """{stage: (floating-point operations, what it does)} of one seed."""
    base, spec = sizes_of(config), spec_of(config)
    lora, controls, train, e = config.lora, config.controls, config.train, config.evaluate
    tuned, unseen = len(suite.datasets), suite.unseen
    # Of one example: forward, and the gradient of what lies between, not of the base's weights.
    step = 2 * lora.batch_size * _forward(base, [x for d in suite.datasets for x in d.train])
    found = {}
    if not config.base.path and suite.corpus:
        c = config.pretrain
        count = 3 * c.steps * c.batch_size * _forward(base, suite.corpus)
        found["pretrain"] = count, f"a base, {c.steps} steps of {c.batch_size} texts"
    if not config.train.checkpoints and train.from_loras:
        what = f"{tuned} LoRAs, {lora.steps} steps of {lora.batch_size} rows each"
        found["collect"] = tuned * lora.steps * step, what
    steps, what = 0, []
    if controls.multi_task and not controls.folder:
        rates = len(controls.learning_rates) or 1
        steps += rates * lora.steps * len(suite.train)
        what += [f"ONE LoRA for all tasks, {steps} steps"]
    if controls.few_shot and not controls.folder:
        few = sum(n <= len(d.pool) for d in unseen if d.labeled for n in FEW_SHOT)
        steps += few * lora.steps
        what += [f"{few} LoRAs on a few labels"]
    if steps:
        found["controls"] = steps * step, "; ".join(what)
    what = f"the generator, {train.steps} steps of {train.batch_size} pairs"
    pairs = 6.0 * spec.forward_macs * train.steps
    if train.through_base:
        asked, steps = [x for d in suite.train for x in d.train], train.steps - train.weights_first
        # Forward and back, and what the teacher reads.
        passes = 2 + (1 + train.shots) * ("distill" in train.taught)
        pairs += passes * steps * train.answer_rows * _forward(base, asked)
        of_them = f" in {steps} of them" if train.weights_first else ""
        what += f", {train.answer_rows} questions each through the base{of_them}"
    found["train"] = pairs * train.batch_size, what
    # Generated, ridge, wrong and random prompts; base, nearest, ...
    adapters = e.samples * (4 if controls.prompts else 3)
    adapters += 5 + 2 * controls.multi_task + 2 * controls.few_shot
    adapters += min(e.train_adapters or len(suite.train), len(suite.train))
    asked = sum(_forward(base, d.test, e.max_new_tokens / 2) * len(d.test) for d in unseen)
    what = f"{len(unseen)} unseen tasks, about {adapters} adapters each"
    found["evaluate"] = adapters * asked, what
    return found


def _forward(base: LmConfig, examples: Sequence[Example], more: float = 0) -> float:
    """Operations of the base on one of the examples, and on so many tokens more, in the mean."""
    words = sum(len(f"{x.prompt} {x.response}".split()) for x in examples) / len(examples)
    tokens = TEMPLATE + WORD * words + more
    layer = sum(d_in * d_out for d_in, d_out in base.projections().values())
    return 2 * tokens * base.num_hidden_layers * layer


def outlook(config: Config, suite: Suite, seeds: int = 1, share: bool = False) -> str:
    """The lines that a run begins with. share: as of `quickstart`."""
    rate, lines, total = product_rate(), [], 0.0
    for stage, (count, what) in operations(config, suite).items():
        times = 1 if share and stage not in OF_EACH_SEED else seeds
        seconds = times * count / (SHARE * rate)
        total += seconds
        each = f" for each of {times} seeds" if times > 1 else ""
        lines.append(f"  {stage:<9} {_clock(seconds):>6}  {what}{each}")
    device = jax.devices()[0].device_kind
    return "\n".join(
        [
            f"about {_clock(total)} (hours:minutes) from its beginning on this machine ({device}, "
            f"{rate / 1e9:.0f} GFLOP/s); it may be stopped at any time, the same command goes on",
            *lines,
        ]
    )


def _clock(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60}:{minutes % 60:02d}"
