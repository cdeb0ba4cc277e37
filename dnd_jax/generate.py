"""Stage `generate`: prompts of an unseen task -> a PEFT adapter (METHOD.md section 7). No template adapter, no training.

dnd generate --generator=RUN --prompts=FILE --out=DIR [--seed=0] [--samples=1] [--dtype=bfloat16] [--merge=MODEL]
             [--config.mesh.fsdp=8]
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dnd_jax import config as config_lib
from dnd_jax import sharding, targets
from dnd_jax.adapters import save_adapter, verify_adapter
from dnd_jax.card import card
from dnd_jax.condition import PromptEncoder
from dnd_jax.errors import InputError
from dnd_jax.files import digest_of
from dnd_jax.forms import condition_texts
from dnd_jax.generator_folder import DESCRIPTION, MODEL, STATISTICS, find_generator, read_description
from dnd_jax.models.generator import Generator, param_shapes
from dnd_jax.models.hf import read_safetensors
from dnd_jax.models.hyperconv import Features
from dnd_jax.models.placement import Placement
from dnd_jax.ops import compiler_options
from dnd_jax.sources import read_jsonl, read_prompts
from dnd_jax.train import make_generator


def draw_prompts(prompts: Sequence[str], count: int, seed: int, source: str = "prompts") -> list[str]:
    """`count` of the prompts, drawn without replacement by the seed, in their order. Raises InputError when there are fewer."""
    if len(prompts) < count:
        raise InputError(f"{source}: {len(prompts)} prompt(s), this generator takes {count}; add {count - len(prompts)} more")
    blank = [i + 1 for i, p in enumerate(prompts) if not isinstance(p, str) or not p.strip()]
    if blank:
        raise InputError(f"{source}: prompt {blank[0]} is empty or no text")
    chosen = np.sort(np.random.default_rng(seed).choice(len(prompts), count, replace=False))
    return [prompts[i] for i in chosen]


ONE_DEVICE = config_lib.Mesh(slices=1, data=1, fsdp=1, tensor=1, rules=((r".", ()),))


@dataclasses.dataclass(frozen=True)
class ShardedGeneration:
    """The generation step as it runs on a mesh."""

    module: Generator
    shapes: dict  # of the parameters
    shardings: dict  # of the parameters
    over_batch: jax.sharding.NamedSharding  # of conditions and tokens
    step: Callable  # (params, condition (B, N, L, C)) -> tokens (B, T, h, w) float32, jitted


def shard_generation(
    config: config_lib.Generator,
    dtype: str,
    mesh: jax.sharding.Mesh,
    rules: tuple,
    features: Sequence[Features],
    condition_shape: tuple[int, int, int],
    batch: int = 1,
) -> ShardedGeneration:
    """The one generation step of a configuration, for use and ahead-of-time compilation. condition_shape: (N, L, C); batch:
    adapters at once, which every device makes by itself where the mesh does not divide them.

    Raises InputError for a parameter without a rule.
    """
    place = Placement(mesh)
    module = make_generator(features, config, dtype, place)
    shapes = param_shapes(module, condition_shape)
    shardings = sharding.shard_by_rules(mesh, rules, shapes)
    over_batch = sharding.leading(mesh, batch, "the adapters") if place.batch_ways(batch) > 1 else sharding.replicated(mesh)

    def generate(params, condition):
        return module.apply({"params": place.gather_small(params)}, condition).astype(jnp.float32)

    step = jax.jit(
        generate,
        in_shardings=(shardings, over_batch),
        out_shardings=over_batch,
        compiler_options=compiler_options(place.platform),
    )
    return ShardedGeneration(module, shapes, shardings, over_batch, step)


class TrainedGenerator:
    """A generator folder loaded for use: prompts -> LoRA tensors."""

    def __init__(self, run_dir: str | os.PathLike, mesh: config_lib.Mesh = ONE_DEVICE):
        """run_dir: a generator folder, or the workdir that has one. mesh: for a generator or text encoder too large for one device,
        over whose fsdp and tensor they are split; an adapter is no batch to split over slice and data, which are left out.

        Raises InputError naming the missing or damaged file, and for a mesh that does not fit the devices.
        """
        self.folder = folder = find_generator(run_dir)
        description = read_description(folder)
        self.condition, self.adapter, self.layout = description.condition, description.adapter, description.layout
        self._seed = description.seed
        self.target = targets.from_statistics(description.generator.target, self.layout, read_safetensors(folder / STATISTICS))
        count = mesh.fsdp * mesh.tensor
        devices = jax.local_devices()[: count if count > 0 else None]
        self._mesh = sharding.make_mesh(dataclasses.replace(mesh, slices=1, data=1), devices)
        features = description.features
        condition = self.condition.num_prompts, self.condition.max_text_length, features[0][2]
        how = description.generator, description.dtype, self._mesh, mesh.rules
        generation = shard_generation(*how, features, condition)
        self.module, self._step = generation.module, generation.step
        flat = read_safetensors(folder / MODEL)
        self.params = jax.device_put(traverse_util.unflatten_dict(flat, sep="/"), generation.shardings)
        self.fingerprint = digest_of(folder / DESCRIPTION, folder / MODEL)
        self.config_hash = hashlib.sha256(json.dumps(description.settings, sort_keys=True).encode()).hexdigest()
        self._encoder_fingerprint = description.encoder_fingerprint

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        """The text encoder it was trained with, loaded when first needed."""
        encoder = PromptEncoder(self.condition, self._mesh)
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
        return np.asarray(self._step(self.params, condition[None])[0])

    def tensors(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Exactly N prompts -> LoRA tensors under PEFT's keys without its prefix."""
        return self.target.decode(self.tokens(self.encoder.encode(prompts)))

    def draw(self, prompts: Sequence[str], seed: int, source: str = "prompts") -> list[str]:
        """The N prompts that a seed takes for an adapter."""
        return draw_prompts(prompts, self.condition.num_prompts, seed, source)

    def card(self, drawn: Sequence[str], seed: int, merged: bool = False) -> str:
        """The README.md of an adapter, or of the base with it merged in: what made it."""
        # A published card says which generator it was, not where in somebody's file system it lies.
        name = f"{'/'.join(self.folder.absolute().parts[-2:])} (sha256 {self.fingerprint[:16]})"
        return card(self.adapter, name, self.config_hash, drawn, seed, merged)

    def write(
        self,
        prompts: Sequence[str],
        out_dir: str | os.PathLike,
        seed: int = 0,
        source: str = "prompts",
        dtype: str = "float32",
    ) -> pathlib.Path:
        """Draws N of the prompts, generates and writes the adapter, reads it back and compares. dtype: of the stored tensors."""
        drawn = self.draw(prompts, seed, source)
        tensors = self.tensors(drawn)
        folder = save_adapter(out_dir, tensors, self.adapter, self.card(drawn, seed), dtype)
        verify_adapter(folder, tensors, dtype)
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
