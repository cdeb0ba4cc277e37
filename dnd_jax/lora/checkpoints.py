"""A collection of LoRA checkpoints as the generator's targets: one layout for all, one array of
tokens a dataset, made once.

The folders may be ours or PEFT's, LLaMA-Factory's checkpoint-N, or the original's flat
N.safetensors (lora/listing.py). Checkpoints are read one at a time and their tokens
written to WORKDIR/targets/DATASET/KEY/ as they come:

    tokens.npy        float32 (M, T, h, w), to be mapped into memory
    importance.npy    float32 (T,), the importance weights of this dataset (docs/METHOD.md section
    3), if they were asked for

KEY is a hash of the checkpoints' names, contents and settings, and of the target with its
statistics. A set of 7B checkpoints has 8 GB, which a resumed run does not read again to learn that
nothing changed: core/digests.py keeps what it has hashed. Arrays of another KEY are deleted: a
dataset has one.
"""

import concurrent.futures
import dataclasses
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from tqdm import tqdm

from dnd_jax.base.hub import is_hub_id
from dnd_jax.base.identity import one_name, other_weights
from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core.arrays import open_array, write_array
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import holds_only, need_space, read_json, replacing
from dnd_jax.core.stopping import stop
from dnd_jax.core.workdir import BASE
from dnd_jax.data.suite import Suite
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.fit import check_fits
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.listing import checkpoint_folders
from dnd_jax.lora.moments import Moments, importance_weights
from dnd_jax.lora.names import LORA_B
from dnd_jax.lora.peft_settings import (
    AdapterConfig,
    config_file,
    load_adapter_config,
    read_fields,
    read_shapes,
    weights_file,
)
from dnd_jax.lora.targets import (
    ChunkTarget,
    ElementTarget,
    Target,
    load_statistics,
    save_statistics,
)
from dnd_jax.parallel import hosts

TOKENS, IMPORTANCE = "tokens.npy", "importance.npy"
VERSION = 2  # of what the files hold


def _differences(
    first: tuple[AdapterConfig, Mapping[str, tuple[int, ...]]],
    other: tuple[AdapterConfig, Mapping[str, tuple[int, ...]]],
) -> list[str]:
    """In what a checkpoint differs from the first; of each, its settings and {key: shape}."""
    (wanted, shapes), (settings, found) = first, other
    differ = [
        f"{key} {getattr(settings, key)!r} instead of {getattr(wanted, key)!r}"
        for key in ("rank", "alpha", "revision")
        if getattr(settings, key) != getattr(wanted, key)
    ]
    missing, more = shapes.keys() - found.keys(), found.keys() - shapes.keys()
    if missing:
        differ.append(f"{len(missing)} tensors missing ({min(missing)})")
    if more:
        differ.append(f"{len(more)} tensors more ({min(more)})")
    # Another rank changes every shape, and is said above.
    reshaped = sorted(key for key in shapes.keys() & found.keys() if shapes[key] != found[key])
    if reshaped and settings.rank == wanted.rank:
        key = reshaped[0]
        differ.append(
            f"{len(reshaped)} tensors of another shape ({key} {found[key]} instead of "
            f"{shapes[key]})"
        )
    return differ


def _read_all(
    paths: Iterable[pathlib.Path],
) -> tuple[dict[pathlib.Path, tuple[AdapterConfig, dict]], list[str]]:
    """({checkpoint: its settings and {key: shape}}, what is wrong with the unreadable ones)."""
    read, faults = {}, []
    for path in paths:
        try:
            read[path] = load_adapter_config(path), read_shapes(path)
        except InputError as error:
            faults.append(str(error))
    return read, faults


def _fault(title: str, differ: list[str], unreadable: list[str]) -> InputError:
    """What is wrong with checkpoints, all of it."""
    if len(unreadable) == 1 and not differ:
        return InputError(unreadable[0])
    parts = [str(listed(title, differ))] * bool(differ)
    parts += [str(listed("LoRAs that cannot be read", unreadable))] * bool(unreadable)
    return InputError("; ".join(parts))


def own_base(config: Config, workdir: pathlib.Path) -> bool:
    """Whether the checkpoints are those that were collected on the workdir's own base."""
    return not config.train.checkpoints and (workdir / BASE / "config.json").is_file()


