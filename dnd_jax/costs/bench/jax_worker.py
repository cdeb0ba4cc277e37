"""One of our measurements, in a process of its own: `python -m dnd_jax.costs.bench.jax_worker SPEC`
prints one JSON line."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.config.schema import Config
from dnd_jax.core import environment
from dnd_jax.costs.bench import answering, collecting
from dnd_jax.costs.bench.case import Case, peak_memory, timed
from dnd_jax.encoders.load import encode_windows
from dnd_jax.generator.decoder import weighted_loss
from dnd_jax.generator.model import Generator
from dnd_jax.generator.sizes import encoder_module, layout_of
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.generator.step import make_train_step
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.lora.targets import ChunkTarget, ElementTarget
from dnd_jax.ops.choice import describe
from dnd_jax.ops.rates import learned
from dnd_jax.parallel.programs import compiler_options

THROUGH_BASE = {"collect": collecting.operation, "answers": answering.operation}


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 N(0, 1): conditions, targets and prompts only have to have the right shapes."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_params(module, *shapes, dtype=jnp.float32) -> dict:
    """Parameters of the right shapes and about the right size, made leaf by leaf and in place: an
    init would set memory's peak."""
    leaves = jax.eval_shape(
        module.init, jax.random.key(0), *(jax.ShapeDtypeStruct(s, dtype) for s in shapes)
    )["params"]
    wave = jax.jit(
        lambda shape: (
            0.01 * jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape)
        ),
        static_argnums=0,
    )
    return jax.tree.map(lambda leaf: wave(leaf.shape), leaves)


def _spec(case: Case, config: Config) -> DecoderSpec:
    """The decoder, which goes by the rates of this machine where it has learned them."""
    return dataclasses.replace(case.spec(config), rates=learned(jax.default_backend()))


def operation(case: Case, config: Config) -> Callable[[], object]:
    """A function that runs the case once and returns what must be waited for. Everything it needs
    is on the device already."""
    spec, batch = _spec(case, config), max(case.batch, 1)
    module = Generator(spec)
    params = random_params(module, (1, *spec.condition_shape))
    if case.what == "generate":
        return _generate(case, config, module, params)
    condition = jax.device_put(normal((batch, *spec.condition_shape), 0))
    jit = functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))
    if case.what == "forward":
        apply = jit(lambda params, condition: module.apply({"params": params}, condition))
        return lambda: apply(params, condition)
    target = jax.device_put(normal((batch, *spec.token_grid), 1))
    importance = jnp.ones(spec.token_grid[0])
    if case.what == "gradient":

        def loss(params, condition):
            return weighted_loss(module.apply({"params": params}, condition), target, importance)

        gradient = jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: gradient(params, condition)
    optimizer = train_optimizer(config.train)
    step = jit(make_train_step(module, optimizer, config.train, importance, 0), donate_argnums=0)
    state = {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    def train():
        nonlocal state
        state, metrics = step(state, {"condition": condition, "target": target})
        return metrics

    return train


def _generate(case: Case, config: Config, module: Generator, params) -> Callable[[], object]:
    """Prompt ids -> adapter tensors: text encoder, decoder, and weights read back from the tokens
    where the layout is known."""
    encoder = encoder_module(config).clone(dtype=jnp.dtype(config.train.dtype))
    n, length = config.condition.num_prompts, config.condition.max_text_length
    ids = (
        np.random.default_rng(0)
        .integers(encoder.config.vocab_size, size=(case.batch * n, length))
        .astype(np.int32)
    )
    valid = np.ones_like(ids)
    encoder_params = random_params(encoder, (1, 8), (1, 8), dtype=jnp.int32)

    @functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))
    def tokens(params, encoder_params, ids, valid):
        condition = encode_windows(encoder, encoder_params, ids, valid)
        return module.apply(
            {"params": params}, condition.reshape(case.batch, n, length, -1)
        ).astype(jnp.float32)

    layout = None if config.base.path else layout_of(config)  # a given base need not be at hand
    decode = lambda tokens: tokens
    if layout is not None and config.generator.target == "chunk":
        decode = ChunkTarget(layout).decode
    elif layout is not None:
        decode = ElementTarget(
            layout,
            np.zeros(module.spec.token_grid, np.float32),
            np.ones(layout.num_tokens, np.float32),
        ).decode
    ids, valid = jax.device_put((ids, valid))
    return lambda: [decode(np.asarray(t)) for t in tokens(params, encoder_params, ids, valid)]


def _plans(spec: DecoderSpec, batch: int) -> str:
    """How its convolutions are computed."""
    return describe(map(spec.plan, spec.convolutions(max(batch, 1)).values()))


def main() -> None:
    """Runs the spec of the command line."""
    spec = json.loads(sys.argv[1])
    case = Case(**spec["case"])
    config = case.load()
    through_base = THROUGH_BASE.get(case.what)
    if not through_base:
        generator = dataclasses.replace(config.generator, convolution=spec["variant"])
        config = dataclasses.replace(config, generator=generator)
    try:
        run = (
            through_base(case, config, spec["variant"]) if through_base else operation(case, config)
        )
        times = timed(lambda: jax.block_until_ready(run()), spec["repeats"])
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            print(json.dumps({"out_of_memory": True}))
            return
        if refusal := environment.refused(error):
            sys.exit(str(refusal))
        raise
    result = {
        **times,
        "peak_bytes": peak_memory()[0],
        "plans": "" if through_base else _plans(_spec(case, config), case.batch),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
