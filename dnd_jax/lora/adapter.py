"""PEFT adapter folders: adapter_model.safetensors + adapter_config.json, written whole, read back
and compared."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import is_of_system, read_json, replacing
from dnd_jax.core.tensors import read_safetensors, write_safetensors
from dnd_jax.lora.names import LORA_B, PEFT_PREFIX, are_pefts, canonical, is_headless
from dnd_jax.lora.peft_settings import (
    BASE_WEIGHTS,
    CARD,
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    b_factor,
    config_file,
    load_adapter_config,
    read_shapes,
    stored_names,
    weights_file,
)

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def save_adapter(
    folder: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    config: AdapterConfig,
    card: str = "",
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes an adapter folder, whole or not at all; `card` becomes its CARD. dtype: one of DTYPES,
    of the stored tensors.

    Raises InputError when the disk refuses, and in the place of what is none of ours.
    """
    folder = pathlib.Path(folder)
    check_ours(folder)
    stored = {PEFT_PREFIX + key: value for key, value in sorted(_stored(tensors, dtype).items())}
    with replacing(folder, directory=True) as temporary:
        notes = {"format": "pt"} | ({BASE_WEIGHTS: config.weights} if config.weights else {})
        write_safetensors(temporary / WEIGHTS, stored, notes)
        (temporary / CONFIG).write_text(json.dumps(config.to_peft(), indent=1) + "\n")
        if card:
            (temporary / CARD).write_text(card, encoding="utf-8")
    return folder


def is_ours(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter that `save_adapter` wrote, and nothing else but files of
    systems: PEFT and other tools write more settings."""
    if not {WEIGHTS, CONFIG} <= _names(folder) <= {WEIGHTS, CONFIG, CARD}:
        return False
    raw = read_json(folder / CONFIG)
    return (
        isinstance(raw, dict) and raw.keys() <= AdapterConfig("", 1, 1.0, (), "x").to_peft().keys()
    )


def check_ours(folder: pathlib.Path) -> None:
    """Raises InputError unless a folder is absent, empty or `is_ours`, so that it may be
    replaced."""
    if folder.is_dir() and _names(folder) and not is_ours(folder):
        raise InputError(f"{folder}: holds what dnd_jax did not make; move it to another place")


def check_called(folders: Iterable[pathlib.Path], base: str) -> None:
    """Raises InputError for a finished adapter that calls its base otherwise, if `base` is not
    empty."""
    for folder in folders if base else ():
        if (called := load_adapter_config(folder).base) != base:
            raise InputError(
                f"{folder}: is finished, and calls its base {called!r}; give --base-name={base} to "
                "`dnd train`, or use another --workdir"
            )


def _names(folder: pathlib.Path) -> set[str]:
    return {name for name in os.listdir(folder) if not is_of_system(name)}


def verify_adapter(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], dtype: str = "float32"
) -> None:
    """Reads a written adapter back and compares every tensor bit for bit. Raises InputError if
    anything differs."""
    stored, expected = load_adapter(folder), _stored(tensors, dtype)
    if stored.keys() != expected.keys() or not all(
        stored[key].dtype == value.dtype and np.array_equal(stored[key], value)
        for key, value in expected.items()
    ):
        raise InputError(
            f"{folder}: what was read back differs from what was written; the disk is not to be "
            "trusted"
        )


def _stored(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The tensors as they are stored: canonical keys, one dtype, C order."""
    return {
        key: np.ascontiguousarray(value, DTYPES[dtype]) for key, value in canonical(tensors).items()
    }


def load_adapter(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint (an adapter folder or a flat .safetensors file) under canonical
    keys, per-module alphas folded into B. Raises InputError if missing or damaged."""
    read_shapes(path)  # names what is there instead, and what is no floating point
    stored = read_safetensors(weights_file(path))
    tensors, headless = canonical(stored), is_headless(stored)
    config = (
        pathlib.Path(path) / CONFIG
        if pathlib.Path(path).suffix != ".safetensors"
        else config_file(path)
    )
    raw = read_json(config) if config.is_file() else {}
    for key in [key for key in tensors if key.endswith(LORA_B)]:
        factor = b_factor(raw, key.removesuffix(LORA_B), headless)
        if factor != 1:
            tensors[key] = np.asarray(tensors[key], np.float32) * np.float32(factor)
    return tensors


def fingerprint(path: str | os.PathLike) -> str:
    """sha256 of a checkpoint's settings and tensors, as they are stored."""
    return digests.of_description(config_file(path), weights_file(path))


def is_made_from(folder: pathlib.Path, card: str) -> bool:
    """Whether a folder's card names its sources by the same hashes as `card`; their paths and the
    wording do not count."""
    path = folder / CARD
    return path.is_file() and _hashes(
        path.read_text(encoding="utf-8", errors="replace")
    ) == _hashes(card)


def _hashes(card: str) -> list[str]:
    return re.findall(r"sha256 (\w+)", card)


def as_folder(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint as a folder that PEFT loads: itself, or for a flat file, or names that a wrapper
    has changed, one written to `folder`, kept if it is of that file."""
    if path.suffix != ".safetensors" and are_pefts(stored_names(path)):
        return path
    card = f"{path.name} (sha256 {fingerprint(path)}) as a folder that PEFT loads.\n"
    if not is_made_from(folder, card):
        save_adapter(folder, load_adapter(path), load_adapter_config(path), card)
    return folder
