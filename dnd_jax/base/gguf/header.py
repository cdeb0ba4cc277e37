"""A GGUF file, opened: its metadata and where its tensors lie. The package gguf reads it; what is
damaged, or no language model, is refused in one line."""

import collections
import pathlib
import struct
from typing import Any

import numpy as np

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.core.whereabouts import flaw

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST = 1 << 20  # tensors, or keys, of a file that is no damaged one
# general.architecture, which is model_type in config.json too -> class in transformers
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
HUB = "take the model's own folder from the hub"
# general.type of files that are no model, and what they are.
OTHERS = {
    "adapter": "a LoRA adapter",
    "mmproj": "the picture or sound part of a model",
    "imatrix": "statistics for a quantisation",
    "vocab": "a vocabulary",
}


class Gguf:
    """An open GGUF file of a language model of ARCHITECTURES.

    tensors: {name: what the package gguf knows of it, its data mapped into memory}. Raises
    InputError, in one line, for a file that is damaged, or is something else.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        check_start(path)
        self._package = packages.load("gguf")
        try:
            reader = self._package.GGUFReader(path)
        except Exception as error:  # the package raises whatever a damaged file makes of its code
            raise InputError(
                f"{path}: not a whole GGUF file ({first_line(error)}); copy it again, or update "
                "the package gguf"
            ) from None
        self._fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.get("general.architecture")
        self._check_kind()

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except ValueError as error:  # no UTF-8
            raise InputError(
                f"{self.path}: {key} cannot be read ({first_line(error)}); copy the file again"
            ) from None

    def own(self) -> dict[str, Any]:
        """The metadata of its architecture, {key without the architecture's name: value}."""
        prefix = f"{self.architecture}."
        names = [key for key in self._fields if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.get(key) for key in names}

    @property
    def quantisation(self) -> str:
        """Q4_1, Q4_K_M, F16, ...: as the file says, else the type of most of its values."""
        try:
            name = self._package.LlamaFileType(self.get("general.file_type")).name
            return name.removeprefix("ALL_").removeprefix("MOSTLY_")
        except ValueError:
            values: collections.Counter = collections.Counter()
            for tensor in self.tensors.values():
                values[tensor.tensor_type.name] += int(tensor.n_elements)
            return values.most_common(1)[0][0]

    def values(self, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """Values of a tensor in float32; rows: only these, of a matrix. Raises InputError for a
        type that the package gguf cannot undo."""
        tensor = self.tensors[name]
        data = tensor.data if rows is None else tensor.data[rows]
        try:
            found = self._package.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which the package gguf "
                "cannot undo; take a file of another quantisation, such as Q8_0"
            ) from None
        return np.asarray(found, np.float32)

    def _check_kind(self) -> None:
        kind, parts = self.get("general.type", "model"), self.get("split.count", 1)
        if kind != "model":
            raise InputError(
                f"{self.path}: {OTHERS.get(kind, kind)}, no language model (general.type "
                f"{kind!r}); give the model's own file"
            )
        if parts > 1:
            raise InputError(
                f"{self.path}: one of {parts} parts of a model (split.count); join them by "
                "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`, and give that file"
            )
        if not self.tensors:
            raise InputError(
                f"{self.path}: a vocabulary without weights; give the model's own file"
            )
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{self.path}: general.architecture {self.architecture!r} is not read from GGUF "
                f"files (read: {', '.join(ARCHITECTURES)}); {HUB}, if its family is known here "
                "(docs/BASES.md)"
            )


def check_start(path: pathlib.Path) -> None:
    """Raises InputError for what is no GGUF file of little-endian version 2 or 3, by its first
    bytes."""
    if line := flaw(path):
        raise InputError(line)
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not start.startswith(MAGIC):
        raise InputError(f"{path}: not a GGUF file; copy it again")
    if len(start) < 24:
        raise InputError(f"{path}: not a whole GGUF file (it ends in its head); copy it again")
    version, tensors, keys = struct.unpack("<IQQ", start[4:])
    if version & 0xFFFF == 0:
        raise InputError(
            f"{path}: a big-endian GGUF file; turn it by `gguf-convert-endian FILE little`"
        )
    if version not in VERSIONS:
        raise InputError(
            f"{path}: GGUF version {version}; versions 2 and 3 are read: convert the model again"
        )
    if max(tensors, keys) > MOST:
        raise InputError(f"{path}: not a whole GGUF file ({tensors} tensors); copy it again")
