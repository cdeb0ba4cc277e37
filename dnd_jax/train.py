"""Stage `train`: the generator, from pairs of prompts and LoRA checkpoints (METHOD.md sections 1, 4 and 6).

    dnd train --config=configs/mini.py --workdir=runs/mini

WORKDIR/generator holds all that generation needs: generator.json (settings, layout, adapter), model.safetensors (parameters),
statistics.safetensors (target statistics, importance weights), beside checkpoints/ for an exact resume.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from safetensors.numpy import save_file
from tqdm import tqdm

from dnd_jax import config as config_lib
from dnd_jax import loop, sharding
from dnd_jax.adapters import checkpoint_folders, load_adapter, load_adapter_config
from dnd_jax.condition import PromptEncoder
from dnd_jax.config import Config
from dnd_jax.errors import InputError, listed
from dnd_jax.files import read_json, replacing, write_json
from dnd_jax.layout import LoraLayout, importance_weights
from dnd_jax.models.generator import Generator
from dnd_jax.models.hyperconv import Features, convolutions, forward_macs, weighted_loss
from dnd_jax.models.text_encoder import encode_windows
from dnd_jax.ops import compiler_options
from dnd_jax.ops.plan import describe
from dnd_jax.ops.tune import tune
from dnd_jax.pairs import PairedDataset, Pairs
from dnd_jax.suite import Suite
from dnd_jax.targets import ChunkTarget, ElementTarget, Target

DESCRIPTION, MODEL, STATISTICS = "generator.json", "model.safetensors", "statistics.safetensors"


def resolve_features(
    config: config_lib.Generator, condition: tuple[int, int, int], token_grid: tuple[int, int, int]
) -> tuple[Features, ...]:
    """(N, L, C) of every stage with its zeros filled in: the first stage's from the condition (N, L, C), T from the token grid
    (T, h, w), and any later L and C from h and w.

    Raises InputError naming a given size that contradicts the data.
    """
    expected_first = condition
    if config.length_projection:
        expected_first = (condition[0], config.features[0][1] or condition[1], condition[2])
    stages = [
        tuple(given or known for given, known in zip(config.features[0], expected_first, strict=True)),
        *((n or token_grid[0], length or token_grid[1], c or token_grid[2]) for n, length, c in config.features[1:]),
    ]
    for at, known, what in ((0, expected_first, "the condition (N, L, C)"), (-1, token_grid, "the token grid (T, h, w)")):
        if stages[at] != known:
            raise InputError(f"config.generator.features[{at}] = {stages[at]} is not {what}, which is {known}; a 0 takes it over")
    return tuple(stages)


def make_generator(
    features: Sequence[Features],
    config: config_lib.Generator,
    dtype: str,
    platform: str | None = None,
    batch_ways: int = 1,
    kernel_ways: int = 1,
) -> Generator:
    """The module of a configuration with its resolved features; platform and the ways as in dnd_jax.ops.convolve."""
    projection = config.length_projection or None
    return Generator(
        features, config.kernel_size, projection, jnp.dtype(dtype), config.convolution, platform, batch_ways, kernel_ways
    )


def make_optimizer(config: config_lib.Train) -> optax.GradientTransformation:
    """AdamW on everything, global-norm clip, linear warm-up, cosine to 0."""
    warmup = min(config.warmup_steps, config.steps - 1)
    start = 0.0 if warmup else config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(start, config.learning_rate, warmup, config.steps)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(schedule, weight_decay=config.weight_decay))


def make_train_step(
    module: Generator,
    optimizer: optax.GradientTransformation,
    config: config_lib.Train,
    importance: np.ndarray,
    seed: int,
    encoder=None,
):
    """step(state {"params", "opt", "step"}, batch of `Pairs`) -> (state, metrics): one function for training, planning and tests.

    Noise is drawn from (seed, step). encoder: (module, params) to turn "ids" and "valid" into the condition here.
    """

    def condition_of(batch: Mapping) -> jax.Array:
        if encoder is None:
            return batch["condition"]
        encoder_module, encoder_params = encoder
        b, n, length = batch["ids"].shape
        flat = encode_windows(
            encoder_module, encoder_params, batch["ids"].reshape(b * n, length), batch["valid"].reshape(b * n, length)
        )
        return jax.lax.stop_gradient(flat).reshape(b, n, length, -1)

    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        on_condition, on_target = jax.random.split(key)
        condition, target = condition_of(batch), batch["target"]
        condition = condition + config.condition_noise * jax.random.normal(on_condition, condition.shape, condition.dtype)
        target = target + config.target_noise * jax.random.normal(on_target, target.shape, target.dtype)

        def loss_of(params):
            output = module.apply({"params": params}, condition)
            return weighted_loss(output, target, importance), jnp.mean(output.astype(jnp.float32) ** 2)

        (loss, mean_square), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        metrics = {
            "loss": loss,
            "gradient_norm": optax.global_norm(gradient),
            "output_mean_square": mean_square,
            "target_mean_square": jnp.nanmean(target**2),
        }
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}, metrics

    return step


@dataclasses.dataclass(frozen=True)
class ShardedStep:
    """The train step as it runs on a mesh. state: {"params", "opt", "step"}; batch: that of `Pairs`."""

    shapes: dict  # of the state
    shardings: dict  # of the state
    over_batch: jax.sharding.NamedSharding
    init: Callable  # key -> state, jitted
    step: Callable  # (state, batch) -> (state, metrics), jitted, the state donated


def shard_train_step(
    config: Config,
    mesh: jax.sharding.Mesh,
    features: Sequence[Features],
    condition_shape: tuple[int, int, int],
    importance: np.ndarray,
    encoder=None,
) -> ShardedStep:
    """The one train step of a configuration, for training, ahead-of-time compilation and tests. condition_shape: (N, L, C).

    Raises InputError for a parameter without a rule and for sizes that the mesh does not divide.
    """
    c = config.train
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    ways = sharding.batch_ways(mesh), sharding.kernel_ways(mesh)
    module = make_generator(features, config.generator, c.dtype, platform, *ways)
    optimizer = make_optimizer(c)

    def init(key):
        params = module.init(key, jnp.zeros((1, *condition_shape)))["params"]
        return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.shard_by_rules(mesh, config.mesh.rules, shapes)
    over_batch = sharding.leading(mesh, c.batch_size, "config.train.batch_size")
    step = jax.jit(
        make_train_step(module, optimizer, c, importance, config.seed, encoder),
        in_shardings=(shardings, over_batch),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(platform),
    )
    return ShardedStep(shapes, shardings, over_batch, jax.jit(init, out_shardings=shardings), step)


class Checkpoints:
    """The LoRA checkpoints of the training datasets: one layout, checked file by file."""

    def __init__(self, config: Config, suite: Suite, workdir: pathlib.Path):
        root = pathlib.Path(config.train.checkpoints or workdir / "loras")
        self.folders = checkpoint_folders(root, [d.name for d in suite.train])
        every = [folder for folders in self.folders.values() for folder in folders]
        configs = {folder: load_adapter_config(folder) for folder in every}
        self.adapter = configs[every[0]]
        faults = [
            f"{folder} ({c.base}, rank {c.rank}, alpha {c.alpha:g})"
            for folder, c in configs.items()
            if (c.base, c.rank, c.alpha) != (self.adapter.base, self.adapter.rank, self.adapter.alpha)
        ]
        if faults:
            a = self.adapter
            raise listed(f"adapters of another base or scale than {every[0]} ({a.base}, rank {a.rank}, alpha {a.alpha:g})", faults)
        self.layout = LoraLayout.from_tensors(load_adapter(every[0]), config.generator.chunk_width or None)

    def tensors(self, dataset: str | None = None) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(folder, tensors) of one dataset's checkpoints, or of all, read one at a time."""
        for name, folders in self.folders.items():
            if dataset in (None, name):
                yield from ((str(folder), load_adapter(folder)) for folder in folders)


