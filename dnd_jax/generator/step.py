"""The one train step of a configuration, sharded over a mesh (docs/METHOD.md sections 4 to 6)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dnd_jax.base.architecture import RULES as BASE_RULES
from dnd_jax.config import schema
from dnd_jax.config.schema import Config
from dnd_jax.generator.answers import Answering
from dnd_jax.generator.decoder import weighted_errors
from dnd_jax.generator.generation import in_precision
from dnd_jax.generator.inputs import condition_of, noisy, over_cells, with_gaps, with_tokens
from dnd_jax.generator.model import Generator
from dnd_jax.generator.regularisers import NUMBERS, regularised
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.ops.cost_model import Problem
from dnd_jax.parallel.placement import Placement
from dnd_jax.parallel.programs import compiler_options
from dnd_jax.parallel.rules import leading, replicated, shard_by_rules


def device_problems(
    spec: DecoderSpec, mesh: jax.sharding.Mesh, batch: int, parts: int
) -> dict[str, Problem]:
    """The convolutions of one device, by their parameters' paths, when a batch is computed in so
    many parts."""
    place = Placement(mesh)
    a_part = -(-batch // parts // place.batch_ways(batch))
    return spec.convolutions(a_part, place.platform, mesh.shape["tensor"])


def make_train_step(
    module: Generator,
    optimizer: optax.GradientTransformation,
    config: schema.Train,
    importance: np.ndarray,
    seed: int,
    encoder: nn.Module | None = None,
    shardings=None,
    answering: Answering | None = None,
):
    """step(state of `state_of`, batch of `Pairs`, frozen) -> (state, metrics); frozen: {"encoder",
    "base"}, the parameters of those that there are, "target", what the base takes the output for,
    "sizes" of `tuned_sizes`, and "checkpoints" of `kept_checkpoints`, of which the batch then has
    numbers; or None.

    The loss is what the batch has: "target", the weights of LoRA checkpoints; "rows", questions and
    answers, of which the generated LoRAs are asked through the base of `answering`, and with
    "teacher", the weights of LoRA checkpoints, to answer as these do, or with "shown", the same
    rows behind answered examples, as the base does there; or the sum of both by
    config.weights_share. Noise and gaps are drawn from (seed, step). The batch is computed in
    config.micro_batches parts whose gradients are added up, which gives the whole batch's. encoder:
    the text encoder that turns "ids" and "valid" into the condition here. shardings: of the
    parameters, and so of their gradients. metrics: scalars, and "sample_loss" (B,).
    """
    place = module.placement

    def of_weights(output, target, cells):
        """A part's share of the batch's loss on weights; (b,) of its samples' losses."""
        errors_b, cells_b = weighted_errors(output, target, importance)
        inside = ~jnp.isnan(target)
        squares_b = jnp.sum(output.astype(jnp.float32) ** 2, (1, 2, 3), where=inside) / cells_b
        return jnp.sum(errors_b) / cells, {"loss": errors_b / cells_b, "square": squares_b}

    def of_answers(output, part, frozen, tasks):
        """The same of its loss through the base."""
        asked = frozen["base"], frozen["target"], output.astype(jnp.float32)
        teacher = part.get("teacher"), part.get("shown")
        losses_b, exact_b = answering.losses(*asked, part["rows"], *teacher)
        squares_b = jnp.mean(output.astype(jnp.float32) ** 2, (1, 2, 3))
        found = {"answers": losses_b, "exact": exact_b, "square": squares_b}
        return jnp.sum(losses_b) / tasks, found

    def gradient_of(params, part, frozen, cells, tasks):
        """((loss, gradient), numbers of each sample (b,)) of a part of a batch."""

        def loss_of(params):
            condition = place.activation(part["condition"])
            output = module.apply({"params": place.gather_small(params)}, condition)
            loss, found = 0.0, {}
            if "target" in part:
                loss, found = of_weights(output, part["target"], cells)
            if "rows" in part:
                asked, more = of_answers(output, part, frozen, tasks)
                loss, found = config.weights_share * loss + asked, {**more, **found}
            if config.size_weight or config.wording_weight:
                added_b, more = regularised(config, output, frozen)
                loss, found = loss + jnp.sum(added_b) / tasks, found | more
            return loss, found

        (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        if shardings is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, shardings)
        return (loss, gradient), aux

    def step(state, batch, frozen=None):
        frozen = frozen or {}
        # Inputs.
        if "checkpoints" in frozen:
            of_all = frozen["checkpoints"]
            batch = with_tokens(batch, of_all, module.spec.token_grid, place.mesh)
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        on_condition, on_target = jax.random.split(key)
        condition = condition_of(batch, encoder, frozen.get("encoder"), place)
        condition = with_gaps(condition, config.condition_dropout, on_condition)
        parts = {"condition": noisy(condition, config.condition_noise, on_condition)}
        sizes = {"cells": None, "tasks": len(condition)}
        weights_share = config.weights_share if "rows" in batch else 1.0
        if "target" in batch:
            target = noisy(batch["target"], config.target_noise, on_target)
            parts["target"] = target
            sizes["cells"] = jnp.sum(~jnp.isnan(target), dtype=jnp.float32)
        parts |= {key: batch[key] for key in ("rows", "teacher", "shown") if key in batch}

        # Gradient and update.
        part_of = functools.partial(gradient_of, state["params"], frozen=frozen, **sizes)
        (loss, gradient), of_samples = _in_parts(
            part_of, parts, config.micro_batches, state["params"], config.wordings
        )
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "output_mean_square": jnp.mean(of_samples["square"]),
        }
        if "target" in batch:
            metrics["target_mean_square"] = jnp.nanmean(target**2)
        if "rows" in batch:
            kind = "distill_loss" if {"teacher", "shown"} & batch.keys() else "answers_loss"
            metrics[kind] = jnp.mean(of_samples["answers"])
            metrics["exact"] = jnp.mean(of_samples["exact"])
        metrics |= {key: jnp.mean(of_samples[key]) for key in NUMBERS if key in of_samples}
        metrics["sample_loss"] = sum(
            share * of_samples[part]
            for part, share in (("loss", weights_share), ("answers", 1.0))
            if part in of_samples
        )
        params = optax.apply_updates(state["params"], updates)
        after = {"params": params, "opt": opt, "step": state["step"] + 1}
        if "average" in state:
            t = after["step"].astype(jnp.float32)
            decay = jnp.minimum(config.average_decay, t / (9 + t))  # its first steps count little
            after["average"] = optax.incremental_update(params, state["average"], 1 - decay)
        return after, metrics

    return step


