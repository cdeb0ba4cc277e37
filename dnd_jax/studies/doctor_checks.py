"""What `dnd doctor` looks at: each check as (OK, NOTE or FAULT; what was found).

A file that cannot be used raises InputError, as in the stage that would refuse it.
"""

import functools
import math
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from dnd_jax.base.chat import answer_text, ends_of, render
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.hf_config import check_taken, load_base_config
from dnd_jax.base.hub import resolve
from dnd_jax.base.identity import base_name, base_weights, other_weights
from dnd_jax.base.reading import comparison, difference
from dnd_jax.base.sequences import encode
from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.core.memory import free_memory
from dnd_jax.core.packages import how_to_install, is_installed, of_models
from dnd_jax.core.tensors import stored_tensors
from dnd_jax.data.report import findings
from dnd_jax.data.suite import Dataset, Suite, load_suite
from dnd_jax.encoders.cache import identify, is_encoder
from dnd_jax.encoders.load import load_module
from dnd_jax.generator.folder import (
    Description,
    check_parameters,
    find_generator,
    read_description,
    read_record,
    read_statistics,
)
from dnd_jax.generator.model import Generator, param_shapes
from dnd_jax.generator.objective import Source, behind_examples
from dnd_jax.generator.sizes import resolve_features
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.loop.local_copies import SLOTS
from dnd_jax.lora.checkpoints import Checkpoints
from dnd_jax.lora.fit import check_fits
from dnd_jax.lora.initial import Initial
from dnd_jax.lora.targets import token_grid
from dnd_jax.studies.data_report import cut_lines

OK, NOTE, FAULT = "ok", "note", "FAULT"
# Arrays of a parameter's size in training: itself, its gradient and AdamW's two moments; and those
# of them that a checkpoint of the run keeps.
IN_MEMORY, ON_DISK = 4, 3
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
ASKED = 20  # examples of each file whose chat texts are looked at

Found = Iterator[tuple[str, str]]  # (OK, NOTE or FAULT; what was found) of one check


class Case:
    """What is looked at: folders by the settings' names for them, read once."""

    def __init__(self, config: Config, workdir: pathlib.Path, generator: str):
        """config: names the suite, the base and the checkpoints; what it leaves empty is not looked
        at, nor an empty generator."""
        self.config, self.workdir, self.generator = config, workdir, generator

    @property
    def compared(self) -> str:
        """The base whose reading is compared with PyTorch's, unless the settings turn that off."""
        return self.config.base.path if self.config.evaluate.agreement else ""

    @functools.cached_property
    def suite(self) -> Suite:
        """The suite, read as training reads it."""
        return load_suite(self.config.suite, self.config.condition.num_prompts)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Those of the suite's training datasets; without a suite, of every folder that has any."""
        root = pathlib.Path(self.config.train.checkpoints)
        if self.config.suite:
            return Checkpoints(self.config, self.suite, self.workdir)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; give the one with a folder for each dataset")
        names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not names:
            raise InputError(f"{root}: has no folders; a LoRA checkpoint lies in DATASET/NAME/")
        every = tuple(Dataset(name, (), ()) for name in names)
        return Checkpoints(self.config, Suite(root.name, root, (), every, (), {}, ""), self.workdir)

    @property
    def source(self) -> Source:
        """What has the layout of the LoRAs: checkpoints, or the base where training needs none."""
        if self.config.train.from_loras or not self.config.base.path:
            return self.checkpoints
        return Initial(self.config, self.config.base.path)


def base(case: Case) -> Found:
    """Its sizes, and that every file of it can be read."""
    path = case.config.base.path
    sizes = load_base_config(path)
    check_taken(path)
    tensors = stored_tensors(resolve(path))
    tied = "tied to the embeddings" if sizes.tie_word_embeddings else "a head of its own"
    of = f" from {weights}" if (weights := base_weights(path)) else ""
    yield (
        OK,
        f"{base_name(path)}{of}: {sizes.model_type}, {sizes.num_hidden_layers} layers of "
        f"{sizes.hidden_size}, {len(tensors)} tensors, {tied}",
    )


