"""Stage `collect`: one LoRA a dataset, all trained at once, as PEFT checkpoints
WORKDIR/loras/DATASET/step_NNNNNN.

    dnd collect --config=configs/mini.py --workdir=runs/mini

All tasks run in one jitted step (vmap over tasks, the base shared), start from the same A and read
their examples in the same order: checkpoints of different tasks then differ by their task alone,
without which a generator cannot compose them. Datasets of `train` keep each of the last M steps
(docs/METHOD.md section 1); unseen ones only the last, as the tuned reference of the report.
"""

import dataclasses
import functools
import pathlib
import re
import shutil
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dnd_jax.base.architecture import BaseLM
from dnd_jax.base.chat import ends_of
from dnd_jax.base.folder import load_base, load_tokenizer
from dnd_jax.base.hub import packages_of
from dnd_jax.base.identity import base_digest, means_base
from dnd_jax.base.loss import answer_loss
from dnd_jax.base.pretrain import find_base
from dnd_jax.base.reading import check_reading
from dnd_jax.base.sequences import Sequences, encode, how_taught
from dnd_jax.config import schema
from dnd_jax.config.records import check_same_run
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import holds_only, read_json
from dnd_jax.core.formats import read_numbered, write_numbered
from dnd_jax.core.stage import ALLOW, BASE_NAME, ON_SUITE, Given, Stage
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import Suite
from dnd_jax.data.suite_file import SPLITS
from dnd_jax.loop.optimizers import lora_optimizer
from dnd_jax.loop.prefetch import shuffled_rows
from dnd_jax.loop.run import Options, Training, run_loop
from dnd_jax.lora.adapter import check_called, is_ours, save_adapter
from dnd_jax.lora.listing import dataset_checkpoints
from dnd_jax.lora.peft_settings import CARD, CONFIG, WEIGHTS, AdapterConfig, adapter_of
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import batch_ways
from dnd_jax.parallel.rules import leading, replicated, shaped

DONE, FORMAT = "collect.json", 1  # what is written last, and the form that it has


