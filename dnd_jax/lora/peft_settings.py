"""PEFT's adapter_config.json: what is read of it, what is folded into alpha and B, and what is
refused."""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

from dnd_jax.base.identity import base_name, base_weights
from dnd_jax.config import schema
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json
from dnd_jax.core.tensors import DTYPES, Stored, file_notes, file_tensors
from dnd_jax.lora.found import CONFIG, WEIGHTS, what_is_there
from dnd_jax.lora.names import LORA_A, canonical, is_headless
from dnd_jax.lora.peft_fields import check_fields, is_targeted, own_value

CARD = "README.md"
BASE_WEIGHTS = "base_weights"  # in the notes of an adapter's tensors: PEFT's settings have no place


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA needs beside its tensors; the scale of B A is alpha / rank for every module.

    Other scales are folded when an adapter is read, so that what we write is understood by readers
    that know nothing else (vLLM ignores alpha patterns, llama.cpp rsLoRA too): rsLoRA's alpha /
    sqrt(rank) becomes alpha * sqrt(rank) / rank, and a module with an alpha of its own has its B
    multiplied by that alpha over the common one.
    """

    base: str  # name or path of the base model
    rank: int
    alpha: float
    targets: tuple[str, ...]  # the last parts of the modules' names, or whole paths
    revision: str = ""  # of the base on the hub, if the adapter names one
    # The GGUF file of the base that it was trained on, as Source.said; empty: none, or not known.
    weights: str = ""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_json(self) -> dict:
        """For records of ours."""
        return {key: of for key, of in dataclasses.asdict(self).items() if of or key != "weights"}

    def to_peft(self) -> dict:
        """The fields of PEFT's adapter_config.json."""
        return {
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            **({"revision": self.revision} if self.revision else {}),
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }


def adapter_of(base: str | os.PathLike, lora: schema.Lora, name: str = "") -> AdapterConfig:
    """The settings of an adapter that is trained on a base. name: what it calls the base; empty:
    its hub id or absolute path."""
    called, weights = name or base_name(base), base_weights(base)
    return AdapterConfig(called, lora.rank, lora.alpha, lora.targets, weights=weights)


def weights_file(path: str | os.PathLike) -> pathlib.Path:
    """The tensors of a checkpoint, which is an adapter folder or a flat N.safetensors file."""
    path = pathlib.Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS


def config_file(path: str | os.PathLike) -> pathlib.Path:
    """The adapter_config.json of a checkpoint: in its folder; for a flat file beside it, or one
    folder up.

    Raises InputError when a flat file has none.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        return path / CONFIG
    for folder in (path.parent, path.parent.parent):
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    raise InputError(
        f"{path}: no {CONFIG} in {path.parent} or {path.parent.parent}; flat checkpoints need the "
        "one that they were trained with "
        "(base_model_name_or_path, r, lora_alpha, target_modules)"
    )


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """{canonical name: shape} of a checkpoint, from the file's header alone. Raises InputError if
    missing, damaged, or of another type than floating point."""
    return canonical({key: part.shape for key, part in _stored(path).items()})


def stored_names(path: str | os.PathLike) -> list[str]:
    """The names of a checkpoint's tensors, as they are stored. Raises InputError likewise."""
    return list(_stored(path))


def _stored(path: str | os.PathLike) -> dict[str, Stored]:
    file = weights_file(path)
    if not file.is_file():
        raise InputError(what_is_there(path))
    parts = file_tensors(file)
    faults = [
        f"{key} is stored as {part.dtype}; save it as float32, float16 or bfloat16"
        for key, part in parts.items()
        if part.dtype not in DTYPES
    ]
    if faults:
        raise listed(f"{file}: not a usable LoRA adapter", faults)
    return parts


def b_factor(raw: Mapping, module: str, headless: bool) -> float:
    """What B of a module is multiplied by when it is read: its own alpha over the common one."""
    if not raw.get("alpha_pattern"):
        return 1.0
    return own_value(raw, "alpha_pattern", "lora_alpha", module, headless) / raw["lora_alpha"]