def chat(case: Case) -> Found:
    """That its chat template shows what the suite says, and what ends its answers."""
    path = case.config.base.path
    tokenizer = load_tokenizer(path)
    ends = tokenizer.convert_ids_to_tokens(ends_of(path, tokenizer))
    datasets = case.suite.every if case.config.suite else ()
    examples = [e for d in datasets for split in (d.train, d.test) for e in split[:ASKED]]
    for example in examples:
        render(tokenizer, example.prompt, example.system)
    shown = repr(render(tokenizer, "PROMPT", "SYSTEM") + answer_text(tokenizer, "ANSWER"))
    yield OK, f"a question is {shown}; an answer ends at {', '.join(map(repr, ends))}"


def reading(case: Case) -> Found:
    """That JAX computes of its files what PyTorch does."""
    found = comparison(case.config.base.path)
    if "note" in found:
        yield NOTE, f"not compared with PyTorch: {found['note']}"
    elif fault := difference(found):
        yield FAULT, f"{case.config.base.path}: {fault}"
    else:
        apart, largest = found["largest_logit_difference"], found["largest_logit"]
        alike = f"logits are at most {apart:.2g} apart, the largest is {largest:.3g}"
        yield OK, f"JAX and PyTorch read it alike: {alike}"


def suite(case: Case) -> Found:
    """Its faults, as `dnd data-report` lists them, and the prompts that the text encoder cuts."""
    suite = case.suite
    lines, refused = cut_lines(suite, case.config)
    yield from ((FAULT if line in refused else NOTE, line) for line in lines)
    faults = [finding for finding in findings(suite) if finding.fault]
    yield from ((FAULT, str(fault)) for fault in faults)
    rows = sum(len(d.train) + len(d.test) for d in suite.every)
    counts = f"{len(suite.train)} training datasets, {len(suite.unseen)} unseen, {rows} examples"
    more = "; `dnd data-report` says all" if faults else ", no faults in the data"
    yield NOTE if faults else OK, f"{suite.name}: {counts}{more}"


def checkpoints(case: Case) -> Found:
    """That all have one layout, which the base has too."""
    found = case.checkpoints
    count = sum(map(len, found.folders.values()))
    adapter = found.adapter
    yield (
        OK,
        f"{found.root}: {count} LoRAs of {len(found.folders)} datasets, rank {adapter.rank}, scale "
        f"{adapter.scale:g}, {', '.join(adapter.targets)}; base {adapter.base or 'not named'}",
    )


def questions(case: Case) -> Found:
    """That the base can be asked the training datasets' questions, as LoRAs are tuned on them and a
    generator is taught by them."""
    config = case.config
    tokenizer = load_tokenizer(config.base.path)
    ends, length = ends_of(config.base.path, tokenizer), config.base.max_length
    longest = 0
    for dataset in case.suite.with_training(config.train.datasets, config.seed).train:
        asked = encode(tokenizer, dataset.train, length, config.lora.too_long, ends)
        if lost := asked.lost(dataset.name, length):
            yield NOTE, f"{lost} (config.lora.too_long={config.lora.too_long})"
        if config.train.shots:
            asked = behind_examples(config, dataset, asked, tokenizer, ends)
        longest = max(longest, int(asked.end.max()))
    shots = f" behind {config.train.shots} answered examples" if config.train.shots else ""
    yield OK, f"questions and answers have up to {longest} tokens{shots}, of {length} that may be"


def encoder(case: Case) -> Found:
    """The text encoder of the settings, for training: that it is here and has the layer."""
    condition = case.config.condition
    module = load_module(condition.encoder, condition.layer)
    identify(condition)  # its files can be read
    kind = type(module).__name__
    yield OK, f"{condition.encoder}: {kind}, {condition.max_text_length} x {module.width} a text"


def generator(case: Case) -> Found:
    """That its files fit each other, its encoder is here, and it is of this base."""
    folder = find_generator(case.generator)
    description = read_description(folder)
    shapes = param_shapes(Generator(description.spec))
    check_parameters(folder, shapes)
    read_statistics(folder, description)
    if not is_encoder(description.encoder_fingerprint, description.condition):
        yield (
            FAULT,
            f"{description.condition.encoder}: not the text encoder that {folder} was trained "
            "with (its files differ); give that one back its place",
        )
    if case.config.base.path:
        yield from _of_this_base(case.config.base.path, description)
    if case.config.train.checkpoints:
        yield from _of_these_checkpoints(case, folder, description)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    yield OK, f"{folder}: {count / 1e6:.1f}M parameters, {description.spec.token_grid} tokens"


