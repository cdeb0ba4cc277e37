"""Settings: a locked ml_collections ConfigDict (configs/*.py) checked once and turned into frozen dataclasses.

Defaults live in configs/default.py only; the fields below say what each setting means. METHOD.md's letters: N prompts, L text
length, C embedding width, T tokens, M checkpoints a dataset.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import typing
from collections.abc import Mapping

import ml_collections

from dnd_jax.errors import InputError, listed
from dnd_jax.forms import FORMS
from dnd_jax.models.base_lm import LmConfig
from dnd_jax.models.generator import LENGTH_PROJECTIONS
from dnd_jax.models.hyperconv import REMAT, Features
from dnd_jax.ops import METHODS

TARGETS = ("chunk", "element")
OPTIMIZERS = ("adamw", "adamw_bfloat16_moment", "adafactor")
PRETRAIN_LOSSES = ("response", "text")
TRACKERS = ("tensorboard", "wandb")
PAIRINGS = ("random", "fixed")


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen base LLM: a Hugging Face folder or id, or (path empty) one pretrained on the suite's corpus with these sizes."""

    path: str
    max_length: int  # tokens of a question with its answer
    vocab_size: int  # at most; the tokenizer is trained on the corpus
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool

    def lm_config(self, vocab_size: int) -> LmConfig:
        """The architecture of a base to pretrain."""
        names = {f.name for f in dataclasses.fields(LmConfig)} & {f.name for f in dataclasses.fields(self)}
        return LmConfig(**{name: getattr(self, name) for name in names} | {"vocab_size": vocab_size})


@dataclasses.dataclass(frozen=True)
class Pretrain:
    loss: str  # over the "response" of each example, or its whole "text": the prompt, and the response where it has one
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    save_every: int


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA runs, one a dataset; every one of the last `checkpoints` steps is kept."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    clip: float
    checkpoints: int  # M
    save_every: int


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the generator is conditioned on: the encoder's hidden states of N prompts."""

    encoder: str  # folder, "package:NAME/FOLDER", hub id or file of word vectors: dnd_jax/models/text_encoder.py
    layer: int  # of a decoder-only encoder: 0 its embeddings, n the output of block n, -1 the last (after the final norm)
    num_prompts: int  # N
    max_text_length: int  # L
    form: str  # the text of an example: "prompt", "response", "both" or "mix", dnd_jax/forms.py
    in_graph: bool  # encode inside the train step instead of once ahead of it


@dataclasses.dataclass(frozen=True)
class Generator:
    features: tuple[Features, ...]  # (N, L, C) of each stage; a 0 takes the size from the condition or the token grid
    kernel_size: int
    length_projection: str  # "", "camera_ready" or "first_release"
    convolution: str  # "auto", "direct", "dft" or "tuned": dnd_jax/ops/convolution.py
    target: str  # "chunk" (the paper's) or "element"
    chunk_width: int  # 0: the greatest common divisor of all LoRA dimensions
    importance: bool  # weight tokens by their spread over checkpoints
    bfloat16_checkpoints: bool  # round checkpoints as the original does


