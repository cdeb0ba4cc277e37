"""Stage `train`: the generator, from pairs of prompts and LoRA checkpoints (METHOD.md sections 1, 4 and 6).

    dnd train --config=configs/mini.py --workdir=runs/mini

WORKDIR/generator holds all that generation needs: generator.json (settings, layout, adapter), model.safetensors (parameters),
statistics.safetensors (target statistics, importance weights), beside checkpoints/ for an exact resume.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from tqdm import tqdm

from dnd_jax import config as config_lib
from dnd_jax import loop, multihost, sharding
from dnd_jax.chips import chip_of
from dnd_jax.collection import Checkpoints, make_target, token_array
from dnd_jax.condition import PromptEncoder
from dnd_jax.config import Config
from dnd_jax.errors import InputError
from dnd_jax.forms import condition_texts
from dnd_jax.generator_folder import DESCRIPTION, initial_params, read_record, write_generator
from dnd_jax.models.generator import Generator
from dnd_jax.models.hyperconv import Features, convolutions, forward_macs, weighted_errors
from dnd_jax.models.placement import ANYWHERE, Placement
from dnd_jax.models.text_encoder import encode_windows
from dnd_jax.ops import Problem, compiler_options
from dnd_jax.ops.plan import describe
from dnd_jax.ops.tune import tune
from dnd_jax.pairs import PairedDataset, Pairs
from dnd_jax.shapes import resolve_features
from dnd_jax.suite import Suite


def make_generator(
    features: Sequence[Features],
    config: config_lib.Generator,
    dtype: str,
    placement: Placement = ANYWHERE,
    remat: str = "none",
) -> Generator:
    """The module of a configuration with its resolved features."""
    projection = config.length_projection or None
    return Generator(features, config.kernel_size, projection, jnp.dtype(dtype), config.convolution, placement, remat)


def device_problems(
    config: Config, features: Sequence[Features], mesh: jax.sharding.Mesh, batch: int, parts: int
) -> dict[str, Problem]:
    """The convolutions of one device, by their parameters' paths, when a batch is computed in so many parts."""
    place = Placement(mesh)
    a_part = -(-batch // parts // place.batch_ways(batch))
    return convolutions(features, config.generator.kernel_size, a_part, config.train.dtype, place.platform, mesh.shape["tensor"])


def make_optimizer(config: config_lib.Train) -> optax.GradientTransformation:
    """AdamW (METHOD.md section 6) or Adafactor on everything, global-norm clip, linear warm-up, cosine to 0."""
    warmup = min(config.warmup_steps, config.steps - 1)
    start = 0.0 if warmup else config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(start, config.learning_rate, warmup, config.steps)
    if config.optimizer == "adafactor":
        # Steps of Adam's size: neither scaled by the parameters' own size nor clipped a second time.
        inner = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,
            clipping_threshold=None,
            min_dim_size_to_factor=8,
            weight_decay_rate=config.weight_decay,
        )
    else:
        moment = jnp.bfloat16 if config.optimizer == "adamw_bfloat16_moment" else None
        inner = optax.adamw(schedule, weight_decay=config.weight_decay, mu_dtype=moment)
    return optax.chain(optax.clip_by_global_norm(config.clip), inner)