def read_fields(path: str | os.PathLike) -> dict:
    """The fields of a checkpoint's adapter_config.json. Raises InputError on what is no plain LoRA
    of PEFT."""
    file = config_file(path)
    if not file.is_file() or not weights_file(path).is_file():
        raise InputError(what_is_there(path))
    raw = read_json(file)
    if isinstance(raw, dict) and {"fine_tune_type", "lora_parameters"} & raw.keys():
        raise InputError(f"{file}: an adapter of MLX; convert it to PEFT's form")
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise InputError(f"{file}: peft_type {kind!r}, only LORA is supported")
    check_fields(raw, file)
    return raw


def _ranks(path: str | os.PathLike, raw: Mapping) -> dict[str, int]:
    """The rank of each module of a checkpoint with these fields. Raises InputError listing the
    modules whose ranks are not those of the settings, and those that its target_modules leave
    out."""
    file = config_file(path)
    headless = is_headless(stored_names(path))
    ranks = {
        key.removesuffix(LORA_A): shape[0]
        for key, shape in read_shapes(path).items()
        if key.endswith(LORA_A)
    }
    with _reading(file):
        faults = [
            f"{module} has rank {rank}, the settings say {wanted}"
            for module, rank in ranks.items()
            if rank != (wanted := int(own_value(raw, "rank_pattern", "r", module, headless)))
        ]
        stray = [module for module in ranks if not is_targeted(raw, module, headless)]
    if faults:
        raise listed(f"{file}: not the settings of {weights_file(path).name}", faults)
    if stray:
        title = f"{file}: its target_modules leave out what PEFT then does not load"
        raise listed(title, sorted(stray), most=3)
    return ranks


def module_scales(path: str | os.PathLike) -> dict[str, float]:
    """What B A of each module is multiplied by, where B is `load_adapter`'s, an alpha of the module
    folded into it. Raises InputError as `load_adapter_config`, but for ranks that differ."""
    raw = read_fields(path)
    power = 0.5 if raw.get("use_rslora") else 1.0
    return {module: raw["lora_alpha"] / rank**power for module, rank in _ranks(path, raw).items()}


def load_adapter_config(path: str | os.PathLike) -> AdapterConfig:
    """The settings of a checkpoint, with rsLoRA folded into alpha and the one rank that its tensors
    have.

    Raises InputError on what is no plain LoRA, and listing the modules when their ranks differ or
    are not those of the settings.
    """
    file, raw = config_file(path), read_fields(path)
    ranks = _ranks(path, raw)
    if len(set(ranks.values())) > 1:
        common = max(set(ranks.values()), key=list(ranks.values()).count)
        mixed = [f"{module} has {rank}" for module, rank in ranks.items() if rank != common]
        raise listed(f"{path}: tokens need one rank for all modules; most have {common}", mixed)
    with _reading(file):
        rank, alpha, targets = (
            next(iter(ranks.values()), int(raw["r"])),
            float(raw["lora_alpha"]),
            raw["target_modules"],
        )
        # A pattern or a choice of layers is written out as whole paths: what we write then names
        # exactly these modules.
        whole = isinstance(targets, str) or any(
            raw.get(k) not in (None, [], "")
            for k in ("layers_to_transform", "layers_pattern", "exclude_modules")
        )
        return AdapterConfig(
            base=str(raw.get("base_model_name_or_path") or ""),
            revision=str(raw.get("revision") or ""),
            rank=rank,
            alpha=alpha * rank**0.5 if raw.get("use_rslora") else alpha,
            targets=tuple(sorted(ranks if whole else targets)),
            weights=file_notes(weights_file(path)).get(BASE_WEIGHTS, ""),
        )


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
    """Raises InputError in the place of what odd settings make of the code inside."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise InputError(f"{file}: not a LoRA configuration ({error!r})") from None
