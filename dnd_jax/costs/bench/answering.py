"""The case "answers" of `dnd bench`: the train step through the base, on the questions that `dnd
train` asks first."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.base.folder import load_base
from dnd_jax.base.sequences import Sequences, packed_rows, shared_prefix
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.costs.bench.case import Case
from dnd_jax.costs.bench.collecting import encoded, suite_of
from dnd_jax.generator.answers import Answering
from dnd_jax.generator.generation import ONE_DEVICE
from dnd_jax.generator.pairs import PairedDataset, Pairs
from dnd_jax.generator.sizes import spec_of
from dnd_jax.generator.step import ShardedStep, check_batch, shard_train_step
from dnd_jax.lora.initial import Initial
from dnd_jax.lora.targets import Target
from dnd_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step of a case computes on, for either side."""

    target: Target  # what the decoder's tokens mean
    scale: float  # of LoRAs in the base
    condition: np.ndarray  # (B, N, L, C), random numbers: what encodes prompts is no part of a step
    pad: int  # token id
    tasks: Sequence[Sequences]  # (B,)
    index: Sequence[np.ndarray]  # which rows of each are asked

    @classmethod
    def of(cls, case: Case, config: Config) -> "Work":
        """Raises InputError as `suite_of`, for a setting whose steps are on more than answers, and
        as `Pairs`."""
        c, n = config.train, config.condition.num_prompts
        if c.taught != ("answers",) or c.size_weight or c.wording_weight:
            raise InputError(
                f"bench {case.name}: {case.config} must train on answers alone: "
                "train.objective=answers, and 0 for train.weights_first, size_weight and "
                "wording_weight"
            )
        if config.condition.in_graph:
            raise InputError(
                f"bench {case.name}: {case.config} must encode prompts outside the step, by "
                "condition.in_graph=False"
            )
        tasks = suite_of(case, config).with_training(c.datasets, config.seed).train
        pad, questions = encoded(config, tasks)
        nothing = [{"none": np.zeros((len(task.train), 0), np.int8)} for task in tasks]
        datasets = [
            PairedDataset(task.name, prompts, None, asked)
            for task, prompts, asked in zip(tasks, nothing, questions, strict=True)
        ]
        drawn = c.batch_size, n, config.seed, c.pairing, c.few_prompts, c.wordings
        pairs = Pairs(datasets, *drawn, c.answer_rows, pad, c.taught_at, c.of_loras)
        start = Initial(config, config.base.path)
        shape = c.batch_size, *spec_of(config).condition_shape
        condition = np.random.default_rng(0).standard_normal(shape, np.float32)
        drawn = [questions[d] for d, *_ in pairs.draw(0)]
        made = start.target(), start.adapter.scale, condition
        return cls(*made, pad, drawn, pairs.asked(0))

    def rows(self, prefix: int) -> dict[str, np.ndarray]:
        """`packed_rows` of the tasks."""
        return packed_rows(self.tasks, self.index, prefix, self.pad)


def sharded_step(config: Config, work: Work) -> tuple[ShardedStep, dict]:
    """(the step as `dnd train` makes it, on one device as PyTorch's, what is frozen in it)."""
    config = dataclasses.replace(config, mesh=ONE_DEVICE)
    mesh, spec = make_mesh(ONE_DEVICE, jax.devices()[:1]), spec_of(config)
    module, params = load_base(config.base.path, mesh, jnp.dtype(config.lora.dtype))
    module = dataclasses.replace(module, remat=config.lora.remat, mesh=mesh)
    answering = Answering(module, work.scale, check_batch(config, mesh))
    frozen = {"base": params, "target": work.target}
    importance = np.ones(spec.token_grid[0], np.float32)
    sharded = shard_train_step(config, spec, mesh, importance, None, (answering, frozen))
    return sharded, jax.device_put(frozen, sharded.frozen)


def operation(case: Case, config: Config, variant: str) -> Callable[[], object]:
    """A function that takes one step, parameters being as `dnd train` starts from. variant: as of
    case.ANSWERING."""
    lora = dataclasses.replace(config.lora, dtype=case.dtype)
    train = config.train
    if variant == "recomputed":
        lora = dataclasses.replace(lora, remat=True)
    if variant == "one by one":
        train = dataclasses.replace(train, micro_batches=train.batch_size)
    config = dataclasses.replace(config, lora=lora, train=train)
    work = Work.of(case, config)
    sharded, frozen = sharded_step(config, work)
    state = sharded.init(jax.random.fold_in(jax.random.key(config.seed), 2))
    rows = work.rows(0 if variant == "whole rows" else shared_prefix(work.tasks))
    condition = work.condition.astype(jnp.dtype(case.dtype))
    batch = jax.device_put({"condition": condition, "rows": rows}, sharded.over_batch)

    def run() -> dict:
        nonlocal state
        state, metrics = sharded.step(state, batch, frozen)
        return metrics

    return run
