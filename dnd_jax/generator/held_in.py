"""How generated LoRAs answer questions held out of the training datasets, while the generator is
trained (docs/METHOD.md section 6). Unseen datasets have no part in it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dnd_jax.base.sequences import Sequences
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import Dataset
from dnd_jax.generator.objective import Objective
from dnd_jax.generator.pairs import PairedDataset
from dnd_jax.generator.step import ShardedStep
from dnd_jax.lora.scores import score_loras
from dnd_jax.lora.targets import Target
from dnd_jax.lora.tuning import Tuning
from dnd_jax.parallel import hosts
from dnd_jax.parallel.placement import batch_ways
from dnd_jax.parallel.rules import leading

DATASETS, QUESTIONS = 4, 32  # at most: of so many training datasets so many questions each


@dataclasses.dataclass(frozen=True)
class HeldIn:
    """What is asked, the same all along a run.

    questions: of each dataset. tokens: the generator's parameters -> tokens (B, T, h, w) by N
    prompts of each dataset, and some more that fill up the batch. scale: of LoRAs in the base.
    at_once: questions, as many as the train step asks.
    """

    questions: Sequence[Sequences]
    tokens: Callable[[Any], jax.Array]
    target: Target
    tuning: Tuning
    scale: float
    at_once: int

    def score(self, state: Mapping) -> dict[str, np.float32]:
        """{"held_in_exact": share of the answers whose every token is the most likely one,
        "held_in_loss": their mean cross-entropy}, in the mean over the datasets, of the generator
        that would be written now."""
        tokens = hosts.to_all_hosts(self.tokens(state.get("average", state["params"])))
        tokens = tokens[: len(self.questions)]
        loras = [self.target.decode(of_one) for of_one in tokens]
        stacked = {key: np.stack([lora[key] for lora in loras]) for key in loras[0]}
        base = self.tuning.module, self.tuning.params
        found = score_loras(*base, stacked, self.scale, self.questions, self.at_once)
        means = np.mean(found, axis=0)  # (loss, exact)
        return {"held_in_loss": np.float32(means[0]), "held_in_exact": np.float32(means[1])}


def held_in(
    config: Config,
    training: Sequence[Dataset],
    paired: Sequence[PairedDataset],
    objective: Objective,
    target: Target,
    sharded: ShardedStep,
    frozen: Mapping,
) -> HeldIn | None:
    """What config.train.validate_every asks for, if anything; datasets and prompts are drawn by the
    seed. Raises InputError where no training dataset has test rows, or the base does not apply such
    LoRAs."""
    if not config.train.validate_every:
        return None
    objective.check_applied(target)
    rng = np.random.default_rng([config.seed, len(training), 5])
    some = [i for i in rng.permutation(len(training)).tolist() if training[i].test][:DATASETS]
    if not some:
        raise InputError(
            "config.train.validate_every: no training dataset of the suite has test rows to score; "
            "give it some, or 0"
        )
    mesh, n = sharded.over_batch.mesh, config.condition.num_prompts
    ways, tuning = batch_ways(mesh), objective.tuning
    drawn = [np.sort(rng.choice(paired[i].num_prompts, n, replace=False)) for i in some]
    filled = [k % len(some) for k in range(-(-len(some) // ways) * ways)]
    where, inputs = leading(mesh, len(filled), "the adapters"), {}
    for key in paired[0].prompts:
        of_each = [paired[i].prompts[key][at] for i, at in zip(some, drawn, strict=True)]
        whole = np.stack([of_each[k] for k in filled])
        inputs[key] = jax.make_array_from_callback(whole.shape, where, whole.__getitem__)
    questions = [
        tuning.encoded(training[i].test[:QUESTIONS], f"{training[i].name}'s test") for i in some
    ]

    def tokens(params):
        return sharded.tokens(params, inputs, frozen or None)

    how = tuning, objective.scale, config.train.answer_rows
    return HeldIn(questions, tokens, target, *how)
