"""Stage `pretrain`: a small base LLM from scratch on the suite's corpus, written as a Hugging Face
folder (WORKDIR/base).

dnd pretrain --config=configs/mini.py --workdir=runs/mini
"""

import dataclasses
import functools
import pathlib
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from dnd_jax.base.architecture import BaseLM, sizes_to_pretrain
from dnd_jax.base.folder import save_base
from dnd_jax.base.found import find_base
from dnd_jax.base.loss import answer_loss
from dnd_jax.base.new_tokenizer import VERSION, build_tokenizer
from dnd_jax.base.sequences import encode, encode_packed
from dnd_jax.config.records import check_same_run
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import check_unused
from dnd_jax.core.formats import read_numbered
from dnd_jax.core.stage import Given
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import Suite
from dnd_jax.loop.optimizers import base_optimizer
from dnd_jax.loop.prefetch import shuffled_rows
from dnd_jax.loop.run import run_loop
from dnd_jax.loop.training import Options, Training
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.rules import leading, replicated, shaped, shard_by_rules

DONE = "pretrain.json"  # beside the weights: the settings that made them
FORMAT = 1  # of it


def make_train_step(module: BaseLM, optimizer: optax.GradientTransformation):
    """step(state {"params", "opt"}, batch) -> (state, metrics)."""

    def step(state, batch):
        (loss, accuracy), gradient = jax.value_and_grad(
            lambda p: answer_loss(module, p, batch), has_aux=True
        )(state["params"])
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.tree.norm(gradient)}
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, metrics

    return step


def pretrain(
    config: Config, suite: Suite, workdir: pathlib.Path, allowed: Collection[str] = ()
) -> pathlib.Path:
    """Trains the base and returns its folder; an existing one made with the same settings is kept.

    allowed: names of settings that may differ from those of the run that is resumed. Raises
    InputError when the suite has no corpus or one that lacks the responses to learn, or the folder
    was made with other settings.
    """
    folder = workdir / "base"
    c = config.pretrain
    record = {
        "seed": config.seed,
        "base": dataclasses.asdict(config.base),
        "pretrain": dataclasses.asdict(c),
    }
    record |= {"suite": suite.fingerprint, "tokenizer": VERSION}
    if (folder / DONE).is_file():
        stored = read_numbered(folder / DONE, FORMAT)
        number = stored.pop("format")
        then = stored["settings"] if number else stored  # at first the record was all of it
        # A whole base stays with the tokenizer that it was made with.
        older = {"tokenizer": lambda version: version in (None, *range(VERSION))}
        if check_same_run(folder / DONE, then, record, allowed, older):
            return folder
    else:
        check_unused(folder, "the base", "give that base by --config.base.path")
    if not suite.corpus:
        raise InputError(
            f"{suite.root}/suite.json: no corpus to pretrain a base on; add one or set "
            "config.base.path"
        )
    without = next((e.where for e in suite.corpus if not e.response), None)
    if c.loss == "response" and without:
        raise InputError(
            f"{without}: no response to learn; add one, or pretrain on the prompts by "
            "config.pretrain.loss=text"
        )

    tokenizer = build_tokenizer(
        (" ".join(filter(None, (e.system, e.prompt, e.response))) for e in suite.corpus),
        config.base.vocab_size,
    )
    length = config.base.max_length
    if c.loss == "text":
        data = encode_packed(tokenizer, suite.corpus, length)
    else:
        data = encode(tokenizer, suite.corpus, length, "skip")
        if lost := data.lost("the corpus", length):
            print(lost, flush=True)
    width = data.response_width
    module = BaseLM(sizes_to_pretrain(config.base, len(tokenizer)))
    optimizer = base_optimizer(c)

    mesh = make_mesh(config.mesh)

    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return {"params": params, "opt": optimizer.init(params)}

    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    shardings = shard_by_rules(mesh, config.mesh.rules, jax.eval_shape(init, key))
    batch_sharding = leading(mesh, c.batch_size, "config.pretrain.batch_size")
    step = jax.jit(
        make_train_step(module, optimizer),
        in_shardings=(shardings, batch_sharding),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    training = Training(
        "pretrain",
        workdir / "pretrain",
        record,
        shaped(jax.eval_shape(init, key), shardings),
        init=lambda: jax.jit(init, out_shardings=shardings)(key),
        step=step,
        batch_at=lambda i: jax.device_put(
            data.batch(shuffled_rows(len(data), c.batch_size, config.seed, i), width),
            batch_sharding,
        ),
        steps=c.steps,
        save_every=c.save_every,
    )
    older = {"tokenizer": functools.partial(_other_tokens, training.directory)}
    state = run_loop(training, Options(allowed=tuple(allowed), older=older))
    done = {DONE: {"format": FORMAT, "settings": record}}
    save_base(folder, module.config, jax.device_get(state["params"]), tokenizer, done)
    return folder


def _other_tokens(directory: pathlib.Path, version: object) -> bool:
    """Refuses to go on from steps that another tokenizer's tokens were taught in, whatever is
    allowed: called where its version is another."""
    raise InputError(
        f"{directory}: was begun with another version of the tokenizer ({version or 1}, now "
        f"{VERSION}), whose tokens are others, so it cannot go on; start anew in another "
        f"--workdir, or remove {directory}"
    )


def make_base(
    config: Config, suite: Suite, workdir: pathlib.Path, allowed: Collection[str] = ()
) -> str:
    """The given base, or the one pretrained in the workdir."""
    if config.base.path:
        return find_base(config, workdir)
    return str(pretrain(config, suite, workdir, allowed))


def run(given: Given) -> None:
    """Runs the stage."""
    suite = open_suite(given.config, given.workdir, given["strict"])
    print(f"base: {make_base(given.config, suite, given.workdir, given['allow'])}")
