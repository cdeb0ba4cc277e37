"""Stage `generate`: prompts of an unseen task -> a PEFT adapter (METHOD.md section 7). No template adapter, no training.

dnd generate --generator=RUN --prompts=FILE --out=DIR [--seed=0] [--samples=1]
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from flax import traverse_util

from dnd_jax import config as config_lib
from dnd_jax import targets
from dnd_jax.adapters import AdapterConfig, save_adapter, verify_adapter
from dnd_jax.condition import PromptEncoder
from dnd_jax.errors import InputError
from dnd_jax.files import read_json
from dnd_jax.forms import condition_texts
from dnd_jax.layout import LoraLayout
from dnd_jax.models.hf import read_safetensors
from dnd_jax.ops import compiler_options
from dnd_jax.sources import read_jsonl, read_prompts
from dnd_jax.train import DESCRIPTION, MODEL, STATISTICS, make_generator


def draw_prompts(prompts: Sequence[str], count: int, seed: int, source: str = "prompts") -> list[str]:
    """`count` of the prompts, drawn without replacement by the seed, in their order. Raises InputError when there are fewer."""
    if len(prompts) < count:
        raise InputError(f"{source}: {len(prompts)} prompt(s), this generator takes {count}; add {count - len(prompts)} more")
    blank = [i + 1 for i, p in enumerate(prompts) if not isinstance(p, str) or not p.strip()]
    if blank:
        raise InputError(f"{source}: prompt {blank[0]} is empty or no text")
    chosen = np.sort(np.random.default_rng(seed).choice(len(prompts), count, replace=False))
    return [prompts[i] for i in chosen]


class TrainedGenerator:
    """A generator folder loaded for use: prompts -> LoRA tensors."""

    def __init__(self, run_dir: str | os.PathLike):
        """run_dir: a generator folder, or the workdir that has one. Raises InputError naming the missing or damaged file."""
        folder = pathlib.Path(run_dir)
        if not (folder / DESCRIPTION).is_file() and (folder / "generator" / DESCRIPTION).is_file():
            folder = folder / "generator"
        if not (folder / DESCRIPTION).is_file():
            raise InputError(f"{folder}: no {DESCRIPTION}, so no trained generator; give the folder that `dnd train` wrote")
        self.folder = folder
        description = read_json(folder / DESCRIPTION)
        settings, adapter = description["settings"], description["adapter"]
        self.condition = config_lib.Condition(**{"form": "prompt", **settings["condition"]})
        self._seed = settings["seed"]
        self.adapter = AdapterConfig(**{**adapter, "targets": tuple(adapter["targets"])})
        self.layout = LoraLayout.from_json(description["layout"])
        kind, stored = settings["generator"]["target"], read_safetensors(folder / STATISTICS)
        self.target = targets.from_statistics(kind, self.layout, stored)
        features = tuple(tuple(f) for f in description["features"])
        self.module = make_generator(features, config_lib.Generator(**settings["generator"]), settings["train"]["dtype"])
        flat = read_safetensors(folder / MODEL)
        self.params = jax.device_put(traverse_util.unflatten_dict(flat, sep="/"))
        self.fingerprint = hashlib.sha256((folder / DESCRIPTION).read_bytes() + (folder / MODEL).read_bytes()).hexdigest()
        self._encoder_fingerprint = description["encoder_fingerprint"]
        self._apply = jax.jit(
            lambda params, condition: self.module.apply({"params": params}, condition),
            compiler_options=compiler_options(jax.default_backend()),
        )

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        """The text encoder it was trained with, loaded when first needed."""
        encoder = PromptEncoder(self.condition)
        if encoder.fingerprint != self._encoder_fingerprint:
            raise InputError(f"{self.condition.encoder}: not the encoder that {self.folder} was trained with (its files differ)")
        return encoder

    def read(self, path: str | os.PathLike) -> list[str]:
        """The condition texts of a file: its prompts, or what condition.form of the generator wants of its examples."""
        if self.condition.form == "prompt":
            return read_prompts(path)
        return condition_texts(read_jsonl(path), self.condition.form, self._seed)

    def tokens(self, condition: np.ndarray) -> np.ndarray:
        """Condition embeddings (N, L, C) -> predicted token grid, float32 (T, h, w)."""
        return np.asarray(self._apply(self.params, condition[None])[0], np.float32)

    def tensors(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Exactly N prompts -> LoRA tensors under PEFT's keys without its prefix."""
        return self.target.decode(self.tokens(self.encoder.encode(prompts)))

    def card(self, prompts: Sequence[str], seed: int) -> str:
        """The adapter's README.md: what made it."""
        digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
        return (
            f"---\nbase_model: {self.adapter.base}\nlibrary_name: peft\ntags: [lora, drag-and-drop-llms, dnd_jax]\n---\n\n"
            "# LoRA adapter generated from prompts\n\n"
            "Made by dnd_jax (Drag-and-Drop LLMs, arXiv 2506.16406) from unlabeled prompts, without training on the task.\n\n"
            f"- generator: {self.folder.absolute()} (sha256 {self.fingerprint[:16]})\n"
            f"- prompts: {len(prompts)}, drawn with seed {seed} (sha256 {digest[:16]})\n"
            f"- rank {self.adapter.rank}, alpha {self.adapter.alpha:g}\n"
        )

    def write(self, prompts: Sequence[str], out_dir: str | os.PathLike, seed: int = 0, source: str = "prompts") -> pathlib.Path:
        """Draws N of the prompts, generates and writes the adapter, reads it back and compares."""
        drawn = draw_prompts(prompts, self.condition.num_prompts, seed, source)
        tensors = self.tensors(drawn)
        folder = save_adapter(out_dir, tensors, self.adapter, self.card(drawn, seed))
        verify_adapter(folder, tensors)
        return folder


def generate_adapter(
    run_dir: str | os.PathLike, prompts: Sequence[str] | str | os.PathLike, out_dir: str | os.PathLike, seed: int = 0
) -> pathlib.Path:
    """Writes a PEFT adapter for the task of `prompts` (texts, or a file of them) and returns its folder.

    The seed draws N of the prompts. Raises InputError for too few prompts, a damaged generator or an unwritable folder.
    """
    generator, source = TrainedGenerator(run_dir), "prompts"
    if isinstance(prompts, str | os.PathLike):
        source, prompts = os.fspath(prompts), generator.read(prompts)
    return generator.write(list(prompts), out_dir, seed, source)