def _of_this_base(path: str, description: Description) -> Found:
    """Whether the adapters that a generator makes have this base's modules and sizes."""
    made = {matrix.key: matrix.shape for matrix in description.layout.matrices}
    try:
        check_fits(made, {}, path, f"its adapters are of another base than {path}")
    except InputError as error:
        yield FAULT, str(error)
    if note := other_weights(description.adapter.weights, path):
        yield NOTE, f"its LoRAs were {note}"


def _of_these_checkpoints(case: Case, folder: pathlib.Path, description: Description) -> Found:
    """Whether a generator was trained on these LoRAs."""
    then = read_record(folder).get("checkpoints")
    now = case.checkpoints
    if then is not None and then not in (now.digest(), now.digest_of_format_0()):
        yield NOTE, f"{folder}: was trained on other LoRAs than {now.root} holds now"


def room(case: Case) -> Found:
    """What training the generator takes, of disk and memory, and what is free."""
    config, source = case.config, case.source
    condition, grid = config.condition, token_grid(config.generator.target, source.layout)
    width = load_module(condition.encoder, condition.layer).width
    shape = condition.num_prompts, condition.max_text_length, width
    features = resolve_features(config.generator, shape, grid)
    c = config.train
    spec = DecoderSpec.of(config.generator, condition, c.dtype, c.remat, features)
    leaves = jax.tree.leaves(param_shapes(Generator(spec)))
    params = 4 * sum(math.prod(leaf.shape) for leaf in leaves)

    loras = sum(map(len, source.folders.values())) if isinstance(source, Checkpoints) else 0
    tokens = 4 * math.prod(grid) * loras
    texts = sum(len(d.train) for d in case.suite.train) if config.suite else 0
    of_text = jnp.dtype(c.dtype).itemsize * condition.max_text_length * width
    states = 0 if condition.in_graph else texts * of_text
    kept = ON_DISK * params * (c.keep_last + 1)
    disk, free = tokens + states + kept, shutil.disk_usage(_there(case.workdir)).free
    yield (
        OK if disk < free else FAULT,
        f"disk: tokens {_size(tokens)}, embeddings {_size(states)}, checkpoints {_size(kept)}: "
        f"{_size(disk)} of {_size(free)} free",
    )
    if c.local_dir:
        copies, there = len(SLOTS) * ON_DISK * params, _there(pathlib.Path(c.local_dir))
        free = shutil.disk_usage(there).free
        yield (
            OK if copies < free else FAULT,
            f"train.local_dir = {c.local_dir}: {len(SLOTS)} copies of the state {_size(copies)}, "
            f"of {_size(free)} free (of several hosts each has a share)",
        )
    split, of_base = max(config.mesh.fsdp, 1), 0
    if c.asks_base and config.base.path:
        stored = stored_tensors(resolve(config.base.path)).values()
        item = jnp.dtype(config.lora.dtype).itemsize
        of_base = item * sum(math.prod(tensor.shape) for tensor in stored)
        of_base //= split * max(config.mesh.tensor, 1)
    of_decoder, has = IN_MEMORY * params // split, _memory()
    memory, beside = of_decoder + of_base, f", and the base {_size(of_base)}" if of_base else ""
    yield (
        OK if memory < has else FAULT,
        f"memory: parameters, gradient and optimiser {_size(of_decoder)}{beside}, "
        f"of {_size(has)} a device, beside activations; `dnd plan` counts those too",
    )


def _there(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the first above it that exists."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def _memory() -> int:
    """Bytes of one device; on CPUs, those that are free."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return free_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: float) -> str:
    """Bytes in the unit that a person would take."""
    unit = next((u for u in ("kB", "MB") if count < 1e3 * UNITS[u]), "GB")
    return f"{count / UNITS[unit]:.3g} {unit}"


def packages(case: Case) -> Found:
    """What the later stages need and this environment lacks."""
    config = case.config
    own = of_models(config.base.path, config.condition.encoder)
    for stages, needed in (
        ("train and generate", own),
        ("evaluate and verify-adapter", ("torch", "peft")),
        ("plots and reports", ("matplotlib",)),
    ):
        missing = [name for name in needed if not is_installed(name)]
        if missing:
            how = how_to_install(missing)
            yield NOTE, f"{stages} need {', '.join(missing)}, which are not installed: {how}"
