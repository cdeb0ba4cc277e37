"""A trained generator, loaded for use: prompts -> LoRA tensors -> PEFT adapters (docs/METHOD.md
section 7)."""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import traverse_util

from dnd_jax.config import schema
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.tensors import read_safetensors
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.sources import read_jsonl, read_prompts
from dnd_jax.encoders import cut
from dnd_jax.encoders.cache import PromptEncoder, fingerprint_of_format_0, mean_pooled
from dnd_jax.generator.folder import (
    DESCRIPTION,
    MODEL,
    Description,
    check_parameters,
    find_generator,
    read_description,
    read_statistics,
    steady,
)
from dnd_jax.generator.generation import ONE_DEVICE, ShardedGeneration, shard_generation
from dnd_jax.generator.nearest import TrainedTasks
from dnd_jax.lora import targets
from dnd_jax.lora.adapter import save_adapter, verify_adapter
from dnd_jax.lora.card import card
from dnd_jax.lora.names import IN_FRONT, check_key_prefix, renamed
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.ops.rates import learned
from dnd_jax.parallel.mesh import make_mesh

_mean_pooled = jax.jit(mean_pooled)

STRONGEST = 100  # times what a generator makes
AT_ONCE = 8  # adapters of one batch


@dataclasses.dataclass(frozen=True)
class Generated:
    """What N prompts gave: LoRA tensors under PEFT's keys without its prefix, the training tasks
    closest to them, (name, cosine), the closest first, and `TrainedTasks.how_far`; none and 0 where
    the generator does not know its tasks."""

    prompts: tuple[str, ...]
    tensors: Mapping[str, np.ndarray]
    closest: tuple[tuple[str, float], ...] = ()
    how_far: float = 0.0

    @property
    def listed(self) -> str:
        """The closest training tasks, for a line of text."""
        return ", ".join(f"{name} ({cosine:.2f})" for name, cosine in self.closest)

    @property
    def warning(self) -> str:
        """What is to be said of prompts that are far from all training tasks; else nothing."""
        if self.how_far < 1:
            return ""
        return (
            "the prompts are far from everything the generator was trained on: "
            f"{self.how_far:.1f} times as far from every training task as those are from each "
            "other, at most; the adapter may do little"
        )


def check_strength(strength: float, where: str) -> None:
    """Raises InputError unless an adapter can have this strength."""
    if not 0 < strength <= STRONGEST:
        raise InputError(f"{where}={strength:g}: above 0, at most {STRONGEST}")


def draw_prompts(
    prompts: Sequence[str], count: int, seed: int, source: str = "prompts", fewest: int = 0
) -> list[str]:
    """`count` of the prompts, drawn without replacement by the seed, in their order. Of fewer, but
    at least `fewest` (0: count), all, and some again that the seed draws, as `Pairs` does it.
    Raises InputError when there are not as many."""
    fewest = fewest or count
    if len(prompts) < fewest:
        raise InputError(
            f"{source}: {len(prompts)} prompt(s), this generator takes {span(fewest, count)}; add "
            f"{fewest - len(prompts)} more"
        )
    blank = [i + 1 for i, p in enumerate(prompts) if not isinstance(p, str) or not p.strip()]
    if blank:
        raise InputError(f"{source}: prompt {blank[0]} is empty or no text")
    rng, size = np.random.default_rng(seed), len(prompts)
    if size < count:
        chosen = np.concatenate([np.arange(size), rng.choice(size, count - size)])
    else:
        chosen = rng.choice(size, count, replace=False)
    return [prompts[i] for i in np.sort(chosen)]