def _in_parts(gradient_of: Callable, batch: Mapping, k: int, params: Any, alike: int):
    """gradient_of(batch) -> ((loss, gradient), per sample {NAME: (b,)}) of a batch, computed in k
    parts: losses and gradients are added up, what is per sample is put back in the batch's order.

    Every k-th sample belongs to a part, so that each device finds its share among the samples it
    has; of samples of which so many are alike, every k-th group, where k divides a device's groups.
    """
    if k == 1:
        return gradient_of(batch)

    def split(x):
        groups = x.reshape(-1, k, alike, *x.shape[1:]).swapaxes(0, 1)
        return groups.reshape(k, -1, *x.shape[1:])

    parts = jax.tree.map(split, batch)

    def add(total, part):
        found, per_sample = gradient_of(part)
        return jax.tree.map(jnp.add, total, found), per_sample

    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    total, per_sample = jax.lax.scan(add, nothing, parts)
    return total, jax.tree.map(
        lambda x: x.reshape(k, -1, alike).swapaxes(0, 1).reshape(-1), per_sample
    )


@dataclasses.dataclass(frozen=True)
class ShardedStep:
    """The train step as it runs on a mesh. state: {"params", "opt", "step"}; batch: that of
    `Pairs`."""

    shapes: dict  # of the state
    shardings: dict  # of the state
    over_batch: jax.sharding.NamedSharding
    # of {"encoder", "base", "target", "sizes", "checkpoints"}, what the step takes; None of none
    frozen: dict | None
    init: Callable  # key -> state, jitted
    # (state, batch, values as `frozen`) -> (state, metrics), jitted, the state donated
    step: Callable
    # (parameters, batch, values as `frozen`) -> tokens (B, T, h, w) on all devices, jitted
    tokens: Callable


