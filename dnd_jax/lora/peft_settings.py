"""PEFT's adapter_config.json: what is read of it, what is folded into alpha and B, and what is
refused."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping

from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json
from dnd_jax.core.tensors import opened
from dnd_jax.lora.layout import canonical

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


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
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }


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


# Settings of PEFT under which an adapter is not W + scale * B A alone, or not on the modules that
# it names.
_OTHER_METHODS = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
)
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """{canonical key: shape} of a checkpoint, from the file's header alone. Raises InputError if
    missing or damaged."""
    with opened(weights_file(path)) as file:
        keys = file.keys()  # of a file, which is not a dictionary
        return canonical({key: tuple(file.get_slice(key).get_shape()) for key in keys})


def _of_module(raw: Mapping, pattern: str, default: str, module: str):
    """A module's own rank or alpha, by PEFT's rule: the first pattern that ends its path, else the
    common value."""
    found = (
        value
        for key, value in (raw.get(pattern) or {}).items()
        if re.match(rf"(.*\.)?({key})$", module)
    )
    return next(found, raw[default])


def b_factor(raw: Mapping, module: str) -> float:
    """What B of a module is multiplied by when it is read: its own alpha over the common one."""
    if not raw.get("alpha_pattern"):
        return 1.0
    return _of_module(raw, "alpha_pattern", "lora_alpha", module) / raw["lora_alpha"]


def load_adapter_config(path: str | os.PathLike) -> AdapterConfig:
    """The settings of a checkpoint, with rsLoRA folded into alpha and the one rank that its tensors
    have.

    Raises InputError on what is no plain LoRA, and listing the modules when their ranks differ or
    are not those of the settings.
    """
    file = config_file(path)
    raw = read_json(file)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise InputError(f"{file}: peft_type {kind!r}, only LORA is supported")
    for key in _OTHER_METHODS:
        if raw.get(key):
            raise InputError(f"{file}: {key} = {raw[key]!r} is not supported")
    if str(raw.get("init_lora_weights")).startswith(_CHANGE_THE_BASE):
        raise InputError(
            f"{file}: init_lora_weights = {raw['init_lora_weights']!r}: the matrices belong to a "
            "base that PEFT changes when it "
            "loads them; convert it by save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    if raw.get("bias", "none") != "none":
        raise InputError(f"{file}: bias = {raw['bias']!r} is not supported")
    ranks = {
        key.removesuffix(LORA_A): shape[0]
        for key, shape in read_shapes(path).items()
        if key.endswith(LORA_A)
    }
    try:
        faults = [
            f"{module} has rank {rank}, the settings say {wanted}"
            for module, rank in ranks.items()
            if rank != (wanted := int(_of_module(raw, "rank_pattern", "r", module)))
        ]
        if faults:
            raise listed(f"{file}: not the settings of {weights_file(path).name}", faults)
        if len(set(ranks.values())) > 1:
            common = max(set(ranks.values()), key=list(ranks.values()).count)
            mixed = [f"{module} has {rank}" for module, rank in ranks.items() if rank != common]
            raise listed(f"{path}: tokens need one rank for all modules; most have {common}", mixed)
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
            rank=rank,
            alpha=alpha * rank**0.5 if raw.get("use_rslora") else alpha,
            targets=tuple(sorted(ranks if whole else targets)),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise InputError(f"{file}: not a LoRA configuration ({error!r})") from None
