"""What a generator is taught by config.train.objective: the weights of LoRA checkpoints, answers
through the frozen base, those that checkpoints give there, or several."""

import dataclasses
import pathlib
from collections.abc import Collection

import jax
import numpy as np

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.found import find_base
from dnd_jax.base.identity import base_digest
from dnd_jax.base.sequences import Sequences, encode_shown, how_taught
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.workdir import TARGETS
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.generator.answers import Answering
from dnd_jax.generator.folder import read_target
from dnd_jax.lora.checkpoints import Checkpoints, TokenArray, make_target, token_array
from dnd_jax.lora.initial import SPREAD, Initial
from dnd_jax.lora.layout import MODULE_ORDER
from dnd_jax.lora.targets import ElementTarget, Target
from dnd_jax.lora.tuning import Tuning

Source = Checkpoints | Initial
BEHIND_THE_SAME = 16  # questions of a dataset, at most, behind the same answered examples


def source_of(config: Config, suite: Suite, workdir: pathlib.Path, base_name: str = "") -> Source:
    """Where the layout and settings of generated LoRAs come from: the checkpoints that the
    objective is of, or else what LoRAs of the base start from. Raises InputError as these do."""
    if config.train.from_loras:
        return Checkpoints(config, suite, workdir, base_name)
    return Initial(config, find_base(config, workdir), base_name)


def taught_by(config: Config, source: Source, workdir: pathlib.Path) -> dict:
    """What a generator is taught from, besides the suite: digests and the settings that decide."""
    found = {"checkpoints": source.digest()} if isinstance(source, Checkpoints) else {}
    if config.train.through_base:
        base, lora = find_base(config, workdir), dataclasses.asdict(config.lora)
        asked = ("rank", "alpha", "targets", "dtype", "too_long")
        found |= {
            "base": base_digest(base),
            "answer": how_taught(load_tokenizer(base))[0],
            "max_length": config.base.max_length,
            "lora": {key: lora[key] for key in asked},
        }
    return found | ({"spread": SPREAD} if isinstance(source, Initial) else {})


def behind_examples(
    config: Config, dataset: Dataset, questions: Sequences, tokenizer, ends: Collection[int]
) -> Sequences:
    """A dataset's questions, each behind config.train.shots other examples of it with their
    answers. ends: tokens that end an answer of the base. Raises InputError where there are no
    others, where they are too long, and where the template says an answer otherwise behind them."""
    examples, count = dataset.train, config.train.shots
    if questions.cut:
        raise InputError(
            f"{dataset.name}: {questions.cut} questions are cut to base.max_length, which have no "
            "room behind answered examples; set config.lora.too_long=skip or raise that"
        )
    kept = range(len(examples)) if questions.of is None else questions.of.tolist()
    rows_of: dict[tuple, list[int]] = {}  # of each question: none is shown its own answer
    for i in kept:
        rows_of.setdefault((examples[i].prompt, examples[i].system), []).append(i)
    different = list(rows_of.values())
    at_once = min(BEHIND_THE_SAME, len(different) - count)
    if at_once < 1:
        raise InputError(
            f"{dataset.name}: has {len(different)} different questions, and config.train.shots = "
            f"{count} others are to stand before each; lower it or add examples"
        )
    rng, before = np.random.default_rng([config.seed, count, 7]), {}
    order = rng.permutation(len(different))
    for block in np.split(order, range(at_once, len(order), at_once)):
        chosen = rng.choice(np.setdiff1d(order, block), count, replace=False)
        shots = [examples[different[k][0]] for k in chosen]
        before |= {i: shots for k in block for i in different[k]}
    of_each = [examples[i] for i in kept], [before[i] for i in kept]
    shown = encode_shown(tokenizer, *of_each, config.base.max_length, ends)
    for i, asked, behind in zip(kept, questions.answers(), shown.answers(), strict=True):
        if not np.array_equal(asked, behind):
            raise InputError(
                f"{examples[i].where}: the base's template says its response otherwise behind "
                "answered examples, so that neither can be distilled into the other; set "
                "config.train.shots=0"
            )
    return shown


class Objective:
    """What each training dataset teaches, and through which base."""

    def __init__(self, config: Config, source: Source, workdir: pathlib.Path, base_name: str = ""):
        """Loads the base where it is asked. base_name: what adapters call it."""
        self._config, self._source, self._cache = config, source, workdir / TARGETS
        self.tuning = None  # the base, where it is asked
        if config.train.asks_base:
            self.tuning = Tuning.of(config, find_base(config, workdir), base_name)
        self._asks = config.train.through_base

    def target(self) -> Target:
        """What the decoder learns to output. Where training goes on from a generator of an element
        target, what that one does: its parameters mean nothing by other statistics. Raises
        InputError for one of other LoRAs."""
        source, start = self._source, self._config.train.init_from
        if start:
            target, adapter = read_target(start)
            if (target.layout, adapter.scale) != (source.layout, source.adapter.scale):
                raise InputError(
                    f"config.train.init_from = {start}: its LoRAs have other modules, shapes or "
                    "scale; give its config.lora (rank, alpha, targets), base and "
                    "generator.chunk_width"
                )
            if isinstance(target, ElementTarget):
                return target
        if isinstance(source, Checkpoints):
            return make_target(self._config, source, self._cache)
        return source.target()

    def tokens(self, name: str, target: Target) -> TokenArray | None:
        """The tokens of a dataset's checkpoints, if the loss needs them."""
        if isinstance(self._source, Initial):
            return None
        weighted = self._config.generator.importance
        return token_array(self._source, name, target, self._cache, weighted)

    def questions(self, dataset: Dataset) -> Sequences | None:
        """A dataset's examples as the base is asked, if any are."""
        if not self._asks:
            return None
        return self.tuning.encoded(dataset.train, f"{dataset.name}'s train")

    def shown(self, dataset: Dataset, questions: Sequences | None) -> Sequences | None:
        """The questions behind answered examples, if these are distilled: `behind_examples`."""
        if questions is None or not self._config.train.shots:
            return None
        tuning = self.tuning
        return behind_examples(self._config, dataset, questions, tuning.tokenizer, tuning.ends)

    @property
    def asked(self) -> tuple[int, int]:
        """(questions of a generated LoRA in a step, the token that fills rows up); no question
        where the loss is not through the base."""
        if not self._asks:
            return 0, 0
        return self._config.train.answer_rows, self.tuning.tokenizer.pad_token_id

    @property
    def scale(self) -> float:
        """Of generated LoRAs in the base."""
        return self._source.adapter.scale

    def check_applied(self, target: Target) -> None:
        """Raises InputError for LoRAs on more than the projections that our base applies."""
        layout = target.layout
        applied = self.tuning.module.config.lora_shapes(layout.rank, MODULE_ORDER)
        others = [m.key for m in layout.matrices if applied.get(m.key) != m.shape]
        if others:
            raise listed(
                "the base is not asked through these LoRA matrices (train.objective, "
                "train.validate_every)",
                others,
            )

    def answering(
        self, target: Target, over_tasks: jax.sharding.NamedSharding
    ) -> tuple[Answering, dict] | None:
        """(the base that is asked, {"base": its parameters, "target"}), if the loss is through it.
        Raises InputError as `check_applied`."""
        if not self._asks:
            return None
        self.check_applied(target)
        answering = Answering(self.tuning.module, self.scale, over_tasks)
        return answering, {"base": self.tuning.params, "target": target}
