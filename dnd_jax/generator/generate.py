"""Stage `generate`: prompts of an unseen task -> a PEFT adapter (docs/METHOD.md section 7). No
template adapter, no training.

dnd generate --generator=RUN --prompts=FILE --out=DIR [--seed=0] [--samples=1] [--dtype=bfloat16]
[--merge=MODEL]
             [--config.mesh.fsdp=8]
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from flax import traverse_util

from dnd_jax.base.hub import check_repo_id, is_repo_id, kept_revision, push, resolve
from dnd_jax.base.identity import other_weights
from dnd_jax.config import schema
from dnd_jax.config.training import FEWEST
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import check_free
from dnd_jax.core.stage import BASE_NAME, DEFAULT, OUT, Flag, Given, Stage
from dnd_jax.core.tensors import read_safetensors
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.sources import read_jsonl, read_prompts
from dnd_jax.encoders import cut
from dnd_jax.encoders.cache import PromptEncoder, fingerprint_of_format_0
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
from dnd_jax.generator.step import ONE_DEVICE, ShardedGeneration, shard_generation
from dnd_jax.lora import targets
from dnd_jax.lora.adapter import DTYPES, save_adapter, verify_adapter
from dnd_jax.lora.card import card, is_generated, names_hub_model
from dnd_jax.lora.merge import FILES, merge_adapter
from dnd_jax.parallel.mesh import make_mesh


def draw_prompts(
    prompts: Sequence[str], count: int, seed: int, source: str = "prompts", fewest: int = 0
) -> list[str]:
    """`count` of the prompts, drawn without replacement by the seed, in their order. Of fewer, but
    at least `fewest` (0: count), all, and some again that the seed draws, as `Pairs` does it.
    Raises InputError when there are not as many."""
    fewest = fewest or count
    if len(prompts) < fewest:
        takes = count if fewest == count else f"{fewest} to {count}"
        raise InputError(
            f"{source}: {len(prompts)} prompt(s), this generator takes {takes}; add "
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


class TrainedGenerator:
    """A generator folder loaded for use: prompts -> LoRA tensors."""

    def __init__(
        self,
        run_dir: str | os.PathLike,
        mesh: schema.Mesh = ONE_DEVICE,
        encoder: str = "",
        base_name: str = "",
    ):
        """run_dir: a generator folder, or the workdir that has one. mesh: for a generator or text
        encoder too large for one device, over whose fsdp and tensor they are split; an adapter is
        no batch to split over slice and data, which are left out. encoder: where its text encoder
        lies now; base_name: what adapters call their base; empty: as it was trained.

        Raises InputError naming the missing or damaged file, and for a mesh that does not fit the
        devices.
        """
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
        self._seed = description.seed
        # Only one that has met fewer different prompts in training knows what to make of them.
        few = description.settings.get("train", {}).get("few_prompts")
        self.fewest = min(FEWEST, self.condition.num_prompts) if few else 0
        self.target = targets.from_statistics(description.generator.target, self.layout, statistics)
        self.module, self._step = generation.module, generation.step
        self.params = jax.device_put(
            traverse_util.unflatten_dict(flat, sep="/"), generation.shardings
        )
        self.config_hash = digests.of_json(description.settings)
        self._description = description

    def _generation(self, description: Description, mesh: schema.Mesh) -> ShardedGeneration:
        """The generation step that a description is of, on this process' part of the mesh."""
        count = mesh.fsdp * mesh.tensor
        devices = jax.local_devices()[: count if count > 0 else None]
        self._mesh = make_mesh(dataclasses.replace(mesh, slices=1, data=1), devices)
        return shard_generation(description.spec, self._mesh, mesh.rules)

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

    def check(self, prompts: Sequence[str], source: str, too_long: str = "") -> None:
        """Warns on stderr of prompts that the encoder cuts, and of fewer than N.

        Raises InputError for too few, and where too much is lost, unless the generator's
        condition.too_long, or this one, is "cut".
        """
        self.draw(prompts, 0, source)
        if len(prompts) < (n := self.condition.num_prompts):
            print(f"note: {source}: {len(prompts)} prompts, repeated to {n}", file=sys.stderr)
        limit = self.condition.max_text_length
        lost = cut.count({source: prompts}, self.encoder.tokens, limit)
        allowed = "cut" if "cut" in (too_long, self.condition.too_long) else "refuse"
        fix = "shorten them, take a generator of longer texts"
        cut.check(lost, allowed, fix, lambda line: print(f"warning: {line}", file=sys.stderr))

    def tokens(self, condition: np.ndarray) -> np.ndarray:
        """Condition embeddings (N, L, C) -> predicted token grid, float32 (T, h, w)."""
        return np.asarray(self._step(self.params, condition[None])[0])

    def tensors(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Exactly N prompts -> LoRA tensors under PEFT's keys without its prefix. Raises InputError
        for a generator of which some would be no numbers."""
        tensors = self.target.decode(self.tokens(self.encoder.encode(prompts)))
        odd = [key for key, value in tensors.items() if not np.all(np.isfinite(value))]
        if odd:
            raise InputError(
                f"{self.folder}: makes NaN or Inf, in {len(odd)} of {len(tensors)} tensors "
                f"({odd[0]}); its parameters are damaged: train or import it again"
            )
        return tensors

    def draw(self, prompts: Sequence[str], seed: int, source: str = "prompts") -> list[str]:
        """The N prompts that a seed takes for an adapter; a generator trained with
        train.few_prompts takes fewer, repeated."""
        return draw_prompts(prompts, self.condition.num_prompts, seed, source, self.fewest)

    def card(self, drawn: Sequence[str], seed: int, merged: bool = False) -> str:
        """The README.md of an adapter, or of the base with it merged in: what made it."""
        # A published card says which generator it was, not where in somebody's file system it lies.
        return card(self.adapter, self.fingerprint[:16], self.config_hash, drawn, seed, merged)

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
        drawn = self.draw(prompts, seed, source)
        tensors = self.tensors(drawn)
        folder = save_adapter(out_dir, tensors, self.adapter, self.card(drawn, seed), dtype)
        verify_adapter(folder, tensors, dtype)
        return folder


def load_generator(run_dir: str | os.PathLike, mesh: schema.Mesh = ONE_DEVICE) -> TrainedGenerator:
    """A trained or imported generator, ready for use. Arguments and errors as
    `TrainedGenerator`."""
    return TrainedGenerator(run_dir, mesh)


def generate_adapter(
    run_dir: str | os.PathLike,
    prompts: Sequence[str] | str | os.PathLike,
    out_dir: str | os.PathLike,
    seed: int = 0,
) -> pathlib.Path:
    """Writes a PEFT adapter for the task of `prompts` (texts, or a file of them) and returns its
    folder.

    The seed draws N of the prompts. Raises InputError for too few prompts, a damaged generator or
    an unwritable folder.
    """
    generator, source = load_generator(run_dir), "prompts"
    if isinstance(prompts, str | os.PathLike):
        source, prompts = os.fspath(prompts), generator.read(prompts)
    generator.check(prompts, source)
    return generator.write(list(prompts), out_dir, seed, source)


FLAGS = (
    Flag("generator", str, "", "a trained or imported generator's folder"),
    Flag(
        "prompts", str, "", 'file of prompts: JSONL or a table with "prompt", or .txt, one a line'
    ),
    OUT,
    BASE_NAME,
    Flag("seed", int, 0, "draws the prompts"),
    Flag("samples", int, 1, "adapters, from as many draws"),
    Flag("dtype", str, "float32", "of the adapter's tensors, float32 or bfloat16"),
    Flag("merge", str, "", "a folder for the whole model, base + adapter, in the base's dtype"),
    Flag(
        "base",
        str,
        "",
        "for --merge, the base's folder, GGUF file or hub id (default: the one the adapter names)",
    ),
    Flag(
        "push-to-hub",
        str,
        "",
        "USER/NAME to upload the adapter (with --merge: the whole model) to, privately",
    ),
    Flag("public", bool, False, "with --push-to-hub: for everybody to see"),
)


def _run(given: Given) -> None:
    given.need("generator", "prompts", "out")
    folders, merged = _places(given)
    generator = TrainedGenerator(
        given["generator"], given.config.mesh, base_name=given["base-name"]
    )
    if given["push-to-hub"]:
        _check_base_name(given, generator.adapter.base)
    prompts = generator.read(given["prompts"])
    generator.check(prompts, given["prompts"], given.config.condition.too_long)
    if merged and generator.adapter.weights and not given["base"]:
        raise InputError(
            f"--merge: the LoRAs were trained on {generator.adapter.weights}; give that file by "
            f"--base, or --base={generator.base} for the hub's own weights, which are other numbers"
        )
    base = base_to_merge(given["base"] or generator.base, generator.folder) if merged else None
    if merged and (note := other_weights(generator.adapter.weights, base)):
        print(f"note: {base}: the generator's LoRAs were {note}", file=sys.stderr)
    for sample, folder in enumerate(folders):
        seed = given["seed"] + sample
        folder = generator.write(prompts, folder, seed, given["prompts"], given["dtype"])
        print(f"adapter: {folder.absolute()}")
        if merged:
            card = generator.card(
                generator.draw(prompts, seed, given["prompts"]), seed, merged=True
            )
            folder = merge_adapter(base, folder, merged[sample], card)
            print(f"model: {folder.absolute()}")
    if given["push-to-hub"]:
        print(f"pushed: {push(folder, given['push-to-hub'], given['public'])}")


def base_to_merge(name: str, generator: pathlib.Path) -> pathlib.Path:
    """The folder of the base to merge into; of a hub id, the commit that the generator's run took,
    where its folder says so. Raises InputError as `resolve`."""
    return resolve(name, FILES, kept_revision(name, generator.parent))


def _check_base_name(given: Given, base: str) -> None:
    """Raises InputError where an adapter would be uploaded whose base only this machine has."""
    if not (is_repo_id(base) if given["base-name"] else names_hub_model(base)):
        raise InputError(
            f"--push-to-hub: the adapter would name its base {base!r}, which is not on the hub; "
            "say by --base-name=USER/NAME which it is"
        )


def _places(given: Given) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The folders of the adapters and of the merged models. Raises InputError for flags that cannot
    be, or folders in use."""
    if given["samples"] < 1:
        raise InputError(f"--samples={given['samples']}: at least 1")
    if given["dtype"] not in DTYPES:
        raise InputError(f"--dtype={given['dtype']}: none of {', '.join(DTYPES)}")
    if given["base"] and not given["merge"]:
        raise InputError("--base is for --merge=FOLDER; what an adapter calls it is --base-name")
    if given["public"] and not given["push-to-hub"]:
        raise InputError("--public is for --push-to-hub=USER/NAME")
    if given["push-to-hub"]:
        check_repo_id(given["push-to-hub"])
        if given["samples"] > 1:
            raise InputError("--push-to-hub takes one adapter; leave out --samples")
    parts = (
        [""]
        if given["samples"] == 1
        else [f"sample_{sample}" for sample in range(given["samples"])]
    )
    folders = [pathlib.Path(given["out"], part) for part in parts]
    merged = [pathlib.Path(given["merge"], part) for part in parts] if given["merge"] else []
    for folder in folders:
        if not is_generated(folder):  # one can generate again into the same place
            check_free(folder, "out")
    for folder in merged:
        check_free(folder, "merge")
        if any(out.resolve().is_relative_to(folder.resolve()) for out in folders):
            raise InputError(
                f"--merge={given['merge']}: would replace the adapter in --out={given['out']}; "
                "choose another --merge"
            )
    return folders, merged


# The rest is as the generator was trained.
STAGE = Stage(_run, FLAGS, settings=DEFAULT, reads=("mesh", "condition.too_long"))
