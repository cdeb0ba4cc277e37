"""Generators of the original PyTorch release (.pth state dicts) <-> our parameters.

    module, params = load_reference_generator("generator.pth", features, kernel_size=9)
    tokens = module.apply({"params": params}, condition)

Every tensor is mapped exactly once in both directions, without rounding: loading and saving gives the same bits. Needs PyTorch.
"""

import os
import pathlib
import pickle
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dnd_jax.errors import InputError, listed
from dnd_jax.files import replacing
from dnd_jax.models.generator import LENGTH_PROJECTIONS, Generator
from dnd_jax.models.hyperconv import Features

CRITERION_WEIGHT = "criterion_weight"

# How a stored tensor becomes ours; each is its own kind of inverse. Ours: kernels (grid axes in (N, L, C) order, in, out).
_AS_IS = (lambda x: x, lambda x: x)
_LINEAR = (lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
_KERNEL_REVERSED = (lambda x: x.transpose(3, 2, 1, 0), lambda x: x.transpose(3, 2, 1, 0))  # grid stored (L, N)
_KERNEL = (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # grid stored in our order

_STAGE = {
    "linear1.norm.weight": ("norm/scale", _AS_IS),
    "linear1.norm.bias": ("norm/bias", _AS_IS),
    "linear1.conv1w.weight": ("conv1w", _KERNEL_REVERSED),
    "linear1.conv1h.weight": ("conv1h", _KERNEL),
    "linear1.conv2h.weight": ("conv2h", _KERNEL),
    "linear1.conv2w.weight": ("conv2w", _KERNEL_REVERSED),
    "linear1.bias": ("bias", _AS_IS),
    "linear2.weight": ("conv_n", _KERNEL),
    "linear2.bias": ("bias_n", _AS_IS),
}
_PROJECTION = {
    "down_proj.weight": ("length_projection/down/kernel", _LINEAR),
    "down_proj.bias": ("length_projection/down/bias", _AS_IS),
    "gate_proj.weight": ("length_projection/gate/kernel", _LINEAR),
    "gate_proj.bias": ("length_projection/gate/bias", _AS_IS),
}


def _table(num_stages: int, projected: bool) -> dict[str, tuple[str, tuple]]:
    """Name in the original's state dict -> (our path, (to ours, from ours))."""
    table = {
        f"model.decoder.module_list.{i}.{theirs}": (f"decoder/stage_{i}/{ours}", transforms)
        for i in range(num_stages)
        for theirs, (ours, transforms) in _STAGE.items()
    }
    return table | (_PROJECTION if projected else {})


def _read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a state dict that can be read safely ({reason})") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path}: expected a flat dictionary of tensors")
    return {key: value.numpy() for key, value in state.items()}


def load_reference_generator(
    path: str | os.PathLike,
    features: Sequence[Features],
    kernel_size: int,
    length_projection: str | None = None,
    max_text_length: int | None = None,
) -> tuple[Generator, dict]:
    """The original's .pth file as (module, params): `module.apply({"params": params}, condition) -> tokens [B, T, h, w]`.

    features: (N, L, C) of every stage. length_projection: None, "camera_ready" or "first_release"; with one, the condition is
    (B, N, max_text_length, C), else (B, N, L, C). Raises InputError listing every missing, unknown or misshapen tensor.
    """
    if length_projection is not None and length_projection not in LENGTH_PROJECTIONS:
        raise InputError(f"length_projection {length_projection!r} is none of {LENGTH_PROJECTIONS}")
    features = tuple(tuple(int(x) for x in f) for f in features)
    n, length, c = features[0]
    if length_projection and max_text_length is None:
        raise InputError("max_text_length is needed with a length projection")
    module = Generator(features, kernel_size, length_projection)
    condition = jax.ShapeDtypeStruct((1, n, max_text_length if length_projection else length, c), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), condition)["params"]
    expected = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(shapes)}

    state = _read_state_dict(path)
    table = _table(len(features) - 1, length_projection is not None)
    faults = [f"{key} is missing" for key in table.keys() - state.keys()]
    faults += [f"{key} is unknown" for key in state.keys() - table.keys() - {CRITERION_WEIGHT}]
    params: dict = {}
    for key in table.keys() & state.keys():
        ours, (to_ours, _) = table[key]
        value = to_ours(state[key]) if state[key].ndim == len(expected[ours]) else state[key]
        if value.shape != expected[ours]:
            faults.append(f"{key} has shape {state[key].shape}, which does not fit features {features} and kernel {kernel_size}")
            continue
        *parents, leaf = ours.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(value)
    if faults:
        raise listed(f"{path}: not the state dict of this generator", sorted(faults))
    return module, params


def load_criterion_weight(path: str | os.PathLike) -> np.ndarray:
    """The importance weights, float32 [T], that a .pth file carries."""
    state = _read_state_dict(path)
    if CRITERION_WEIGHT not in state:
        raise InputError(f"{path}: holds no {CRITERION_WEIGHT}")
    return state[CRITERION_WEIGHT].reshape(-1)


def save_reference_generator(
    module: Generator, params: Mapping, path: str | os.PathLike, criterion_weight: np.ndarray
) -> pathlib.Path:
    """Writes our parameters as the original's state dict, with criterion_weight (T,) stored as (1, T, 1, 1).

    Raises InputError when criterion_weight does not have one value a token.
    """
    import torch

    weight = np.asarray(criterion_weight, np.float32).reshape(-1)
    if weight.size != module.features[-1][0]:
        raise InputError(f"criterion_weight has {weight.size} values, the generator {module.features[-1][0]} tokens")
    leaves = {"/".join(k.key for k in keys): np.asarray(leaf) for keys, leaf in jax.tree.leaves_with_path(params)}
    state = {CRITERION_WEIGHT: torch.from_numpy(weight.reshape(1, -1, 1, 1).copy())}
    for key, (ours, (_, from_ours)) in _table(len(module.features) - 1, bool(module.length_projection)).items():
        state[key] = torch.from_numpy(np.array(from_ours(leaves.pop(ours)), order="C"))
    if leaves:
        raise listed("parameters that the original has no name for", sorted(leaves))
    with replacing(path) as temporary:
        torch.save(state, temporary)
    return pathlib.Path(path)
