"""Settings: a locked ml_collections ConfigDict (configs/*.py) checked once and turned into frozen
dataclasses.

Defaults live in configs/default.py only; the fields below say what each setting means and may be,
`faults` of a section what its fields must be together. docs/METHOD.md's letters: N prompts, L text
length, C embedding width, T tokens, M checkpoints a dataset.
"""

import dataclasses
import re
from typing import Annotated

from dnd_jax.config.choices import AXES, DTYPES, METHODS
from dnd_jax.config.constraints import (
    ODD,
    Amount,
    Count,
    Must,
    Path,
    Positive,
    Rate,
    Rules,
    one_of,
    wholes,
)
from dnd_jax.config.studies import Ablate, Bench, Sweep
from dnd_jax.config.training import Train

Features = tuple[int, int, int]  # (N, L, C)


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen base LLM: a Hugging Face folder or id, a GGUF file, or (path empty) one pretrained
    on the suite's corpus with these sizes."""

    path: Path
    max_length: Positive  # tokens of a question with its answer
    vocab_size: Positive  # at most; the tokenizer is trained on the corpus
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    tie_word_embeddings: bool


EMBEDDED = ("world", "skills", "skills_large")  # suites: dnd_jax/data/embedded.py
PRETRAIN_LOSSES = ("response", "text")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """The training of such a base."""

    # over the "response" of each example, or its whole "text": the prompt, and the response where
    # it has one
    loss: Annotated[str, one_of(*PRETRAIN_LOSSES)]
    steps: Positive
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Amount
    warmup_steps: Count
    save_every: Positive


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA runs, one a dataset; every one of the last `checkpoints` steps is kept."""

    rank: Positive
    alpha: Rate
    targets: Annotated[tuple[str, ...], Must(bool, "must name at least one")]
    steps: Positive
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Amount
    clip: Rate
    checkpoints: Positive  # M
    # an example with more than base.max_length tokens is left out ("skip"), loses the beginning of
    # its prompt ("cut") or ends the run ("refuse"); how many were, of which dataset, is said
    too_long: Annotated[str, one_of("skip", "cut", "refuse")]
    save_every: Positive
    tasks_at_once: Count = 0  # tasks in one step, group after group; 0: as many as have room
    dtype: Annotated[str, one_of(*DTYPES)] = "float32"  # of the base; LoRAs are float32
    remat: bool = False  # the backward pass computes each layer anew: less memory, more time
    # a task ends `checkpoints` steps after the mean loss of so many steps has not fallen by 2% from
    # that of as many before; 0: after `steps`
    flat_window: Count = 0

    def faults(self) -> list[str]:
        """What its fields contradict each other in."""
        if self.checkpoints <= self.steps:
            return []
        return [f"checkpoints = {self.checkpoints} is more than lora.steps = {self.steps}"]


FORMS = ("prompt", "response", "both", "mix")


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the generator is conditioned on: the encoder's hidden states of N prompts."""

    # folder, "package:NAME/FOLDER", hub id or file of word vectors: dnd_jax/encoders/load.py
    encoder: Path
    # of a decoder-only encoder: 0 its embeddings, n the output of block n, -1 the last (after the
    # final norm)
    layer: Annotated[int, Must(lambda n: n >= -1, "must be -1 (the last) or a layer from 0")]
    num_prompts: Positive  # N
    max_text_length: Positive  # L
    # the text of an example: dnd_jax/data/condition_text.py
    form: Annotated[str, one_of(*FORMS)]
    in_graph: bool  # encode inside the train step instead of once ahead of it
    # prompts of more than max_text_length tokens lose their end, and how many do is said; a set
    # that loses what tells tasks apart (dnd_jax/encoders/cut.py) is refused, or taken ("cut")
    too_long: Annotated[str, one_of("refuse", "cut")] = "refuse"
    dtype: Annotated[str, one_of(*DTYPES)] = "float32"  # of the encoder's parameters and states


TARGETS = ("chunk", "element")
LENGTH_PROJECTIONS = ("camera_ready", "first_release")


def _stages(features: tuple) -> bool:
    return len(features) >= 2 and all(wholes(of, 3) and min(of) >= 0 for of in features)


@dataclasses.dataclass(frozen=True)
class Generator:
    """The hyper-convolutional decoder, and the tokens that it makes."""

    # (N, L, C) of each stage; a 0 takes the size from the condition or the token grid
    features: Annotated[
        tuple[Features, ...],
        Must(_stages, "must be at least two (N, L, C) triples of whole numbers"),
    ]
    kernel_size: Annotated[int, ODD]
    length_projection: Annotated[str, one_of("", *LENGTH_PROJECTIONS)]  # "": none
    convolution: Annotated[str, one_of(*METHODS)]
    target: Annotated[str, one_of(*TARGETS)]  # "chunk" is the paper's
    chunk_width: Count  # 0: the greatest common divisor of all LoRA dimensions
    importance: bool  # weight tokens by their spread over checkpoints
    bfloat16_checkpoints: bool  # round checkpoints as the original does