def span(fewest: int, most: int) -> str:
    """A number, or two with what lies between."""
    return f"{most}" if fewest == most else f"{fewest} to {most}"


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class TrainedGenerator:
    """A generator folder loaded for use: prompts -> LoRA tensors."""

    def __init__(
        self,
        run_dir: str | os.PathLike,
        mesh: schema.Mesh = ONE_DEVICE,
        encoder: str = "",
        base_name: str = "",
        at_once: int = 0,
        key_prefix: str = "",
    ):
        """run_dir: a generator folder, or the workdir that has one. mesh: for a generator or text
        encoder too large for one device, over whose fsdp and tensor they are split; an adapter is
        no batch to split over slice and data, which are left out. encoder: where its text encoder
        lies now; base_name: what adapters call their base; empty: as it was trained. at_once:
        adapters of one batch, filled up to a power of two; 0: AT_ONCE, and 1 on a CPU, which one
        adapter fills: there eight take as long as one after the other. key_prefix: what their names
        have before "layers." in the place of "model.", as servers of wrapped bases want it.

        Raises InputError naming the missing or damaged file, and for a mesh that does not fit the
        devices.
        """
        if key_prefix:
            check_key_prefix(key_prefix)
        self.folder = folder = find_generator(run_dir)
        with steady(folder):
            description = read_description(folder)
            generation = self._generation(description, mesh)
            check_parameters(folder, generation.shapes)
            statistics = read_statistics(folder, description)
            flat = read_safetensors(folder / MODEL)
            self.fingerprint = digests.of_description(folder / DESCRIPTION, folder / MODEL)
        self.condition, self.adapter, self.layout = (
            description.condition,
            description.adapter,
            description.layout,
        )
        self.base = self.adapter.base  # where it was when the generator was trained
        if encoder:
            self.condition = dataclasses.replace(self.condition, encoder=encoder)
        if base_name:
            kept = self.adapter.revision if base_name == self.base else ""
            self.adapter = dataclasses.replace(self.adapter, base=base_name, revision=kept)
        self._seed, self.key_prefix = description.seed, key_prefix
        self.fewest = description.fewest
        self.target = targets.from_statistics(description.generator.target, self.layout, statistics)
        self.module, self._step = generation.module, generation.step
        self._over_batch = generation.over_batch
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        self.at_once = at_once or (1 if on_cpu else AT_ONCE)
        params = traverse_util.unflatten_dict(flat, sep="/")
        self.params = jax.device_put(
            jax.tree.map(lambda x, of: x.astype(of.dtype, copy=False), params, generation.shapes),
            generation.shardings,
        )
        self.tasks: TrainedTasks | None = description.tasks(statistics)
        self.config_hash = digests.of_json(description.settings)
        self._description = description

    def _generation(self, description: Description, mesh: schema.Mesh) -> ShardedGeneration:
        """The generation step that a description is of, on this process' part of the mesh."""
        count = mesh.fsdp * mesh.tensor
        devices = jax.local_devices()[: count if count > 0 else None]
        self._mesh = make_mesh(dataclasses.replace(mesh, slices=1, data=1), devices)
        spec = dataclasses.replace(description.spec, rates=learned(devices[0].platform))
        return shard_generation(spec, self._mesh, mesh.rules)

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        """The text encoder it was trained with, loaded when first needed."""
        description, name = self._description, self.condition.encoder
        wanted = description.encoder_fingerprint
        # The commit that was recorded is one of the recorded name.
        same = name == description.condition.encoder
        revision = description.encoder_revision if same else ""
        encoder = PromptEncoder(self.condition, self._mesh, revision)
        found = encoder.fingerprint
        if found != wanted and fingerprint_of_format_0(self.condition) != wanted:
            raise InputError(
                f"{name}: not the encoder that {self.folder} was trained with (its files differ)"
            )
        return encoder

    def read(self, path: str | os.PathLike) -> list[str]:
        """The condition texts of a file: its prompts, or what condition.form of the generator wants
        of its examples."""
        if self.condition.form == "prompt":
            return read_prompts(path)
        return condition_texts(read_jsonl(path), self.condition.form, self._seed)

    def check(
        self,
        prompts: Sequence[str],
        source: str,
        too_long: str = "",
        say: Callable[[str], None] = _warn,
    ) -> None:
        """Says of prompts that the encoder cuts, and of fewer than N.

        Raises InputError for too few, and where too much is lost, unless the generator's
        condition.too_long, or this one, is "cut".
        """
        self.draw(prompts, 0, source)
        if len(prompts) < (n := self.condition.num_prompts):
            say(f"{source}: {len(prompts)} prompts, repeated to {n}")
        limit = self.condition.max_text_length
        lost = cut.count({source: prompts}, self.encoder.tokens, limit)
        allowed = "cut" if "cut" in (too_long, self.condition.too_long) else "refuse"
        fix = "shorten them, take a generator of longer texts"
        cut.check(lost, allowed, fix, say)

    def tokens(self, condition: np.ndarray) -> np.ndarray:
        """Condition embeddings (N, L, C) -> predicted token grid, float32 (T, h, w)."""
        return np.asarray(self._step(self.params, condition[None])[0])

    def tensors(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Exactly N prompts -> LoRA tensors under PEFT's keys without its prefix. Raises InputError
        for a generator of which some would be no numbers."""
        return next(self.make([prompts])).tensors

    def generate_many(self, prompt_sets: Sequence[Sequence[str]]) -> list[dict[str, np.ndarray]]:
        """`tensors` of several sets of exactly N prompts, `at_once` in one batch through encoder
        and decoder. They equal those made one by one up to rounding, as a batch of another size is
        another program. Raises InputError as `tensors`."""
        return [made.tensors for made in self.make(prompt_sets)]

    def make(self, prompt_sets: Sequence[Sequence[str]]) -> Iterator[Generated]:
        """What each set of exactly N prompts gives, in their order; `at_once` are held. Raises
        InputError as `tensors`."""
        for first in range(0, len(prompt_sets), self.at_once):
            yield from self._batch(prompt_sets[first : first + self.at_once])

    def _batch(self, sets: Sequence[Sequence[str]]) -> list[Generated]:
        """Filled up to a power of two, so that few programs are compiled; states of texts stay on
        the devices, and the tokens of all come in one transfer."""
        n, size = self.condition.num_prompts, 1 << (len(sets) - 1).bit_length()
        filled = [*sets, *[sets[0]] * (size - len(sets))]
        if any(len(prompts) != n for prompts in sets):
            raise ValueError(f"sets of {[*map(len, sets)]} prompts, this generator takes {n}")
        states, valid = self.encoder.on_devices([text for prompts in filled for text in prompts])
        condition = jax.device_put(states.reshape(size, n, *states.shape[1:]), self._over_batch)
        means = _mean_pooled(states, valid)
        tokens, pooled = jax.device_get((self._step(self.params, condition), means))
        pooled = pooled.reshape(size, n, -1)
        made = []
        for i, prompts in enumerate(sets):
            tensors = self.target.decode(tokens[i])
            odd = [key for key, value in tensors.items() if not np.all(np.isfinite(value))]
            if odd:
                raise InputError(
                    f"{self.folder}: makes NaN or Inf, in {len(odd)} of {len(tensors)} tensors "
                    f"({odd[0]}); its parameters are damaged: train or import it again"
                )
            of_prompts, tasks = pooled[i], self.tasks
            near = (tasks.closest(of_prompts), tasks.how_far(of_prompts)) if tasks else ()
            made.append(Generated(tuple(prompts), tensors, *near))
        return made

    def draw(self, prompts: Sequence[str], seed: int, source: str = "prompts") -> list[str]:
        """The N prompts that a seed takes for an adapter; a generator trained with
        train.few_prompts takes fewer, repeated."""
        return draw_prompts(prompts, self.condition.num_prompts, seed, source, self.fewest)

    def settings(self, strength: float = 1.0) -> AdapterConfig:
        """The settings of an adapter whose effect is so many times as strong: its alpha is."""
        return dataclasses.replace(self.adapter, alpha=self.adapter.alpha * strength)

    def card(self, made: Generated, seed: int, strength: float = 1.0, merged: bool = False) -> str:
        """The README.md of an adapter, or of the base with it merged in: what made it."""
        notes = []
        if strength != 1:
            notes.append(f"alpha is {strength:g} times the generator's: --strength={strength:g}")
        if self.key_prefix:
            notes.append(f"its tensors are named for a server: --key-prefix={self.key_prefix}")
        if made.closest:
            closest = "closest training tasks, by the cosine of mean embeddings"
            notes.append(f"{closest}: {made.listed}")
        if made.warning:
            notes.append(made.warning)
        # A published card says which generator it was, not where in somebody's file system it lies.
        which = self.fingerprint[:16], self.config_hash
        return card(self.settings(strength), *which, made.prompts, seed, merged, notes)

    def write(
        self,
        prompts: Sequence[str],
        out_dir: str | os.PathLike,
        seed: int = 0,
        source: str = "prompts",
        dtype: str = "float32",
    ) -> pathlib.Path:
        """Draws N of the prompts, generates and writes the adapter, reads it back and compares.
        dtype: of the stored tensors."""
        made = next(self.make([self.draw(prompts, seed, source)]))
        return self.save(made, out_dir, seed, dtype)

    def save(
        self,
        made: Generated,
        out_dir: str | os.PathLike,
        seed: int,
        dtype: str = "float32",
        strength: float = 1.0,
    ) -> pathlib.Path:
        """Writes an adapter of prompts that `seed` has drawn, reads it back and compares.
        strength: its effect, times the generated one's."""
        of_card, settings = self.card(made, seed, strength), self.settings(strength)
        tensors = made.tensors
        if self.key_prefix:
            tensors = renamed(tensors, IN_FRONT, self.key_prefix)
        folder = save_adapter(out_dir, tensors, settings, of_card, dtype)
        verify_adapter(folder, tensors, dtype)
        return folder


def load_generator(run_dir: str | os.PathLike, mesh: schema.Mesh = ONE_DEVICE) -> TrainedGenerator:
    """A trained or imported generator, ready for use. Arguments and errors as
    `TrainedGenerator`."""
    return TrainedGenerator(run_dir, mesh)
