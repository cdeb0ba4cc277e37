"""The case "collect" of `dnd bench`: a step of the LoRAs of several tasks, on the rows that `dnd
collect` reads first."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dnd_jax.base.chat import ends_of
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.sequences import Sequences, encode, packed_rows, shared_prefix
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.costs.bench.case import Case
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.loop.optimizers import lora_optimizer
from dnd_jax.loop.prefetch import shuffled_rows
from dnd_jax.lora.task_step import first_state, make_collect_step
from dnd_jax.lora.tuning import Tuning
from dnd_jax.parallel.programs import compiler_options


def suite_of(case: Case, config: Config) -> Suite:
    """The suite of a case whose steps are through the base. Raises InputError for a setting without
    a base."""
    if not config.base.path:
        raise InputError(f"bench {case.name}: {case.config} must name a base by base.path")
    with tempfile.TemporaryDirectory() as folder:
        return open_suite(config, pathlib.Path(folder))


def encoded(config: Config, tasks: Sequence[Dataset]) -> tuple[int, list[Sequences]]:
    """(the token that fills rows up, each task's examples as the base is asked)."""
    base, too_long = config.base, config.lora.too_long
    tokenizer = load_tokenizer(base.path)
    how = base.max_length, too_long, ends_of(base.path, tokenizer)
    return tokenizer.pad_token_id, [encode(tokenizer, task.train, *how) for task in tasks]


@dataclasses.dataclass(frozen=True)
class Work:
    """The tasks of a case as tokens, and which rows of each the step reads."""

    pad: int  # token id
    tasks: Sequence[Sequences]
    index: Sequence[np.ndarray]  # (rows,) of each task

    @classmethod
    def of(cls, case: Case, config: Config) -> "Work":
        """Raises InputError as `suite_of`, and for fewer tasks than the batch."""
        suite, c = suite_of(case, config), config.lora
        if len(suite.train) < case.batch:
            raise InputError(
                f"bench {case.name}: batch = {case.batch} tasks, the suite of {case.config} trains "
                f"on {len(suite.train)}"
            )
        pad, tasks = encoded(config, suite.train[: case.batch])
        index = [shuffled_rows(len(task), c.batch_size, config.seed, 0) for task in tasks]
        return cls(pad, tasks, index)

    def rows(self, prefix: int) -> dict[str, np.ndarray]:
        """`packed_rows` of all tasks."""
        return packed_rows(self.tasks, self.index, prefix, self.pad)

    def padded(self) -> dict[str, np.ndarray]:
        """`Sequences.batch` of all tasks, as long as the longest, (K, B, ...)."""
        width = max(task.response_width for task in self.tasks)
        rows = [task.batch(at, width) for task, at in zip(self.tasks, self.index, strict=True)]
        length = max(batch["ids"].shape[-1] for batch in rows)
        for batch in rows:
            more = length - batch["ids"].shape[-1]
            batch["ids"] = np.pad(batch["ids"], ((0, 0), (0, more)), constant_values=self.pad)
        return {key: np.stack([batch[key] for batch in rows]) for key in rows[0]}


def operation(case: Case, config: Config, variant: str) -> Callable[[], object]:
    """A function that takes one step of every task. variant: as of case.COLLECTING."""
    lora = dataclasses.replace(config.lora, dtype=case.dtype, remat=variant == "recomputed")
    config = dataclasses.replace(config, lora=lora)
    work, tuning = Work.of(case, config), Tuning.of(config, config.base.path)
    prefix = 0 if variant == "whole rows" else shared_prefix(work.tasks)
    batch = work.padded() if variant == "padded" else work.rows(prefix)
    optimizer, c = lora_optimizer(lora), tuning.module.config
    step = make_collect_step(tuning.module, optimizer, tuning.adapter.scale)
    options = compiler_options(jax.default_backend())
    step = jax.jit(step, donate_argnums=1, compiler_options=options)
    groups = [[k] for k in range(case.batch)] if variant == "one by one" else [range(case.batch)]

    def of(group: Sequence[int]) -> dict[str, jax.Array]:
        return jax.device_put({key: x[np.array(group)] for key, x in batch.items()})

    batches = [of(group) for group in groups]
    shapes = c.lora_shapes(lora.rank, lora.targets)
    states = [first_state(jax.random.key(0), shapes, optimizer, len(g)) for g in groups]

    def run() -> list:
        found = []
        for i, rows in enumerate(batches):
            states[i], metrics = step(tuning.params, states[i], rows)
            found.append(metrics)
        return found

    return run
