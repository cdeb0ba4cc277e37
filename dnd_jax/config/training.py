"""Settings of the generator's training: the section `train` of schema.py."""

import dataclasses
from typing import Annotated

from dnd_jax.config.choices import DTYPES, PRECISIONS, REMAT
from dnd_jax.config.constraints import (
    NOT_NEGATIVE,
    PATH,
    Amount,
    Below1,
    Count,
    Must,
    Path,
    Positive,
    Rate,
    one_of,
    some_of,
)

PAIRINGS = ("random", "fixed")
FEWEST = 2  # different prompts of a pair by train.few_prompts
OBJECTIVES = ("weights", "answers", "distill", "weights+answers", "weights+distill")
ASKING = {"answers", "distill"}  # of these: through the base
OF_LORAS = {"weights": "target", "distill": "teacher"}  # and of checkpoints: a batch's tokens
TARGETS_ON = ("auto", "devices", "host")
OPTIMIZERS = ("adamw", "adamw_bfloat16_moment", "adafactor")
TRACKERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class Train:
    """The generator's training."""

    # folder of DATASET/*/adapter_model.safetensors or DATASET/N.safetensors; empty: the workdir's
    # own
    checkpoints: Path
    init_from: Path  # a generator folder whose parameters training starts from; empty: new ones
    # of the suite's training datasets, drawn by the seed; 0: all
    datasets: Annotated[int, Must(lambda n: n >= 2 or n == 0, "must be at least 2, or 0 for all")]
    # "random": a checkpoint meets N new prompts each time; "fixed": always the same N
    pairing: Annotated[str, one_of(*PAIRINGS)]
    # share of the pairs whose N prompts are of fewer different ones, 2 to N - 1, so that a draw
    # in which few prompts tell a part of the task is no surprise; 0: the paper
    few_prompts: Annotated[float, Must(lambda x: 0 <= x <= 1, "must lie in 0 to 1")]
    # what the loss is of: "weights" of LoRA checkpoints (the paper); "answers" through the frozen
    # base with the generated LoRA; "distill": there, as the base with a checkpoint of the task has
    # them; or a sum
    objective: Annotated[str, one_of(*OBJECTIVES)]
    shots: Count  # of "distill": answered examples that the base reads, in place of a checkpoint
    weights_first: Count  # steps on weights alone, before those on the objective
    weights_share: Amount  # factor of the loss on weights in a sum
    # where LoRA checkpoints are read from in a step: they stay on the "devices", each with its part
    # of all, or the "host" reads and sends them; "auto": on devices where they take an eighth of
    # their room at most
    targets_on: Annotated[str, one_of(*TARGETS_ON)]
    answer_rows: Positive  # questions of its task that each generated LoRA is asked in a step
    steps: Positive
    batch_size: Positive
    # parts of a batch computed one after the other; their gradients are added up
    micro_batches: Positive
    learning_rate: Rate
    weight_decay: Amount
    clip: Rate
    warmup_steps: Count
    average_decay: Below1  # of a moving average of the parameters, the generator then; 0: none
    condition_dropout: Below1  # share of the prompts' tokens that a step does not show the decoder
    # factors of two more losses of generated LoRAs, 0: none. How far the norm of BA lies from the
    # LoRA checkpoints' in each module; how far apart two sets of prompts of one task lead, of which
    # all samples of a step then have the two
    size_weight: Amount
    wording_weight: Amount
    condition_noise: Amount  # standard deviation
    target_noise: Amount
    dtype: Annotated[str, one_of(*DTYPES)]  # of the computation; parameters stay float32
    precision: Annotated[str, one_of(*PRECISIONS)]  # of products of float32, by the chip's units
    # on a GPU, the same bits from the same steps and batches, at the price of slower operations; a
    # CPU and a TPU give them anyway
    deterministic: bool
    # what the backward pass computes again: nothing; all but the convolutions' outputs; all of a
    # stage but its input
    remat: Annotated[str, one_of(*REMAT)]
    # "adamw_bfloat16_moment" keeps three quarters of adamw's state, "adafactor" nearly none
    optimizer: Annotated[str, one_of(*OPTIMIZERS)]
    # steps between scores of generated LoRAs on held-out rows of training datasets, through the
    # base; nothing is chosen by them; 0: none
    validate_every: Annotated[int, Must(NOT_NEGATIVE.holds, "must not be negative (0 scores none)")]
    save_every: Positive
    save_every_seconds: Count  # besides, so long after the last save; 0: by steps alone
    keep_last: Positive  # checkpoints of the run that stay
    # and every one at a multiple of this step
    keep_every: Annotated[int, Must(NOT_NEGATIVE.holds, "must not be negative (0 keeps none)")]
    checkpoint_dir: Path  # a folder or gs:// address; empty: in the workdir
    # a folder on each host's own disk or in its memory, for copies of the state between
    # checkpoints; empty: none
    local_dir: Annotated[str, PATH, Must(lambda x: "://" not in x, "must be a folder of each host")]
    local_every_seconds: Positive  # so long after the last save or copy
    trackers: Annotated[tuple[str, ...], some_of(*TRACKERS)]  # beside metrics.jsonl

    def taught_at(self, step: int) -> tuple[str, ...]:
        """The parts of a step's loss: "weights", "answers", "distill"."""
        return ("weights",) if step < self.weights_first else tuple(self.objective.split("+"))

    @property
    def asks_base(self) -> bool:
        """Whether training needs the base."""
        return self.through_base or self.validate_every > 0

    @property
    def through_base(self) -> bool:
        """Whether the loss of any step is through the base."""
        return bool(ASKING & {*self.taught})

    @property
    def from_loras(self) -> bool:
        """Whether the loss of any step needs LoRA checkpoints."""
        return bool(self.of_loras.keys() & {*self.taught}) or self.size_weight > 0

    @property
    def wordings(self) -> int:
        """Sets of prompts of each task in a step."""
        return 2 if self.wording_weight else 1

    @property
    def of_loras(self) -> dict[str, str]:
        """{part of a loss that needs LoRA checkpoints: what a batch calls their tokens}."""
        return {"weights": OF_LORAS["weights"]} if self.shots else OF_LORAS

    @property
    def taught(self) -> tuple[str, ...]:
        """What the loss of any step is of."""
        return tuple(dict.fromkeys((*self.taught_at(0), *self.taught_at(self.weights_first))))

    def faults(self) -> list[str]:
        """What its fields contradict each other in."""
        wrong = []
        if self.batch_size % self.micro_batches:
            whole = f"train.batch_size = {self.batch_size}"
            wrong.append(f"micro_batches = {self.micro_batches} does not divide {whole}")
        if self.wording_weight and (odd := self.batch_size // self.micro_batches) % self.wordings:
            wrong.append(
                f"wording_weight = {self.wording_weight} takes samples by two, and train.batch_size"
                f" / train.micro_batches = {odd} is odd"
            )
        if self.wording_weight and self.pairing == "fixed":
            wrong.append(
                f"wording_weight = {self.wording_weight} draws two sets of prompts for a LoRA "
                "checkpoint, which train.pairing = fixed has one of; must be 0"
            )
        if self.weights_first and not self.through_base:
            wrong.append(
                f"weights_first = {self.weights_first} must be 0 with train.objective = "
                f"{self.objective}, all of whose steps are on weights"
            )
        if self.shots and "distill" not in self.taught:
            ours = f"train.objective = {self.objective}"
            wrong.append(f"shots = {self.shots} must be 0 with {ours}, which distills nothing")
        if self.pairing == "fixed" and not self.from_loras:
            wrong.append(
                "pairing = fixed pairs prompts with LoRA checkpoints, of which train.objective = "
                f"{self.objective}{' with shots' * bool(self.shots)} has none; must be random"
            )
        if self.weights_first >= self.steps:
            wrong.append(
                f"weights_first = {self.weights_first} must be fewer than train.steps = "
                f"{self.steps}"
            )
        return wrong
