"""Base + adapter as one ordinary Hugging Face folder, without PyTorch and without holding the
model.

    dnd generate --generator=RUN --prompts=FILE --out=DIR --merge=MODEL [--base=FOLDER]

Each shard of the base is copied as a file and the adapted matrices are changed in place, one at a
time: W + scale * B A in float32, rounded to the base's own dtype.
"""

import os
import pathlib
import shutil

import numpy as np
from safetensors import safe_open

from dnd_jax.base.hub import resolve
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import read_json, replacing
from dnd_jax.core.tensors import DTYPES, open_tensors, opened
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.peft_settings import load_adapter_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
KEPT = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
)  # beside the weights: settings, tokenizer, chat template


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a base. Raises InputError when there is none, or one that the index names
    is missing."""
    index = folder / INDEX
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [SINGLE]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise InputError(
            f"{folder}: no {', '.join(absent)}; merging needs the base's weights as safetensors"
        )
    return [folder / name for name in names]


def _find(shards: list[pathlib.Path]) -> dict[str, tuple[pathlib.Path, tuple[int, ...], str]]:
    """{tensor: (shard, shape, dtype as safetensors names it)} from the headers."""
    found = {}
    for shard in shards:
        with opened(shard) as file:
            for key in file.keys():  # noqa: SIM118, not a dict
                part = file.get_slice(key)
                found[key] = shard, tuple(part.get_shape()), part.get_dtype()
    return found


def merge_adapter(
    base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike, card: str = ""
) -> pathlib.Path:
    """Writes the merged model to `out`, whole or not at all, and returns it. base: a folder,
    package or hub id.

    Raises InputError listing the adapted modules that the base lacks, or stores in other shapes or
    quantised.
    """
    folder, tensors, scale = (
        resolve(base),
        load_adapter(adapter),
        load_adapter_config(adapter).scale,
    )
    modules = LoraLayout.from_tensors(tensors).modules
    shards = _shards(folder)
    stored, faults = _find(shards), []
    for module in modules:
        shape = (
            tensors[f"{module}.lora_B.weight"].shape[0],
            tensors[f"{module}.lora_A.weight"].shape[1],
        )
        _, found, dtype = stored.get(f"{module}.weight", (None, None, None))
        if found is None:
            faults.append(f"{module}.weight is missing")
        elif found != shape or dtype not in DTYPES:
            faults.append(
                f"{module}.weight is {found} {dtype}, the adapter is for {shape} in floating point"
            )
    if faults:
        raise listed(f"{adapter}: cannot be merged into {folder}", faults)

    with replacing(out, directory=True) as temporary:
        for path in folder.iterdir():
            if path.is_file() and path.suffix in KEPT:
                shutil.copyfile(path, temporary / path.name)
        for shard in shards:
            shutil.copyfile(shard, temporary / shard.name)
            weights = open_tensors(temporary / shard.name, "r+")
            for module in modules:
                if stored[f"{module}.weight"][0] == shard:
                    a, b = (
                        np.asarray(tensors[f"{module}.lora_{side}.weight"], np.float32)
                        for side in "AB"
                    )
                    weight = weights[f"{module}.weight"]
                    merged = (np.asarray(weight, np.float32) + np.float32(scale) * (b @ a)).astype(
                        weight.dtype
                    )
                    weight[:] = merged
                    weight.flush()
                    with safe_open(temporary / shard.name, framework="numpy") as file:
                        if not np.array_equal(file.get_tensor(f"{module}.weight"), merged):
                            raise InputError(
                                f"{out}: what was read back differs from what was written; the "
                                "disk is not to be trusted"
                            )
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return pathlib.Path(out)