def make_train_step(
    module: Generator,
    optimizer: optax.GradientTransformation,
    config: config_lib.Train,
    importance: np.ndarray,
    seed: int,
    encoder: nn.Module | None = None,
    shardings=None,
):
    """step(state {"params", "opt", "step"}, batch of `Pairs`, encoder_params=None) -> (state, metrics).

    Noise is drawn from (seed, step). The batch is computed in config.micro_batches parts whose gradients are added up, which gives
    the whole batch's. encoder: the text encoder that turns "ids" and "valid" into the condition here. shardings: of the parameters,
    and so of their gradients. metrics: scalars, and "sample_loss" (B,).
    """
    place = module.placement

    def condition_of(batch: Mapping, encoder_params) -> jax.Array:
        if encoder is None:
            return batch["condition"]
        b, n, length = batch["ids"].shape
        ids, valid = (place.activation(batch[key].reshape(b * n, length)) for key in ("ids", "valid"))
        flat = place.activation(encode_windows(encoder, encoder_params, ids, valid))
        return jax.lax.stop_gradient(flat).reshape(b, n, length, -1)

    def step(state, batch, encoder_params=None):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        on_condition, on_target = jax.random.split(key)
        condition, target = condition_of(batch, encoder_params), batch["target"]
        condition = condition + config.condition_noise * jax.random.normal(on_condition, condition.shape, condition.dtype)
        target = target + config.target_noise * jax.random.normal(on_target, target.shape, target.dtype)

        cells = jnp.sum(~jnp.isnan(target), dtype=jnp.float32)

        def loss_of(params, condition, target):
            """A part's share of the batch's loss; its samples' losses and mean squares (b,)."""
            output = module.apply({"params": place.gather_small(params)}, place.activation(condition))
            errors_b, cells_b = weighted_errors(output, target, importance)
            inside = ~jnp.isnan(target)
            squares_b = jnp.sum(output.astype(jnp.float32) ** 2, (1, 2, 3), where=inside) / cells_b
            return jnp.sum(errors_b) / cells, (errors_b / cells_b, squares_b)

        def gradient_of(condition, target):
            (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["params"], condition, target)
            return loss, aux, gradient if shardings is None else jax.lax.with_sharding_constraint(gradient, shardings)

        k = config.micro_batches
        if k == 1:
            loss, (sample_loss, squares), gradient = gradient_of(condition, target)
        else:
            # Every k-th sample belongs to a part, so that each device finds its share among the samples it has.
            parts = jax.tree.map(lambda x: x.reshape(len(x) // k, k, *x.shape[1:]).swapaxes(0, 1), (condition, target))

            def add(total, part):
                loss, aux, gradient = gradient_of(*part)
                return jax.tree.map(jnp.add, total, (loss, gradient)), aux

            nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["params"])
            (loss, gradient), aux = jax.lax.scan(add, nothing, parts)
            sample_loss, squares = (x.swapaxes(0, 1).reshape(-1) for x in aux)

        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "output_mean_square": jnp.mean(squares),
            "target_mean_square": jnp.nanmean(target**2),
            "sample_loss": sample_loss,
        }
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}, metrics

    return step


@dataclasses.dataclass(frozen=True)
class ShardedStep:
    """The train step as it runs on a mesh. state: {"params", "opt", "step"}; batch: that of `Pairs`."""

    shapes: dict  # of the state
    shardings: dict  # of the state
    over_batch: jax.sharding.NamedSharding
    encoder: Any  # shardings of the text encoder's parameters, None without one
    init: Callable  # key -> state, jitted
    step: Callable  # (state, batch, encoder parameters or None) -> (state, metrics), jitted, the state donated


