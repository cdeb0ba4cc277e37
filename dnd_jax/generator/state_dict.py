"""A state dict of PyTorch, as tools leave it: alone or inside a training checkpoint, under a
wrapper's names, or as safetensors. Needs PyTorch; nothing pickled is run."""

import os
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line, is_no_room, listed
from dnd_jax.core.tensors import read_safetensors
from dnd_jax.core.whereabouts import flaw
from dnd_jax.lora.names import WRAPPERS

torch = packages.deferred("torch")
# Where a training checkpoint keeps the model's tensors.
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "net", "generator")


def read_state_dict(path: str | os.PathLike, known: str = "") -> dict[str, np.ndarray]:
    """The tensors of a .pth or .safetensors file by their names in the model; where the format
    allows, they are mapped into memory rather than read.

    known: a name that such a model has. Whatever stands before it before every name too, as DDP's
    module., goes; so do the parts that compilation and FSDP put into names. Raises InputError for a
    file that is none, or whose checksums are not its tensors'.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise InputError(_what_folder(path))
    if path.suffix == ".safetensors":
        return _bare(read_safetensors(path), known, path)
    state = _model_of(_loaded(path), path)
    return _bare({key: _array(key, value, path) for key, value in state.items()}, known, path)


def _what_folder(folder: pathlib.Path) -> str:
    """The user's line for a folder in the place of a file."""
    names = sorted(os.listdir(folder))
    files = [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors"))]
    if "generator.json" in names:
        return f"{folder}: is a generator of dnd_jax already, which needs no import"
    if {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} & set(names):
        return f"{folder}: is a checkpoint of Orbax; give the .pth file of the released generator"
    there = f"; there is {folder / files[0]}" if files else ""
    return f"{folder}: is a folder; give the .pth file of the released generator{there}"


def _loaded(path: pathlib.Path):
    """What a .pth file holds."""
    if line := flaw(path):
        raise InputError(line)
    _check_sums(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError:  # PyTorch advises to run what is pickled in it
        raise InputError(
            f"{path}: holds more than tensors, or is damaged; nothing pickled is run here: save "
            "its state_dict() alone"
        ) from None
    except Exception as error:  # of any kind, from its reader of the old format
        if is_no_room(error):
            raise
        reason = first_line(error).split(". ")[0]
        raise InputError(f"{path}: not a state dict that can be read ({reason})") from None


def _check_sums(path: pathlib.Path) -> None:
    """Raises InputError for an archive with a damaged part: PyTorch does not look at the
    checksums."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); copy the file again") from None
    if damaged:
        raise InputError(f"{path}: {damaged} in it is damaged; copy the file again")


def _model_of(state: object, path: pathlib.Path) -> Mapping:
    """The model's tensors: all of a state dict, or those inside a training checkpoint."""
    if _is_flat(state):
        return state
    inside = [key for key in _INSIDE if isinstance(state, Mapping) and _is_flat(state.get(key))]
    if len(inside) == 1:
        return state[inside[0]]
    keys = [str(key) for key in state] if isinstance(state, Mapping) else []
    there = f"; it has {', '.join(sorted(keys)[:5])}" if keys else f", not a {type(state).__name__}"
    raise InputError(f"{path}: expected a flat dictionary of tensors by name{there}")


def _is_flat(state: object) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    )


def _bare(
    tensors: Mapping[str, np.ndarray], known: str, path: pathlib.Path
) -> dict[str, np.ndarray]:
    """The tensors under the model's own names."""
    clean = {".".join(p for p in key.split(".") if p not in WRAPPERS): key for key in tensors}
    fronts = {key.removesuffix(known) for key in clean if key.endswith(known)}
    front = fronts.pop() if len(fronts) == 1 else ""
    if not all(key.startswith(front) for key in clean):
        front = ""
    if len(clean) < len(tensors):
        twice = sorted(tensors.keys() - clean.values())
        raise listed(f"{path}: names that come to one without a wrapper's parts", twice)
    return {name.removeprefix(front): tensors[key] for name, key in clean.items()}


def _array(key: str, value, path: pathlib.Path) -> np.ndarray:
    """A tensor as an array, which NumPy has no bfloat16 of its own for."""
    raw, dtype = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}.get(value.dtype, (None, None))
    try:
        value = value.detach()
        return value.numpy() if raw is None else value.view(raw).numpy().view(dtype)
    except (TypeError, RuntimeError):  # float8, quantised, sparse
        kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
        raise InputError(
            f"{path}: {key} is stored as {kind}; save it as dense float32, float16 or bfloat16"
        ) from None
