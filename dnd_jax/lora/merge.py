"""Base + adapter as one ordinary Hugging Face folder, without PyTorch and without holding the
model.

    dnd generate --generator=RUN --prompts=FILE --out=DIR --merge=MODEL [--base=FOLDER]

Each shard of the base is copied as a file and the adapted matrices are changed in place, one at a
time: W + scale * B A in float32, rounded to the base's own dtype. Everything else that the base
ships (settings, tokenizer, code, licences) is copied, but for its README and weights in other
formats.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnd_jax.base import hub
from dnd_jax.base.hf_config import read_config
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json, replacing
from dnd_jax.core.tensors import (
    DTYPES,
    INDEX,
    WHOLE,
    Stored,
    open_tensors,
    opened,
    stored_tensors,
)
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.card import names_hub_model
from dnd_jax.lora.fit import TOWERS
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.peft_settings import load_adapter_config

# Files of a base on the hub that a merged model needs or must have.
FILES = (*hub.FILES, "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*POLICY*")
TEMPLATES = "additional_chat_templates"  # the one folder that transformers reads
# Weights, what training left beside them, and what a folder made of a GGUF file says of that.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|ot|npz|tflite"
    r"|index\.json)"
    r"|trainer_state\.json|gguf\.json"
)
_NAMES = ("_name_or_path", "name_or_path")  # where transformers read a config or tokenizer from


def merge_adapter(
    base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike, card: str = ""
) -> pathlib.Path:
    """Writes the merged model to `out`, whole or not at all, and returns it. base: a folder,
    package or hub id.

    Raises InputError listing the adapted modules that the base lacks, or stores in other shapes or
    quantised; for a base with an adapter beside it; and for weights that its dtype has no room for.
    """
    folder = hub.resolve(base, FILES)
    read_config(folder)
    tensors, scale = load_adapter(adapter), load_adapter_config(adapter).scale
    stored = stored_tensors(folder)
    weights = _adapted(stored, tensors, f"{adapter}: cannot be merged into {folder}")
    with replacing(out, directory=True) as temporary:
        _copy_documents(folder, temporary)
        if WHOLE in {place.path.name for place in stored.values()}:
            (temporary / INDEX).unlink(missing_ok=True)  # of shards that do not count
        for shard in sorted({place.path for place in stored.values()}):
            shutil.copyfile(shard, temporary / shard.name)
            here = {name: module for name, module in weights.items() if stored[name].path == shard}
            _add(temporary / shard.name, here, tensors, scale, out)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return pathlib.Path(out)


def _adapted(
    stored: Mapping[str, Stored], tensors: Mapping[str, np.ndarray], title: str
) -> dict[str, str]:
    """{name of a stored weight: the adapted module that it is of}. Raises InputError that lists the
    modules whose weight is missing, ambiguous or of another shape."""
    weights, faults = {}, []
    for module in LoraLayout.from_tensors(tensors).modules:
        names = _spellings(f"{module}.weight", stored)
        if len(names) != 1:
            faults.append(
                f"{module}.weight is " + (f"one of {' and '.join(names)}" if names else "missing")
            )
            continue
        place = stored[names[0]]
        b, a = (tensors[f"{module}.lora_{side}.weight"] for side in "BA")
        if place.shape != (len(b), a.shape[1]) or place.dtype not in DTYPES:
            faults.append(
                f"{names[0]} is {place.shape} {place.dtype}, the adapter is for "
                f"{(len(b), a.shape[1])} in floating point"
            )
        weights[names[0]] = module
    if faults:
        raise listed(title, faults)
    return weights


def _spellings(name: str, stored: Mapping[str, Stored]) -> Sequence[str]:
    """The stored names that can be this one.

    A name that is stored as it is counts alone; else TOWERS may be others in a file.
    """
    if name in stored:
        return [name]
    bare = TOWERS.sub("", name)
    return [other for other in stored if TOWERS.sub("", other) == bare]


def _copy_documents(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Copies what stands beside the weights; local paths that transformers left in settings go."""
    for path in folder.iterdir():
        if path.name == TEMPLATES and path.is_dir():
            shutil.copytree(path, out / path.name, copy_function=shutil.copyfile)
        if not path.is_file() or path.name.startswith((".", "README")):
            continue
        if path.name.endswith(".safetensors.index.json") or not _WEIGHTS.fullmatch(path.name):
            shutil.copyfile(path, out / path.name)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        raw = read_json(out / name) if (out / name).is_file() else {}
        kept = _without_paths(raw)
        if kept != raw:
            text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
            (out / name).write_text(text, encoding="utf-8")


def _without_paths(value: Any) -> Any:
    """A JSON value without the local paths that transformers left in it, at any depth."""
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    local = [key for key in _NAMES if value.get(key) and not names_hub_model(str(value[key]))]
    return {key: _without_paths(item) for key, item in value.items() if key not in local}


def _add(
    shard: pathlib.Path,
    modules: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    scale: float,
    out: str | os.PathLike,
) -> None:
    """Adds the updates of {stored weight: module} to a shard, in place, and reads them back."""
    weights = open_tensors(shard, "r+")
    for name, module in modules.items():
        a, b = (np.asarray(tensors[f"{module}.lora_{side}.weight"], np.float32) for side in "AB")
        weight = weights[name]
        with np.errstate(all="ignore"):
            wide = np.asarray(weight, np.float32) + np.float32(scale) * (b @ a)
            merged = wide.astype(weight.dtype)
        if not np.all(np.isfinite(merged)):
            raise InputError(
                f"{out}: {name} would hold NaN or Inf in {weight.dtype}; the base or the adapter "
                "holds them, or numbers that are too large"
            )
        weight[:] = merged
        weight.flush()
        with opened(shard) as file:
            if not np.array_equal(file.get_tensor(name), merged):
                raise InputError(
                    f"{out}: what was read back differs from what was written; the disk is not to "
                    "be trusted"
                )
