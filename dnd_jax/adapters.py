"""PEFT adapter folders: adapter_model.safetensors + adapter_config.json, written whole, read back and compared."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import save_file

from dnd_jax.errors import InputError
from dnd_jax.files import read_json, replacing
from dnd_jax.layout import PEFT_PREFIX, canonical
from dnd_jax.models.hf import read_safetensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA needs beside its tensors; the scale of B A is alpha / rank."""

    base: str  # name or path of the base model
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_peft(self) -> dict:
        """The fields of PEFT's adapter_config.json."""
        return {
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }


def save_adapter(
    folder: str | os.PathLike, tensors: Mapping[str, np.ndarray], config: AdapterConfig, card: str = ""
) -> pathlib.Path:
    """Writes an adapter folder, whole or not at all; `card` becomes its README.md. Raises InputError when the disk refuses."""
    folder = pathlib.Path(folder)
    stored = {PEFT_PREFIX + key: np.ascontiguousarray(value) for key, value in sorted(canonical(tensors).items())}
    with replacing(folder, directory=True) as temporary:
        save_file(stored, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config.to_peft(), indent=1) + "\n")
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return folder


def verify_adapter(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Reads a written adapter back and compares every tensor bit for bit. Raises InputError if anything differs."""
    stored = load_adapter(folder)
    expected = canonical(tensors)
    if stored.keys() != expected.keys() or not all(np.array_equal(stored[key], expected[key]) for key in expected):
        raise InputError(f"{folder}: what was read back differs from what was written; the disk is not to be trusted")


def load_adapter(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of an adapter folder (or a .safetensors file) under canonical keys. Raises InputError if missing or damaged."""
    path = pathlib.Path(folder)
    return canonical(read_safetensors(path / WEIGHTS if path.suffix != ".safetensors" else path))


def load_adapter_config(folder: str | os.PathLike) -> AdapterConfig:
    """The settings of an adapter folder. Raises InputError on what is no plain LoRA."""
    path = pathlib.Path(folder, CONFIG)
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {raw.get('peft_type')!r}, only LORA is supported")
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if raw.get(key):
            raise InputError(f"{path}: {key} = {raw[key]!r} is not supported")
    try:
        return AdapterConfig(
            base=str(raw.get("base_model_name_or_path") or ""),
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            targets=tuple(sorted(raw["target_modules"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a LoRA configuration ({error!r})") from None


def checkpoint_folders(root: str | os.PathLike, datasets: Sequence[str]) -> dict[str, list[pathlib.Path]]:
    """Adapter folders of each dataset under ROOT/DATASET/*/, in the order of the numbers in their names.

    Raises InputError naming the datasets without any.
    """
    found = {}
    for name in datasets:
        folders = [path.parent for path in pathlib.Path(root, name).glob(f"*/{WEIGHTS}")]
        found[name] = sorted(folders, key=lambda folder: ([int(d) for d in re.findall(r"\d+", folder.name)], folder.name))
    absent = [name for name, folders in found.items() if not folders]
    if absent:
        raise InputError(f"{root}: no checkpoints (DATASET/*/{WEIGHTS}) for {', '.join(absent)}")
    return found
