"""Settings: a locked ml_collections ConfigDict (configs/*.py) checked once and turned into frozen
dataclasses.

Defaults live in configs/default.py only; the fields below say what each setting means.
docs/METHOD.md's letters: N prompts, L text length, C embedding width, T tokens, M checkpoints a
dataset.
"""

import dataclasses
import functools
import re
from typing import Any

TARGETS = ("chunk", "element")
OPTIMIZERS = ("adamw", "adamw_bfloat16_moment", "adafactor")
PRETRAIN_LOSSES = ("response", "text")
TRACKERS = ("tensorboard", "wandb")
PAIRINGS = ("random", "fixed")
DTYPES = ("float32", "bfloat16")
FORMS = ("prompt", "response", "both", "mix")
LENGTH_PROJECTIONS = ("camera_ready", "first_release")
Features = tuple[int, int, int]  # (N, L, C)
# What the backward pass finds kept of a stage, and what it computes again: nothing; all but the
# convolutions' outputs; all but its input.
REMAT = ("none", "convolutions", "stages")
AXES = ("slice", "data", "fsdp", "tensor")  # from the slowest network to the fastest
METHODS = ("auto", "direct", "dft", "tuned")
STEPS = ("train", "generate")  # what `dnd plan` compiles


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen base LLM: a Hugging Face folder or id, or (path empty) one pretrained on the
    suite's corpus with these sizes."""

    path: str
    max_length: int  # tokens of a question with its answer
    vocab_size: int  # at most; the tokenizer is trained on the corpus
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True)
class Pretrain:
    # over the "response" of each example, or its whole "text": the prompt, and the response where
    # it has one
    loss: str
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

    # folder, "package:NAME/FOLDER", hub id or file of word vectors: dnd_jax/encoders/load.py
    encoder: str
    # of a decoder-only encoder: 0 its embeddings, n the output of block n, -1 the last (after the
    # final norm)
    layer: int
    num_prompts: int  # N
    max_text_length: int  # L
    # the text of an example: "prompt", "response", "both" or "mix", dnd_jax/data/condition_text.py
    form: str
    in_graph: bool  # encode inside the train step instead of once ahead of it


@dataclasses.dataclass(frozen=True)
class Generator:
    features: tuple[
        Features, ...
    ]  # (N, L, C) of each stage; a 0 takes the size from the condition or the token grid
    kernel_size: int
    length_projection: str  # "", "camera_ready" or "first_release"
    convolution: str  # "auto", "direct", "dft" or "tuned": dnd_jax/ops/convolution.py
    target: str  # "chunk" (the paper's) or "element"
    chunk_width: int  # 0: the greatest common divisor of all LoRA dimensions
    importance: bool  # weight tokens by their spread over checkpoints
    bfloat16_checkpoints: bool  # round checkpoints as the original does


@dataclasses.dataclass(frozen=True)
class Train:
    # folder of DATASET/*/adapter_model.safetensors or DATASET/N.safetensors; empty: the workdir's
    # own
    checkpoints: str
    init_from: str  # a generator folder whose parameters training starts from; empty: new ones
    datasets: int  # of the suite's training datasets, drawn by the seed; 0: all
    pairing: str  # "random": a checkpoint meets N new prompts each time; "fixed": always the same N
    steps: int
    batch_size: int
    micro_batches: (
        int  # parts of a batch computed one after the other; their gradients are added up
    )
    learning_rate: float
    weight_decay: float
    clip: float
    warmup_steps: int
    condition_noise: float  # standard deviation
    target_noise: float
    dtype: str  # of the computation; parameters stay float32
    # what the backward pass computes again: "none", "convolutions" (all but their outputs) or
    # "stages"
    remat: str
    # "adamw", "adamw_bfloat16_moment" (three quarters of its state) or "adafactor" (nearly none)
    optimizer: str
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
    """`dnd bench`. cases: (name, config file, what, batch, dtype, first stage, last stage) as Case
    in dnd_jax/costs/bench/case.py, the last two may be left out; none: this configuration's own
    forward, train and generate."""

    cases: tuple
    methods: tuple  # ours, of generator.convolution
    torch: tuple  # of dnd_jax/costs/bench/torch_worker.py's VARIANTS
    repeats: int  # timed runs in one process
    rounds: int  # processes a variant, one variant after the other


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Axis sizes; one of data, fsdp and tensor may be -1. `rules`: as in
    dnd_jax.parallel.rules.shard_by_rules."""

    slices: int  # TPU slices, or groups of hosts, over a slower network; 0: as the devices report
    data: int
    fsdp: int
    tensor: int
    rules: tuple


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`dnd plan --sweep`: every combination of these is compiled; an empty list takes the
    configuration's own value."""

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
    """`dnd ablate`: the runs to compare with the configuration's own, in terms of dotted keys such
    as "train.pairing"."""

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


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rule_faults(key: str, rules: Any) -> list[str]:
    """What is wrong with sharding rules, rule by rule."""
    faults = []
    for rule in rules if isinstance(rules, tuple) else (rules,):
        if not (
            isinstance(rule, tuple)
            and len(rule) == 2
            and isinstance(rule[0], str)
            and isinstance(rule[1], tuple)
        ):
            faults.append(f"config.{key}: {rule!r} is not (pattern, (axis, ...))")
            continue
        pattern, entries = rule
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"config.{key}: {pattern!r} is no regular expression ({error})")
        axes = [
            a
            for entry in entries
            for a in (entry if isinstance(entry, tuple) else (entry,))
            if a is not None
        ]
        if any(a not in AXES for a in axes) or len(set(axes)) < len(axes):
            faults.append(f"config.{key}: {rule!r} should name axes of {AXES}, each once, or None")
    return faults