def make_target(config: Config, checkpoints: Checkpoints) -> Target:
    """The target of config.generator.target, with its statistics."""
    if config.generator.target == "chunk":
        return ChunkTarget(checkpoints.layout, config.generator.bfloat16_checkpoints)
    return ElementTarget.fit(checkpoints.layout, checkpoints.tensors)


def train(config: Config, suite: Suite, workdir: pathlib.Path) -> pathlib.Path:
    """Trains the generator on the suite's training datasets and returns WORKDIR/generator; a finished one is kept.

    Raises InputError for checkpoints that do not fit together, too few prompts, or a folder made with other settings.
    """
    folder, c = workdir / "generator", config.train
    if (folder / DESCRIPTION).is_file():
        stored = read_json(folder / DESCRIPTION)["settings"]
        loop.check_same_run(folder / DESCRIPTION, stored, _settings(config, suite))
        return folder

    checkpoints = Checkpoints(config, suite, workdir)
    target = make_target(config, checkpoints)
    encoder = PromptEncoder(config.condition)
    datasets = []
    for dataset in tqdm(suite.train, desc="encode", unit="dataset", dynamic_ncols=True):
        prompts = [e.prompt for e in dataset.train]
        if config.condition.in_graph:
            ids, valid = encoder.tokenize(prompts)
            inputs = {"ids": ids, "valid": valid}
        else:
            inputs = {"condition": encoder.cached(prompts, workdir / "embeddings")}
        targets = np.stack([target.encode(tensors, source) for source, tensors in checkpoints.tensors(dataset.name)])
        datasets.append(PairedDataset(dataset.name, inputs, targets))
    pairs = Pairs(datasets, c.batch_size, config.condition.num_prompts, config.seed)
    num_tokens = checkpoints.layout.num_tokens
    importance = np.ones(num_tokens, np.float32)
    if config.generator.importance:
        importance = np.mean([importance_weights(d.targets) for d in datasets], axis=0).astype(np.float32)

    condition_shape = (config.condition.num_prompts, config.condition.max_text_length, encoder.width)
    features = resolve_features(config.generator, condition_shape, target.shape)
    mesh = sharding.make_mesh(config.mesh)
    in_graph = (encoder.module, encoder.params) if config.condition.in_graph else None
    problems = convolutions(features, config.generator.kernel_size, -(-c.batch_size // sharding.batch_ways(mesh)), c.dtype)
    if config.generator.convolution == "tuned":
        tune(problems.values())
    sharded = shard_train_step(config, mesh, features, condition_shape, importance, in_graph)
    count = sum(x.size for x in jax.tree.leaves(sharded.shapes["params"]))
    flop = 2 * forward_macs(features, config.generator.kernel_size)
    print(
        f"generator: {count / 1e6:.1f}M parameters, {flop / 1e9:.2f} GFLOP a sample forward, {target.shape} tokens, "
        f"{len(datasets)} datasets x {len(datasets[0].targets)} checkpoints\nconvolutions (output / gradients): "
        f"{describe(problems.values(), config.generator.convolution)}",
        flush=True,
    )
    state = loop.run(
        "train",
        folder,
        sharded.init(jax.random.fold_in(jax.random.key(config.seed), 2)),
        sharded.step,
        lambda i: jax.device_put(pairs.batch_at(i), sharded.over_batch),
        steps=c.steps,
        save_every=c.save_every,
        record=_settings(config, suite),
        blame=lambda i: f", with pairs of {pairs.names(i)}",
    )
    params = {"/".join(path): np.asarray(x) for path, x in traverse_util.flatten_dict(jax.device_get(state["params"])).items()}
    with replacing(folder / MODEL) as temporary:
        save_file(params, temporary)
    with replacing(folder / STATISTICS) as temporary:
        save_file({"importance": importance, **target.statistics()}, temporary)
    write_json(
        folder / DESCRIPTION,
        {
            "settings": _settings(config, suite),
            "features": features,
            "layout": checkpoints.layout.to_json(),
            "adapter": dataclasses.asdict(checkpoints.adapter),
            "encoder_fingerprint": encoder.fingerprint,
        },
    )
    return folder


def _settings(config: Config, suite: Suite) -> dict:
    """What a generator depends on, for its record."""
    full = config.to_json()
    return {key: full[key] for key in ("seed", "condition", "generator", "train")} | {"suite": suite.fingerprint}