@dataclasses.dataclass(frozen=True)
class Train:
    checkpoints: str  # folder of DATASET/*/adapter_model.safetensors or DATASET/N.safetensors; empty: the workdir's own
    init_from: str  # a generator folder whose parameters training starts from; empty: new ones
    datasets: int  # of the suite's training datasets, drawn by the seed; 0: all
    pairing: str  # "random": a checkpoint meets N new prompts each time; "fixed": always the same N
    steps: int
    batch_size: int
    micro_batches: int  # parts of a batch computed one after the other; their gradients are added up
    learning_rate: float
    weight_decay: float
    clip: float
    warmup_steps: int
    condition_noise: float  # standard deviation
    target_noise: float
    dtype: str  # of the computation; parameters stay float32
    remat: str  # what the backward pass computes again: "none", "convolutions" (all but their outputs) or "stages"
    optimizer: str  # "adamw", "adamw_bfloat16_moment" (three quarters of its state) or "adafactor" (nearly none)
    save_every: int
    keep_last: int  # checkpoints of the run that stay
    keep_every: int  # and every one at a multiple of this step; 0: none
    checkpoint_dir: str  # a folder or gs:// address; empty: in the workdir
    trackers: tuple[str, ...]  # "tensorboard", "wandb", beside metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Evaluate:
    answers: str  # "greedy" decoding, or "likelihood": the label of the dataset that is most likely
    samples: int  # S adapters a task, each from its own batch of N prompts
    num_prompts: int  # different ones among these N, each repeated to fill them; 0: all N
    batch_size: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Bench:
    """`dnd bench`. cases: (name, config file, what, batch, dtype, first stage, last stage) as Case in dnd_jax/bench/case.py, the
    last two may be left out; none: this configuration's own forward, train and generate."""

    cases: tuple
    methods: tuple  # ours, of generator.convolution
    torch: tuple  # of dnd_jax/bench/torch_worker.py's VARIANTS
    repeats: int  # timed runs in one process
    rounds: int  # processes a variant, one variant after the other


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Axis sizes; one of data, fsdp and tensor may be -1. `rules`: as in dnd_jax.sharding.shard_by_rules."""

    slices: int  # TPU slices, or groups of hosts, over a slower network; 0: as the devices report
    data: int
    fsdp: int
    tensor: int
    rules: tuple


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`dnd plan --sweep`: every combination of these is compiled; an empty list takes the configuration's own value."""

    topologies: tuple[str, ...]  # such as "v5p:2x2x2"; none: this machine's devices
    meshes: tuple  # (data, fsdp, tensor) or (slices, data, fsdp, tensor)
    rules: tuple  # whole lists of rules
    remat: tuple[str, ...]
    batches: tuple[int, ...]  # samples of a step; below 0: of each device
    micro_batches: tuple[int, ...]
    methods: tuple[str, ...]
    steps: tuple[str, ...]  # "train", "generate"


@dataclasses.dataclass(frozen=True)
class Ablate:
    """`dnd ablate`: the runs to compare with the configuration's own, in terms of dotted keys such as "train.pairing"."""

    axes: tuple  # (key, (value, ...)) each; every combination of their values is a variant
    variants: tuple  # (name, {key: value, ...}) each, after those of the axes


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    suite: str  # suite folder or JSON file; empty: the embedded one, written into the workdir
    base: Base
    pretrain: Pretrain
    lora: Lora
    condition: Condition
    generator: Generator
    train: Train
    evaluate: Evaluate
    bench: Bench
    mesh: Mesh
    sweep: Sweep
    ablate: Ablate

    def to_json(self) -> dict:
        """A JSON-like copy, for records and comparisons."""
        return dataclasses.asdict(self)


def freeze(config: ml_collections.ConfigDict | Mapping) -> Config:
    """Checks a whole configuration and returns it frozen.

    Raises InputError that lists every unknown key (with the nearest known one), missing key, wrong type and impossible value.
    """
    faults: list[str] = []
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    frozen = _freeze(Config, raw, "config", faults)
    if not faults:
        faults = _impossible(frozen)
    if faults:
        raise listed("configuration", faults)
    return frozen


def _freeze(cls: type, raw: Mapping, path: str, faults: list[str]):
    types = typing.get_type_hints(cls)
    for key in raw.keys() - types.keys():
        near = difflib.get_close_matches(key, types, n=1)
        faults.append(f"{path}.{key} is unknown" + (f"; did you mean {near[0]}?" if near else ""))
    values = {}
    for key, kind in types.items():
        if key not in raw:
            faults.append(f"{path}.{key} is missing")
        elif dataclasses.is_dataclass(kind):
            values[key] = _freeze(kind, raw[key], f"{path}.{key}", faults)
        else:
            value, plain = raw[key], typing.get_origin(kind) or kind
            if plain is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if plain is tuple and isinstance(value, list | tuple):
                value = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
            if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
                faults.append(f"{path}.{key} = {value!r} should be {plain.__name__}")
            values[key] = value
    return cls(**values) if len(values) == len(types) and not any(v is None for v in values.values()) else None