class Checkpoints:
    """The LoRA checkpoints of the training datasets: one layout and one scale, checked by the
    files' headers alone."""

    def __init__(self, config: Config, suite: Suite, workdir: pathlib.Path, base_name: str = ""):
        """base_name: what the generated adapters call their base; empty: as `_base`.

        Raises InputError listing every checkpoint that cannot be read or differs from the first in
        rank, scale, modules or shapes, and for several bases of which none is given.
        """
        self.root = pathlib.Path(config.train.checkpoints or workdir / "loras")
        self.folders = checkpoint_folders(self.root, [d.name for d in suite.train])
        read, unreadable = _read_all(path for paths in self.folders.values() for path in paths)
        if not read:
            raise _fault("", [], unreadable)
        first = next(iter(read))
        self.adapter, shapes = read[first]
        faults = [
            f"{path} has {', '.join(differ)}"
            for path, other in read.items()
            if (differ := _differences(read[first], other))
        ]
        title = f"checkpoints of another layout or scale than {first}"
        if faults or unreadable:
            raise _fault(title, faults, unreadable)
        self.layout = LoraLayout.from_shapes(shapes, config.generator.chunk_width or None)
        bases = {}
        for path, (settings, _) in read.items():
            bases.setdefault(settings.base, path)
        weights = {settings.weights for settings, _ in read.values()}
        base = base_name or self._base(bases, config, workdir)
        at = config.base.path or (str(workdir / BASE) if own_base(config, workdir) else base)
        check_fits(
            shapes, read_fields(first), at, f"{first}: not an adapter of {at or 'a decoder'}"
        )
        kept = self.adapter.revision if base == self.adapter.base else ""
        of = "; ".join(sorted(weights - {""}))
        self.adapter = dataclasses.replace(self.adapter, base=base, revision=kept, weights=of)
        if at == config.base.path and at and (note := other_weights(of, at)) and hosts.lead():
            print(f"note: {self.root}: {note}", flush=True)

    def _base(self, named: dict[str, pathlib.Path], config: Config, workdir: pathlib.Path) -> str:
        """What the checkpoints' base is called. Those of `dnd collect` keep a hub id that they
        name; else the given base decides, or the one that was pretrained in the workdir."""
        own = not config.train.checkpoints
        first = min(named)
        if own and len(named) == 1 and is_hub_id(first) and not first.endswith(f"/{BASE}"):
            return first
        has_own = own_base(config, workdir)
        return one_name(named, config.base.path or (workdir / BASE if has_own else None))

    def tensors(self, dataset: str | None = None) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(path, tensors) of one dataset's checkpoints, or of all, read one at a time."""
        for name, paths in self.folders.items():
            if dataset in (None, name):
                yield from ((str(path), _trained(path)) for path in paths)

    def digest(self, dataset: str | None = None) -> str:
        """sha256 of one dataset's checkpoints, or of all: their names, tensors and settings, but
        not where they or their base lie."""
        found = [
            (name, path)
            for name, paths in self.folders.items()
            if dataset in (None, name)
            for path in paths
        ]
        tensors = digests.contents(weights_file(path) for _, path in found)
        seen = []
        for name, path in found:
            settings = {**read_json(config_file(path)), "base_model_name_or_path": None}
            seen.append([name, path.name, tensors[weights_file(path)], settings])
        return digests.of_json(seen)

    def digest_of_format_0(self) -> str:
        """The digest in records without a format number: of sizes instead of contents."""
        seen = [
            [name, path.name, weights_file(path).stat().st_size, read_json(config_file(path))]
            for name, paths in self.folders.items()
            for path in paths
        ]
        return digests.of_json(seen)[:16]


