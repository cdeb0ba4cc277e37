"""Stage `pretrain`: a small base LLM from scratch on the suite's corpus, written as a Hugging Face folder (WORKDIR/base).

dnd pretrain --config=configs/mini.py --workdir=runs/mini
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dnd_jax import loop, sharding
from dnd_jax.config import Config
from dnd_jax.errors import InputError
from dnd_jax.files import read_json, write_json
from dnd_jax.lm_data import build_tokenizer, encode
from dnd_jax.models import hf
from dnd_jax.models.base_lm import BaseLM, Lora
from dnd_jax.suite import Suite

DONE = "pretrain.json"  # beside the weights: the settings that made them


def answer_loss(
    module: BaseLM, params: Mapping, batch: Mapping, lora: Lora | None = None, lora_scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy over response tokens, share of responses whose every token is the most likely one).

    batch: {"ids" (B, S), "at" (B, R), "labels" (B, R)} of `Sequences.batch`.
    """
    hidden = module.apply({"params": params}, batch["ids"], lora, lora_scale, method="hidden")
    hidden = jnp.take_along_axis(hidden, batch["at"][..., None], axis=1)
    logits = module.apply({"params": params}, hidden, method="head")
    inside = batch["labels"] >= 0
    labels = jnp.maximum(batch["labels"], 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = jnp.all((jnp.argmax(logits, axis=-1) == labels) | ~inside, axis=-1)
    return jnp.sum(losses * inside) / jnp.sum(inside), jnp.mean(right)


def shuffled_rows(size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of the step-th batch when `size` examples are read epoch after epoch, each in a new order, from (seed, step) alone."""
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(size) for epoch in np.unique(at // size)}
    return np.array([orders[i // size][i % size] for i in at])


def make_train_step(module: BaseLM, optimizer: optax.GradientTransformation):
    """step(state {"params", "opt"}, batch) -> (state, metrics)."""

    def step(state, batch):
        (loss, accuracy), gradient = jax.value_and_grad(lambda p: answer_loss(module, p, batch), has_aux=True)(state["params"])
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.tree.norm(gradient)}
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, metrics

    return step


def pretrain(config: Config, suite: Suite, workdir: pathlib.Path) -> pathlib.Path:
    """Trains the base and returns its folder; an existing one made with the same settings is kept.

    Raises InputError when the suite has no corpus or one that lacks the responses to learn, or the folder was made with other
    settings.
    """
    folder = workdir / "base"
    c = config.pretrain
    record = {"seed": config.seed, "base": dataclasses.asdict(config.base), "pretrain": dataclasses.asdict(c)}
    record["suite"] = suite.fingerprint
    if (folder / DONE).is_file():
        loop.check_same_run(folder / DONE, read_json(folder / DONE), record)
        return folder
    if not suite.corpus:
        raise InputError(f"{suite.root}/suite.json: no corpus to pretrain a base on; add one or set config.base.path")
    without = next((e.where for e in suite.corpus if not e.response), None)
    if c.loss == "response" and without:
        raise InputError(f"{without}: no response to learn; add one, or pretrain on the prompts by config.pretrain.loss=text")

    tokenizer = build_tokenizer((f"{e.system} {e.prompt} {e.response}" for e in suite.corpus), config.base.vocab_size)
    data = encode(tokenizer, suite.corpus, config.base.max_length)
    if c.loss == "text":
        data = data.packed(config.base.max_length)
    width = data.response_width
    module = BaseLM(config.base.lm_config(len(tokenizer)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, min(c.warmup_steps, c.steps - 1), c.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=c.weight_decay))

    mesh = sharding.make_mesh(config.mesh)

    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return {"params": params, "opt": optimizer.init(params)}

    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    shardings = sharding.shard_by_rules(mesh, config.mesh.rules, jax.eval_shape(init, key))
    batch_sharding = sharding.leading(mesh, c.batch_size, "config.pretrain.batch_size")
    step = jax.jit(
        make_train_step(module, optimizer),
        in_shardings=(shardings, batch_sharding),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    state = loop.run(
        "pretrain",
        workdir / "pretrain",
        jax.jit(init, out_shardings=shardings)(key),
        step,
        lambda i: jax.device_put(data.batch(shuffled_rows(len(data), c.batch_size, config.seed, i), width), batch_sharding),
        steps=c.steps,
        save_every=c.save_every,
        record=record,
    )
    hf.save_base(folder, module.config, jax.device_get(state["params"]), tokenizer)
    write_json(folder / DONE, record)
    return folder