def _impossible(c: Config) -> list[str]:
    """Values that no run can have, each with its key."""
    faults = []

    def need(key: str, holds: bool, what: str):
        if not holds:
            value = c
            for part in key.split("."):
                value = getattr(value, part)
            faults.append(f"config.{key} = {value!r} {what}")

    positive = (
        "base.max_length pretrain.steps pretrain.batch_size pretrain.save_every lora.rank lora.steps lora.batch_size "
        "lora.save_every lora.checkpoints condition.num_prompts condition.max_text_length train.steps train.batch_size "
        "train.micro_batches train.save_every train.keep_last "
        "evaluate.samples evaluate.batch_size evaluate.max_new_tokens bench.repeats bench.rounds"
    )
    for key in positive.split():
        section, name = key.split(".")
        need(key, getattr(getattr(c, section), name) >= 1, "must be at least 1")
    for key in ("pretrain", "lora", "train"):
        need(f"{key}.learning_rate", getattr(c, key).learning_rate > 0, "must be above 0")
    need("pretrain.loss", c.pretrain.loss in PRETRAIN_LOSSES, f"is none of {PRETRAIN_LOSSES}")
    need("seed", c.seed >= 0, "must not be negative")
    need("condition.layer", c.condition.layer >= -1, "must be -1 (the last) or a layer from 0")
    need("lora.checkpoints", c.lora.checkpoints <= c.lora.steps, f"is more than lora.steps = {c.lora.steps}")
    need("condition.form", c.condition.form in FORMS, f"is none of {FORMS}")
    need("evaluate.answers", c.evaluate.answers in ("greedy", "likelihood"), "is neither greedy nor likelihood")
    g = c.generator
    need("generator.kernel_size", g.kernel_size % 2 == 1 and g.kernel_size > 0, "must be odd")
    need("generator.target", g.target in TARGETS, f"is none of {TARGETS}")
    need("generator.length_projection", g.length_projection in ("", *LENGTH_PROJECTIONS), f"is none of {('', *LENGTH_PROJECTIONS)}")
    need("generator.convolution", g.convolution in METHODS, f"is none of {METHODS}")
    need("generator.chunk_width", g.chunk_width >= 0, "must not be negative (0 derives it)")
    need(
        "generator.features",
        len(g.features) >= 2 and all(isinstance(f, tuple) and len(f) == 3 and min(f) >= 0 for f in g.features),
        "must be at least two (N, L, C) triples",
    )
    t = c.train
    need("train.datasets", t.datasets >= 2 or t.datasets == 0, "must be at least 2, or 0 for all")
    need("train.pairing", t.pairing in PAIRINGS, f"is none of {PAIRINGS}")
    few = 0 <= c.evaluate.num_prompts <= c.condition.num_prompts
    need("evaluate.num_prompts", few, f"must be 1 to condition.num_prompts = {c.condition.num_prompts}, or 0 for all of them")
    need("train.remat", t.remat in REMAT, f"is none of {REMAT}")
    need("train.optimizer", t.optimizer in OPTIMIZERS, f"is none of {OPTIMIZERS}")
    need("train.trackers", set(t.trackers) <= set(TRACKERS), f"has more than {TRACKERS}")
    need("train.keep_every", t.keep_every >= 0, "must not be negative (0 keeps none)")
    divides = t.micro_batches >= 1 and t.batch_size % t.micro_batches == 0
    need("train.micro_batches", divides, f"does not divide train.batch_size = {t.batch_size}")
    need("train.dtype", c.train.dtype in ("float32", "bfloat16", "float64"), "is none of float32, bfloat16, float64")
    return faults


def load_file(path: str) -> ml_collections.ConfigDict:
    """The ConfigDict of a config file (`get_config()`). A relative path is also looked for beside the dnd_jax package."""
    spec = importlib.util.spec_from_file_location("dnd_config", find_file(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def find_file(path: str) -> str:
    """`path` itself, or the same path beside the installed package (configs/ ships with it). Raises InputError if absent."""
    for candidate in (pathlib.Path(path), pathlib.Path(__file__).parent.parent / path):
        if candidate.is_file():
            return str(candidate)
    raise InputError(f"{path}: no such config file")