ANSWERS = ("greedy", "likelihood")


@dataclasses.dataclass(frozen=True)
class Controls:
    """What generated adapters have to stand beside; dnd_jax/scoring/results.py says what it is."""

    in_context: Count = 3  # answered examples in the base's context; 0: none of this
    prompts: bool = True  # adapters from random and from empty prompts
    multi_task: bool = True  # ONE LoRA tuned on all training datasets
    learning_rates: tuple[float, ...] = ()  # of which the best is kept; (): lora.learning_rate
    few_shot: bool = True  # LoRAs tuned on a few labelled examples of each unseen dataset
    folder: Path = ""  # of `dnd controls` with another seed; empty: WORKDIR/controls


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The scoring of generated adapters and their competitors."""

    # "greedy" decoding, or "likelihood": the label of the dataset that is most likely
    answers: Annotated[str, Must(lambda a: a in ANSWERS, "is neither greedy nor likelihood")]
    samples: Positive  # S adapters a task, each from its own batch of N prompts
    num_prompts: int  # different ones among these N, each repeated to fill them; 0: all N
    # training adapters, drawn by the seed, for train mean and train best; 0: all, -1: none
    train_adapters: Annotated[int, Must(lambda n: n >= -1, "must be -1 (none), 0 (all) or more")]
    batch_size: Positive
    max_new_tokens: Positive
    dtype: Annotated[str, one_of(*DTYPES)]  # of the base in PyTorch; adapters are float32
    # PyTorch's name of the one that scores; empty: the GPU where there is one
    device: Annotated[
        str,
        Must(
            lambda name: re.fullmatch(r"((cpu|cuda|mps|xpu)(:\d+)?)?", name) is not None,
            "is no device of PyTorch, such as cpu or cuda:1",
        ),
    ]
    # URL of a server that scores in PyTorch's place, such as vLLM's, which sees our folders under
    # the same paths; empty: none
    engine: Annotated[
        str,
        Must(
            lambda url: re.fullmatch(r"(https?://\S+)?", url) is not None,
            "is no URL of a server, such as http://127.0.0.1:8000",
        ),
    ]
    # adapters that it is asked together, each `batch_size` questions at a time: vLLM's --max-loras
    engine_adapters: Positive
    engine_token_file: Path  # a file with the token that it asks for; empty: none
    # answers are free text, such as chains of thought or programs: the tables say that exact match
    # means little, and name `dnd lm-eval`
    free_form: bool
    # measure how well JAX and PyTorch agree: on the files of a given base, once, before LoRAs and a
    # generator are trained; and on answers, when all is scored
    agreement: bool
    overhead: bool  # and what generating an adapter costs against tuning one


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Axis sizes; one of data, fsdp and tensor may be -1. `rules`: as in
    dnd_jax.parallel.rules.shard_by_rules."""

    slices: int  # TPU slices, or groups of hosts, over a slower network; 0: as TPUs report, or one
    data: int
    fsdp: int
    tensor: int
    rules: Annotated[tuple, Rules(AXES)]


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: Count
    suite: Path  # suite folder or JSON file; empty: an embedded one, written into the workdir
    embedded: Annotated[str, one_of(*EMBEDDED)]  # which
    embedded_tasks: Count  # unseen tasks of each kind in it; 0: all
    base: Base
    pretrain: Pretrain
    lora: Lora
    condition: Condition
    generator: Generator
    train: Train
    controls: Controls
    evaluate: Evaluate
    bench: Bench
    mesh: Mesh
    sweep: Sweep
    ablate: Ablate

    def faults(self) -> list[str]:
        """What its sections contradict each other in."""
        asked, most, found = self.evaluate.num_prompts, self.condition.num_prompts, []
        if not 0 <= asked <= most:
            found.append(
                f"evaluate.num_prompts = {asked} must be 1 to condition.num_prompts = {most}, or 0 "
                "for all of them"
            )
        if self.train.few_prompts and most < 3:
            found.append(
                f"train.few_prompts = {self.train.few_prompts} must be 0 with "
                f"condition.num_prompts = {most}, which has no fewer different ones than 2"
            )
        return found

    def to_json(self) -> dict:
        """A JSON-like copy, for records and comparisons."""
        return dataclasses.asdict(self)