def _impossible(c: Config) -> list[str]:
    """Values that no run can have, each with its key."""
    faults = []

    def need(key: str, holds: bool, what: str):
        if not holds:
            faults.append(f"config.{key} = {functools.reduce(getattr, key.split('.'), c)!r} {what}")

    positive = (
        "base.max_length base.vocab_size base.hidden_size base.intermediate_size "
        "base.num_hidden_layers "
        "base.num_attention_heads base.num_key_value_heads pretrain.steps pretrain.batch_size "
        "pretrain.save_every lora.rank "
        "lora.steps lora.batch_size lora.save_every lora.checkpoints condition.num_prompts "
        "condition.max_text_length "
        "train.steps train.batch_size train.micro_batches train.save_every train.keep_last "
        "evaluate.samples evaluate.batch_size evaluate.max_new_tokens bench.repeats bench.rounds"
    )
    above = "pretrain.learning_rate lora.learning_rate train.learning_rate lora.alpha lora.clip train.clip"
    from_0 = (
        "seed generator.chunk_width pretrain.warmup_steps train.warmup_steps "
        "pretrain.weight_decay lora.weight_decay "
        "train.weight_decay train.condition_noise train.target_noise"
    )
    for keys, holds, what in (
        (positive, lambda x: x >= 1, "must be at least 1"),
        (above, lambda x: x > 0, "must be above 0"),
        (from_0, lambda x: x >= 0, "must not be negative"),
    ):
        for key in keys.split():
            need(key, holds(functools.reduce(getattr, key.split("."), c)), what)
    need("pretrain.loss", c.pretrain.loss in PRETRAIN_LOSSES, f"is none of {PRETRAIN_LOSSES}")
    need("condition.layer", c.condition.layer >= -1, "must be -1 (the last) or a layer from 0")
    need(
        "lora.checkpoints",
        c.lora.checkpoints <= c.lora.steps,
        f"is more than lora.steps = {c.lora.steps}",
    )
    need("condition.form", c.condition.form in FORMS, f"is none of {FORMS}")
    need(
        "evaluate.answers",
        c.evaluate.answers in ("greedy", "likelihood"),
        "is neither greedy nor likelihood",
    )
    g = c.generator
    need("generator.kernel_size", g.kernel_size % 2 == 1 and g.kernel_size > 0, "must be odd")
    need("generator.target", g.target in TARGETS, f"is none of {TARGETS}")
    need(
        "generator.length_projection",
        g.length_projection in ("", *LENGTH_PROJECTIONS),
        f"is none of {('', *LENGTH_PROJECTIONS)}",
    )
    need("generator.convolution", g.convolution in METHODS, f"is none of {METHODS}")
    triples = all(
        isinstance(f, tuple) and len(f) == 3 and all(_whole(x) and x >= 0 for x in f)
        for f in g.features
    )
    need(
        "generator.features",
        triples and len(g.features) >= 2,
        "must be at least two (N, L, C) triples of whole numbers",
    )
    t = c.train
    need("train.datasets", t.datasets >= 2 or t.datasets == 0, "must be at least 2, or 0 for all")
    need("train.pairing", t.pairing in PAIRINGS, f"is none of {PAIRINGS}")
    few = 0 <= c.evaluate.num_prompts <= c.condition.num_prompts
    need(
        "evaluate.num_prompts",
        few,
        f"must be 1 to condition.num_prompts = {c.condition.num_prompts}, or 0 for all of them",
    )
    need("train.remat", t.remat in REMAT, f"is none of {REMAT}")
    need("train.optimizer", t.optimizer in OPTIMIZERS, f"is none of {OPTIMIZERS}")
    need("train.trackers", set(t.trackers) <= set(TRACKERS), f"has more than {TRACKERS}")
    need("train.keep_every", t.keep_every >= 0, "must not be negative (0 keeps none)")
    divides = t.micro_batches >= 1 and t.batch_size % t.micro_batches == 0
    need("train.micro_batches", divides, f"does not divide train.batch_size = {t.batch_size}")
    need("train.dtype", t.dtype in DTYPES, f"is none of {DTYPES}")
    s = c.sweep
    meshes = all(
        isinstance(mesh, tuple) and len(mesh) in (3, 4) and all(map(_whole, mesh))
        for mesh in s.meshes
    )
    need("sweep.meshes", meshes, "must hold (data, fsdp, tensor) or (slices, data, fsdp, tensor)")
    need("sweep.batches", 0 not in s.batches, "must not hold 0")
    need(
        "sweep.micro_batches",
        all(parts >= 1 for parts in s.micro_batches),
        "must be at least 1 each",
    )
    need("sweep.steps", bool(s.steps) and set(s.steps) <= set(STEPS), f"must name some of {STEPS}")
    for key, values, known in (
        ("sweep.remat", s.remat, REMAT),
        ("sweep.methods", s.methods, METHODS),
        ("bench.methods", c.bench.methods, METHODS),
    ):
        need(key, all(value in known for value in values), f"has more than {known}")
    faults += _rule_faults("mesh.rules", c.mesh.rules)
    return faults + [fault for rules in s.rules for fault in _rule_faults("sweep.rules", rules)]