def shard_train_step(
    config: Config,
    mesh: jax.sharding.Mesh,
    features: Sequence[Features],
    condition_shape: tuple[int, int, int],
    importance: np.ndarray,
    encoder: tuple[nn.Module, Any] | None = None,
) -> ShardedStep:
    """The one train step of a configuration, for training, ahead-of-time compilation and tests. condition_shape: (N, L, C).

    encoder: module and parameters (or their shapes) of the text encoder, when it runs inside the step. Raises InputError for a
    parameter without a rule and for sizes that the mesh does not divide.
    """
    c, place = config.train, Placement(mesh)
    module = make_generator(features, config.generator, c.dtype, place, c.remat)
    optimizer = make_optimizer(c)

    def init(key):
        params = module.init(key, jnp.zeros((1, *condition_shape)))["params"]
        return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.shard_by_rules(mesh, config.mesh.rules, shapes)
    over_batch = check_batch(config, mesh)
    encoder_module, encoder_shapes = encoder or (None, None)
    encoder_shardings = encoder and sharding.shard_by_rules(mesh, config.mesh.rules, {"encoder": encoder_shapes})["encoder"]
    step = jax.jit(
        make_train_step(module, optimizer, c, importance, config.seed, encoder_module, shardings["params"]),
        in_shardings=(shardings, over_batch, encoder_shardings),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(place.platform),
    )
    return ShardedStep(shapes, shardings, over_batch, encoder_shardings, jax.jit(init, out_shardings=shardings), step)


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The sharding of a batch. Raises InputError unless the mesh divides it, and each of its parts."""
    c = config.train
    over_batch = sharding.leading(mesh, c.batch_size, "config.train.batch_size")
    sharding.leading(mesh, c.batch_size // c.micro_batches, "config.train.batch_size / config.train.micro_batches")
    return over_batch


def first_state(config: Config, sharded: ShardedStep) -> dict:
    """The state that training starts from: new parameters, or those of config.train.init_from with a new optimiser.

    Raises InputError as `initial_params`.
    """
    if not config.train.init_from:
        return sharded.init(jax.random.fold_in(jax.random.key(config.seed), 2))
    of = sharded.shapes["params"], sharded.shardings["params"]
    params = initial_params(config.train.init_from, *of, dataclasses.asdict(config.generator))
    opt = jax.jit(make_optimizer(config.train).init, out_shardings=sharded.shardings["opt"])(params)
    if multihost.lead():
        print(f"starting from the parameters of {config.train.init_from}", flush=True)
    return {"params": params, "opt": opt, "step": jax.device_put(np.int32(0), sharded.shardings["step"])}


def train(
    config: Config,
    suite: Suite,
    workdir: pathlib.Path,
    allowed: Sequence[str] | None = None,
    profile: tuple[int, int] | None = None,
) -> pathlib.Path:
    """Trains the generator on the suite's training datasets and returns WORKDIR/generator; a finished one is kept.

    allowed: names of settings that may differ from those of the run that is resumed, None where the user cannot give any.
    profile: steps between which to trace. Several processes share the work; process 0 writes. Raises InputError for checkpoints
    that do not fit together, too few prompts, or a folder made with other settings.
    """
    folder, c = workdir / "generator", config.train
    suite = suite.with_training(c.datasets, config.seed)
    finished = False
    if (folder / DESCRIPTION).is_file():
        then, now = read_record(folder), _settings(config, suite)
        if "checkpoints" in then:  # folders of earlier versions do not say
            now["checkpoints"] = Checkpoints(config, suite, workdir).digest()
        finished = loop.check_same_run(folder / DESCRIPTION, then, now, allowed)
    if multihost.agreed(finished):
        return folder

    mesh = sharding.make_mesh(config.mesh)
    check_batch(config, mesh)
    if config.generator.convolution == "tuned" and multihost.several():
        raise InputError("config.generator.convolution = 'tuned' measures in one process; with several use auto, dft or direct")
    # Now, not after everything is encoded.
    checkpoints = Checkpoints(config, suite, workdir)
    record = {**_settings(config, suite), "checkpoints": checkpoints.digest()}
    multihost.check_alike({"the suite's files": suite.fingerprint, "the LoRA checkpoints": record["checkpoints"]})
    loop.check_newest(folder, c.checkpoint_dir, record, allowed)
    with multihost.lead_first():  # who finds its files made by process 0 where the workdir is shared
        target = make_target(config, checkpoints, workdir / "targets")
        encoder = PromptEncoder(config.condition, None if multihost.several() else mesh)  # here one process encodes by itself
        datasets, spreads = [], []
        for dataset in tqdm(suite.train, desc="encode", unit="dataset", dynamic_ncols=True, disable=not multihost.lead()):
            prompts = condition_texts(dataset.train, config.condition.form, config.seed)
            if config.condition.in_graph:
                ids, valid = encoder.cached_tokens(prompts, workdir / "embeddings")
                inputs = {"ids": ids, "valid": valid}
            else:
                inputs = {"condition": encoder.cached(prompts, workdir / "embeddings")}
            tokens = token_array(checkpoints, dataset.name, target, workdir / "targets", config.generator.importance)
            datasets.append(PairedDataset(dataset.name, inputs, tokens.targets))
            spreads.append(tokens.importance)
    multihost.check_alike({"the text encoder's files": encoder.fingerprint})
    pairs = Pairs(datasets, c.batch_size, config.condition.num_prompts, config.seed, c.pairing)
    importance = np.ones(checkpoints.layout.num_tokens, np.float32)
    if config.generator.importance:
        importance = np.mean(spreads, axis=0).astype(np.float32)

    condition_shape = (config.condition.num_prompts, config.condition.max_text_length, encoder.width)
    features = resolve_features(config.generator, condition_shape, target.shape)
    in_graph = (encoder.module, encoder.params) if config.condition.in_graph else None
    problems = device_problems(config, features, mesh, c.batch_size, c.micro_batches)
    if config.generator.convolution == "tuned":
        tune(problems.values())
    sharded = shard_train_step(config, mesh, features, condition_shape, importance, in_graph)
    encoder_params = in_graph and jax.device_put(encoder.params, sharded.encoder)
    encoder_fingerprint = encoder.fingerprint
    del encoder, in_graph  # its parameters need not stay on the first device
    flop = 2 * forward_macs(features, config.generator.kernel_size)
    if multihost.lead():
        count = sum(x.size for x in jax.tree.leaves(sharded.shapes["params"]))
        total, held = sharding.bytes_per_device(sharded.shapes, sharded.shardings)
        print(
            f"generator: {count / 1e6:.1f}M parameters, {flop / 1e9:.2f} GFLOP a sample forward, {target.shape} tokens, "
            f"{len(datasets)} datasets x {len(datasets[0].targets)} checkpoints\n"
            f"mesh: {sharding.describe_mesh(mesh)}; state {total / 1e9:.3g} GB, {held / 1e9:.3g} GB a device\n"
            f"convolutions (output / gradients): {describe(problems.values(), config.generator.convolution)}",
            flush=True,
        )
    else:
        print(f"process {jax.process_index()} of {jax.process_count()}: mesh {sharding.describe_mesh(mesh)}", flush=True)
    state = loop.run(
        "train",
        folder,
        sharding.shaped(sharded.shapes, sharded.shardings),
        lambda state, batch: sharded.step(state, batch, encoder_params),
        lambda i: pairs.placed(i, sharded.over_batch),
        steps=c.steps,
        save_every=c.save_every,
        record={**record, "encoder": encoder_fingerprint},
        blame=lambda i: f", with pairs of {', '.join(sorted(set(pairs.names(i))))}",
        init=lambda: first_state(config, sharded),
        row_of=lambda step, values, seconds: _row(values, pairs.names(step - 1), seconds, 3 * flop * c.batch_size, mesh),
        options=loop.Options(
            keep_last=c.keep_last,
            keep_every=c.keep_every,
            checkpoint_dir=c.checkpoint_dir,
            trackers=c.trackers,
            allowed=allowed if allowed is None else tuple(allowed),
            profile=profile,
            notes={"config": config.to_json(), "mesh": sharding.mesh_record(mesh)},
        ),
    )
    flat = {"/".join(path): x for path, x in traverse_util.flatten_dict(state["params"]).items()}
    on_host = ((path, multihost.to_host(x)) for path, x in flat.items())  # all processes take part in gathering each
    if multihost.lead():
        write_generator(
            folder,
            {path: (x.shape, x.dtype) for path, x in flat.items()},
            on_host,
            {"importance": importance, **target.statistics()},
            {
                "settings": _settings(config, suite),
                "checkpoints": record["checkpoints"],
                "features": features,
                "layout": checkpoints.layout.to_json(),
                "adapter": dataclasses.asdict(checkpoints.adapter),
                "encoder_fingerprint": encoder_fingerprint,
            },
        )
    else:
        collections.deque(on_host, maxlen=0)
    with multihost.lead_first():  # no process is done before the files are there
        return folder


def _row(values: Mapping, names: Sequence[str], seconds: float, flop: int, mesh: jax.sharding.Mesh) -> dict:
    """The numbers of a step that are written: the metrics, the loss of each dataset, and speed.

    flop: operations of the step by the direct method, so that methods compare; a faster one may exceed the peak.
    """
    row = {key: value for key, value in values.items() if key != "sample_loss"}
    by_name: dict[str, list[float]] = {}
    for name, loss in zip(names, values["sample_loss"], strict=True):
        by_name.setdefault(name, []).append(loss)
    row |= {f"loss/{name}": float(np.mean(losses)) for name, losses in sorted(by_name.items())}
    row |= {"samples_per_second": len(names) / seconds, "tflop_per_second": flop / seconds / 1e12}
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is not None:
        row["share_of_peak"] = flop / seconds / (chip.peak * mesh.size)
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        row["peak_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
    return row


# Settings of the generator's training that change no number in it.
_FREE = ("checkpoints", "save_every", "keep_last", "keep_every", "checkpoint_dir", "trackers")


def _settings(config: Config, suite: Suite) -> dict:
    """What a generator depends on, for its record."""
    full = config.to_json()
    training = {key: value for key, value in full["train"].items() if key not in _FREE}
    return {key: full[key] for key in ("seed", "condition", "generator")} | {"train": training, "suite": suite.fingerprint}