def _trained(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint. Raises InputError as `load_adapter`, and for one that changes
    nothing of its base."""
    tensors = load_adapter(path)
    if not any(np.any(value) for key, value in tensors.items() if key.endswith(LORA_B)):
        raise InputError(
            f"{path}: every lora_B is zero, so it changes nothing: saved before training, or "
            "from a model that had lost it; save it again"
        )
    return tensors


def _hash(*parts) -> str:
    return digests.of_json([VERSION, *parts])[:24]


def make_target(config: Config, checkpoints: Checkpoints, cache: pathlib.Path) -> Target:
    """The target of config.generator.target. An element target's statistics are kept under
    `cache`."""
    if config.generator.target == "chunk":
        return ChunkTarget(checkpoints.layout, config.generator.bfloat16_checkpoints)
    path = (
        cache
        / f"statistics-{_hash(checkpoints.digest(), checkpoints.layout.to_json())}.safetensors"
    )
    stored = load_statistics(path)
    if stored is not None:
        return ElementTarget(checkpoints.layout, stored["mean"], stored["scale"])
    hosts.check_writes(path)
    total = sum(len(paths) for paths in checkpoints.folders.values())
    read = tqdm(
        checkpoints.tensors(), desc="statistics", unit="checkpoint", total=total, dynamic_ncols=True
    )
    target = ElementTarget.fit(checkpoints.layout, lambda: read)
    for stale in cache.glob("statistics-*.safetensors"):
        if re.fullmatch(r"statistics-[0-9a-f]{24}", stale.stem) and stale.is_file():
            stale.unlink()
    save_statistics(path, target)
    return target


@dataclasses.dataclass(frozen=True)
class TokenArray:
    """A dataset's targets (M, T, h, w), mapped into memory, and its importance weights (T,), None
    unless asked for."""

    targets: np.ndarray
    importance: np.ndarray | None


def token_array(
    checkpoints: Checkpoints,
    dataset: str,
    target: Target,
    cache: pathlib.Path,
    importance: bool = True,
) -> TokenArray:
    """The targets of a dataset's checkpoints, made once and then mapped from `cache`.

    Memory: two checkpoints, the tokens of one, and twice as many in float64 for the importance
    weights; never the whole array. Raises InputError for a checkpoint that is damaged or holds NaN,
    fewer than two of them or none that differ (importance weights need a spread), and a full disk.
    """
    statistics = {key: digests.of_array(value) for key, value in target.statistics().items()}
    kind = [type(target).__name__, getattr(target, "bfloat16", False), statistics]
    key = _hash(checkpoints.digest(dataset), checkpoints.layout.to_json(), kind, importance)
    folder = cache / dataset / key

    def stored() -> TokenArray | None:
        targets = open_array(folder / TOKENS)
        weights = open_array(folder / IMPORTANCE) if importance else None
        if targets is None or (importance and weights is None):
            return None
        return TokenArray(targets, None if weights is None else np.array(weights))

    array = stored()
    if array is None:
        hosts.check_writes(folder)
        _write_tokens(checkpoints, dataset, target, folder, importance)
        array = stored()
    return array


def _write_tokens(
    checkpoints: Checkpoints, dataset: str, target: Target, folder: pathlib.Path, importance: bool
) -> None:
    paths = [str(path) for path in checkpoints.folders[dataset]]
    shape = len(paths), *target.shape
    _remove_stale(folder)
    need_space(folder.parent, 4 * math.prod(shape), f"the tokens of {dataset}")
    moments = Moments()

    def tokens(reader: concurrent.futures.Executor) -> Iterator[np.ndarray]:
        # The next one is read while this one is encoded.
        ahead = reader.submit(_trained, paths[0])
        for i, path in enumerate(tqdm(paths, desc=dataset, unit="checkpoint", dynamic_ncols=True)):
            stop.check()
            tensors = ahead.result()
            if i + 1 < len(paths):
                ahead = reader.submit(_trained, paths[i + 1])
            encoded = np.ascontiguousarray(target.encode(tensors, path), "<f4")
            del tensors
            yield encoded
            if importance:
                moments.add(encoded)

    with replacing(folder, directory=True) as temporary:
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            write_array(temporary / TOKENS, shape, np.float32, tokens(reader))
        if importance:
            weights = importance_weights(moments, dataset)
            write_array(temporary / IMPORTANCE, weights.shape, weights.dtype, [weights])


def _remove_stale(folder: pathlib.Path) -> None:
    """Removes a dataset's arrays of other checkpoints or another target, and nothing else: folders
    named by a key that hold what `_write_tokens` writes."""
    for stale in folder.parent.glob("[0-9a-f]*"):
        named = re.fullmatch(r"[0-9a-f]{24}", stale.name) and stale != folder
        if named and (stale / TOKENS).is_file() and holds_only(stale, (TOKENS, IMPORTANCE)):
            shutil.rmtree(stale, ignore_errors=True)