def state_of(params: Any, optimizer: optax.GradientTransformation, config: schema.Train) -> dict:
    """{"params", "opt", "step"} before the first step; with config.average_decay "average" too."""
    state = {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    return state | ({"average": jax.tree.map(jnp.copy, params)} if config.average_decay else {})


def shard_train_step(
    config: Config,
    spec: DecoderSpec,
    mesh: jax.sharding.Mesh,
    importance: np.ndarray,
    encoder: tuple[nn.Module, Any] | None = None,
    answering: tuple[Answering, Mapping] | None = None,
    beside: Mapping | None = None,
    kept: bool = False,
) -> ShardedStep:
    """The one train step of a configuration, for training, ahead-of-time compilation and tests.

    encoder: module and parameters (or their shapes) of the text encoder, when it runs inside the
    step. answering: through which base LoRAs are asked, {"base": its parameters (or their shapes),
    "target"}, where the objective asks for it. beside: of `tuned_sizes` (or shapes), where
    config.train.size_weight asks for it. kept: LoRA checkpoints stay on the devices. Raises
    InputError for a parameter without a rule and for sizes that the mesh does not divide.
    """
    c, place = config.train, Placement(mesh)
    module = Generator(spec, place)
    optimizer = train_optimizer(c)

    def init(key):
        params = module.init(key, jnp.zeros((1, *spec.condition_shape)))["params"]
        return state_of(params, optimizer, c)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = shard_by_rules(mesh, config.mesh.rules, shapes)
    over_batch = check_batch(config, mesh)
    (encoder_module, of_encoder), (asked, through) = (
        encoder or (None,) * 2,
        answering or (None,) * 2,
    )
    frozen = {}
    if encoder:
        rules = shard_by_rules(mesh, config.mesh.rules, {"encoder": of_encoder})
        frozen["encoder"] = rules["encoder"]
    if answering:
        frozen["base"] = shard_by_rules(mesh, BASE_RULES, through["base"])
        beside = {"target": through["target"], **(beside or {})}
    frozen |= jax.tree.map(lambda _: replicated(mesh), dict(beside or {}))
    if kept:
        frozen["checkpoints"] = over_cells(mesh)
    how = optimizer, c, importance, config.seed, encoder_module, shardings["params"], asked
    options = compiler_options(place.platform, c.deterministic)
    step = jax.jit(
        in_precision(spec, make_train_step(module, *how)),
        in_shardings=(shardings, over_batch, frozen or None),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=options,
    )

    def generated(params, batch, frozen=None):
        condition = condition_of(batch, encoder_module, (frozen or {}).get("encoder"), place)
        condition = place.activation(condition)
        return module.apply({"params": place.gather_small(params)}, condition).astype(jnp.float32)

    tokens = jax.jit(
        in_precision(spec, generated),
        in_shardings=(shardings["params"], over_batch, frozen or None),
        out_shardings=replicated(mesh),
        compiler_options=options,
    )
    return ShardedStep(
        shapes,
        shardings,
        over_batch,
        frozen or None,
        jax.jit(init, out_shardings=shardings),
        step,
        tokens,
    )


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The sharding of a batch. Raises InputError unless the mesh divides it, and each of its
    parts."""
    c = config.train
    over_batch = leading(mesh, c.batch_size, "config.train.batch_size")
    leading(
        mesh,
        c.batch_size // c.micro_batches,
        "config.train.batch_size / config.train.micro_batches",
    )
    return over_batch