def init_lora(key: jax.Array, shapes: Mapping[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """PEFT's default: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0."""
    keys = dict(zip(sorted(shapes), jax.random.split(key, len(shapes)), strict=True))

    def init(name: str, shape: tuple[int, int]) -> jax.Array:
        if ".lora_B." in name:
            return jnp.zeros(shape)
        return jax.random.uniform(keys[name], shape, minval=-1, maxval=1) * shape[1] ** -0.5

    return {name: init(name, shape) for name, shape in shapes.items()}


def make_collect_step(
    module: BaseLM,
    optimizer: optax.GradientTransformation,
    lora_scale: float,
    over_tasks: jax.sharding.NamedSharding | None = None,
):
    """step(base params, state {"lora", "opt"} with a leading task axis K, batch (K, ...)) ->
    (state, metrics).

    over_tasks: where the tasks lie while they are computed. The batch may have more entries than K,
    copies of the first ones that make them divide; nothing of what is returned depends on them.
    """

    def one(params, state, batch):
        def loss_of(lora):
            return answer_loss(module, params, batch, lora, lora_scale)

        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["lora"])
        updates, opt = optimizer.update(gradient, state["opt"], state["lora"])
        return {"lora": optax.apply_updates(state["lora"], updates), "opt": opt}, loss, accuracy

    def step(params, state, batch):
        tasks, entries = (len(jax.tree.leaves(tree)[0]) for tree in (state, batch))
        if entries > tasks:
            state = jax.tree.map(lambda x: x[np.arange(entries) % tasks], state)
            state = jax.lax.with_sharding_constraint(state, over_tasks)
        found = jax.vmap(one, in_axes=(None, 0, 0))(params, state, batch)
        state, losses, accuracies = jax.tree.map(lambda x: x[:tasks], found)
        return state, {
            "loss": losses.mean(),
            "accuracy": accuracies.mean(),
            "worst_loss": losses.max(),
        }

    return step


def score_loras(
    module: BaseLM, params, lora, lora_scale: float, data, batch_size: int
) -> np.ndarray:
    """Exact match (greedy) of each task's LoRA on its own examples, (K,): lora and data have one
    entry a task. Memory: one batch, less than a training step's."""

    @jax.jit
    def score(params, lora, batch):
        return answer_loss(module, params, batch, lora, lora_scale)[1]

    scores = []
    for k, sequences in enumerate(data):
        one = {name: value[k] for name, value in lora.items()}
        parts = np.array_split(np.arange(len(sequences)), -(-len(sequences) // batch_size))
        right = [
            float(score(params, one, sequences.batch(part, sequences.response_width))) * len(part)
            for part in parts
        ]
        scores.append(sum(right) / len(sequences))
    return np.array(scores)


@dataclasses.dataclass(frozen=True)
class TaskBatches:
    """The batches of all tasks, one entry a task, on a mesh.

    A number of tasks that the mesh does not divide is filled up with copies inside the step alone.
    The state, then whole on every device, has none of them: a stopped run goes on with any number
    of devices.
    """

    tasks: Sequence[Sequences]
    batch_size: int
    seed: int
    pad: int  # token id
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def _entries(self) -> np.ndarray:
        """The task of each entry of a batch."""
        count, ways = len(self.tasks), batch_ways(self.mesh)
        return np.arange(-(-count // ways) * ways) % count

    @functools.cached_property
    def _width(self) -> int:
        """Tokens of the longest response."""
        return max(task.response_width for task in self.tasks)

    @functools.cached_property
    def over_tasks(self) -> jax.sharding.NamedSharding:
        """Where a batch's entries lie."""
        return leading(self.mesh, len(self._entries), "the number of tasks")

    @property
    def of_state(self) -> jax.sharding.NamedSharding:
        """Where the state of the tasks lies between steps."""
        return self.over_tasks if len(self._entries) == len(self.tasks) else replicated(self.mesh)

    def at(self, i: int) -> dict[str, jax.Array]:
        """The i-th batch, (entries, batch_size, ...): all tasks read their examples in the same
        order."""
        rows = [
            task.batch(shuffled_rows(len(task), self.batch_size, self.seed, i), self._width)
            for task in self.tasks
        ]
        length = max(batch["ids"].shape[1] for batch in rows)
        for batch in rows:
            missing = length - batch["ids"].shape[1]
            batch["ids"] = np.pad(batch["ids"], ((0, 0), (0, missing)), constant_values=self.pad)
        stacked = jax.tree.map(lambda *x: np.stack(x)[self._entries], *rows)
        return jax.device_put(stacked, self.over_tasks)


def collect(
    config: Config,
    suite: Suite,
    base_path: str,
    workdir: pathlib.Path,
    allowed: Collection[str] = (),
    name: str = "",
) -> pathlib.Path:
    """Trains the LoRAs of all datasets of a suite and returns WORKDIR/loras; one made with the same
    settings is kept.

    allowed: names of settings that may differ from those of the run that is resumed. name: what the
    adapters call the base; empty: its hub id or absolute path. Writes loras/collect.json with each
    task's exact match on its test file. Raises InputError as the loop does.
    """
    folder, c = workdir / "loras", config.lora
    record = {
        "seed": config.seed,
        "base": base_digest(base_path),
        "lora": dataclasses.asdict(c),
        "max_length": config.base.max_length,
        "suite": suite.fingerprint,
    }
    older = {"base": lambda then: means_base(then, base_path)}
    if (folder / DONE).is_file():
        then = read_numbered(folder / DONE, FORMAT)["settings"]
        if check_same_run(folder / DONE, then, record, allowed, older):
            for dataset in suite.datasets:
                check_called(dataset_checkpoints(folder / dataset.name), name)
            return folder
    _check_own(folder, suite)

    # The base, its LoRA and the tasks.
    check_reading(config, base_path)
    mesh = make_mesh(config.mesh)
    module, params = load_base(base_path, mesh)
    tokenizer = load_tokenizer(base_path)
    ends = ends_of(base_path, tokenizer)  # refused now, not when the LoRAs are scored
    # LoRAs half of whose steps an earlier version made may have been taught other tokens.
    taught, as_before = how_taught(tokenizer)
    older["answer"] = lambda then: then is None and as_before
    adapter = adapter_of(base_path, c, name)
    train, test = (_encoded(tokenizer, suite, split, config, ends) for split in SPLITS)
    batches = TaskBatches(train, c.batch_size, config.seed, tokenizer.pad_token_id, mesh)

    # The step.
    optimizer = lora_optimizer(c)

    def init(key):
        lora = init_lora(key, module.config.lora_shapes(c.rank, c.targets))
        state = {"lora": lora, "opt": optimizer.init(lora)}
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(train), *x.shape)), state)

    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    shapes = jax.eval_shape(init, key)
    step = jax.jit(
        make_collect_step(module, optimizer, adapter.scale, batches.over_tasks),
        out_shardings=(batches.of_state, replicated(mesh)),
        donate_argnums=1,
    )

    # Training.
    training = Training(
        "collect",
        workdir / "collect",
        record | {"answer": taught},
        shaped(shapes, jax.tree.map(lambda _: batches.of_state, shapes)),
        init=lambda: jax.jit(init, out_shardings=batches.of_state)(key),
        step=lambda state, batch: step(params, state, batch),
        batch_at=batches.at,
        steps=c.steps,
        save_every=c.save_every,
        after_step=lambda done, state: _keep(done, state, c, suite, folder, adapter),
    )
    for dataset in suite.datasets:
        _stale(folder / dataset.name, c)  # now, not after hours of training
    (folder / DONE).unlink(missing_ok=True)  # while LoRAs are replaced, the folder is not whole
    state = run_loop(training, Options(allowed=tuple(allowed), older=older))

    # Scores.
    lora = jax.device_get(state["lora"])
    scores = score_loras(module, params, lora, adapter.scale, test, c.batch_size)
    exact = {d.name: round(float(s), 4) for d, s in zip(suite.datasets, scores, strict=True)}
    for dataset in suite.datasets:
        for stale in _stale(folder / dataset.name, c):
            shutil.rmtree(stale)
    write_numbered(folder / DONE, FORMAT, {"settings": record, "exact_match": exact})
    return folder


def _encoded(tokenizer, suite: Suite, split: str, config: Config, ends) -> list[Sequences]:
    """One split of every dataset; says how many of its examples are too long for the base."""
    length, found = config.base.max_length, []
    for dataset in suite.datasets:
        examples = getattr(dataset, split)
        found.append(encode(tokenizer, examples, length, config.lora.too_long, ends))
        if lost := found[-1].lost(f"{dataset.name}'s {split}", length):
            print(f"{lost} (config.lora.too_long={config.lora.too_long})", flush=True)
    return found


def _keep(
    done: int,
    state: Mapping,
    c: schema.Lora,
    suite: Suite,
    folder: pathlib.Path,
    adapter: AdapterConfig,
) -> None:
    """Writes the checkpoints of the last M steps of training datasets, the very last of unseen
    ones."""
    if done <= c.steps - c.checkpoints:
        return
    stacked = jax.device_get(state["lora"])
    for k, dataset in enumerate(suite.datasets):
        if k < len(suite.train) or done == c.steps:
            tensors = {name: value[k] for name, value in stacked.items()}
            save_adapter(folder / dataset.name / f"step_{done:06d}", tensors, adapter)


def _stale(folder: pathlib.Path, c: schema.Lora) -> list[pathlib.Path]:
    """The checkpoints of a dataset that an interrupted run of other `steps` left. Raises InputError
    for one that holds more than `save_adapter` writes, so may not be removed."""
    found = []
    for path in folder.glob("step_*"):
        step = re.fullmatch(r"step_(\d{6})", path.name)
        if step and not c.steps - c.checkpoints < int(step[1]) <= c.steps:
            if not holds_only(path, (WEIGHTS, CONFIG, CARD)):
                raise InputError(
                    f"{path}: would count as a LoRA of this run, of other lora.steps, and holds "
                    "files that are not ours; move it away"
                )
            found.append(path)
    return found


def _check_own(folder: pathlib.Path, suite: Suite) -> None:
    """Raises InputError for LoRAs that lie where this stage writes its own, and are none of its:
    they would be replaced, or trained on with them."""
    faults = []
    for dataset in suite.datasets:
        there = dataset_checkpoints(folder / dataset.name)
        faults += [str(path) for path in there if path.is_file() or not is_ours(path)]
    if faults:
        raise listed(
            f"{folder}: holds LoRAs that `dnd collect` did not make; use another --workdir, or "
            f"train on them by `dnd train --config.train.checkpoints={folder}`",
            faults,
            most=3,
        )


def score_table(folder: pathlib.Path) -> str:
    """Each task's exact match on its test file, as text."""
    exact = read_json(folder / DONE)["exact_match"]
    width = max(map(len, exact))
    return "\n".join(f"  {name:<{width}}  {score:.3f}" for name, score in exact.items())


def _run(given: Given) -> None:
    suite = open_suite(given.config, given.workdir, given["strict"])
    base = find_base(given.config, given.workdir)
    more = given["allow"], given["base-name"]
    folder = collect(given.config, suite, base, given.workdir, *more)
    print(f"{score_table(folder)}\nLoRA checkpoints: {folder}")


STAGE = Stage(
    _run,
    (*ON_SUITE, ALLOW, BASE_NAME),
    lambda given: packages_of(given.config.base.path),
    writes=True,
)
