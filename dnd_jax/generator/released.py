"""Generators of the original PyTorch release (.pth state dicts) <-> our parameters and generator
folders.

    dnd import-generator X.pth --out=DIR --adapter=PEFT_FOLDER    any released version -> a folder
    dnd export-generator DIR --out=X.pth                          and back, bit for bit
    module, params = load_reference_generator("generator.pth", features, kernel_size=9)
    tokens = module.apply({"params": params}, condition)

Stages, kernel size and text length are read off the tensors' shapes. Every tensor is mapped exactly
once in both directions, without rounding: loading and saving gives the same bits. Needs PyTorch.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from dnd_jax.config.schema import LENGTH_PROJECTIONS, Features
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import replacing
from dnd_jax.core.tensors import DTYPES
from dnd_jax.generator.model import Generator, param_shapes
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.generator.state_dict import read_state_dict

torch = packages.deferred("torch")
CRITERION_WEIGHT = "criterion_weight"
# How a stored tensor becomes ours; each is its own kind of inverse. Ours: kernels (grid axes in (N,
# L, C) order, in, out).
_AS_IS = (lambda x: x, lambda x: x)
_LINEAR = (lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
# The grid is stored as (L, N).
_KERNEL_REVERSED = (lambda x: x.transpose(3, 2, 1, 0), lambda x: x.transpose(3, 2, 1, 0))
# The grid is stored in our order.
_KERNEL = (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
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
_STAGE_NAME = r"model\.decoder\.module_list\.(\d+)\."


def _name(stage: int, tensor: str) -> str:
    """A stage's tensor in the original's state dict."""
    return f"model.decoder.module_list.{stage}.{tensor}"


FIRST = _name(0, "linear1.norm.weight")  # of every generator


def _table(num_stages: int, projected: bool) -> dict[str, tuple[str, tuple]]:
    """Name in the original's state dict -> (our path, (to ours, from ours))."""
    table = {
        _name(i, theirs): (f"decoder/stage_{i}/{ours}", transforms)
        for i in range(num_stages)
        for theirs, (ours, transforms) in _STAGE.items()
    }
    return table | (_PROJECTION if projected else {})


def architecture(state: Mapping[str, np.ndarray], source: str) -> DecoderSpec:
    """Stages, kernel size and text length (0: no length projection) of an original state dict.

    Which of the length projections it is, the shapes do not tell: `length_projection` is left
    empty. Raises InputError listing the tensors that are missing or unknown.
    """
    stages = sorted(
        {
            int(m[1])
            for key in state
            if (m := re.fullmatch(_STAGE_NAME + r"linear1\.norm\.weight", key))
        }
    )
    if not stages:
        raise InputError(
            f"{source}: holds no decoder stage ({FIRST}), so it is no released generator"
        )
    projected = "down_proj.weight" in state
    table = _table(stages[-1] + 1, projected)
    faults = [f"{key} is missing" for key in sorted(table.keys() - state.keys())]
    faults += [
        f"{key} is unknown" for key in sorted(state.keys() - table.keys() - {CRITERION_WEIGHT})
    ]
    if faults:
        raise listed(f"{source}: not a whole generator", faults)
    features = [
        (
            *state[_name(i, "linear2.weight")].shape[1:2],
            *state[_name(i, "linear1.norm.weight")].shape,
        )
        for i in stages
    ]
    last = stages[-1]
    features.append(
        (*state[_name(last, "linear2.weight")].shape[:1], *state[_name(last, "linear1.bias")].shape)
    )
    kernels = [state[key] for key in table if ".conv" in key or key.endswith("linear2.weight")]
    if any(len(f) != 3 for f in features) or any(kernel.ndim != 4 for kernel in kernels):
        raise InputError(
            f"{source}: its tensors have another number of dimensions than a decoder's"
        )
    kernel_size = kernels[0].shape[-1]
    if kernel_size % 2 == 0:
        raise InputError(
            f"{source}: kernels of {kernel_size} x {kernel_size}; only odd ones are known"
        )
    text_length = state["down_proj.weight"].shape[-1] if projected else 0
    return DecoderSpec(tuple(features), kernel_size, text_length=text_length)


def mapped(
    state: Mapping[str, np.ndarray], spec: DecoderSpec, source: str
) -> dict[str, np.ndarray]:
    """{our path: a view of the stored tensor in our axes}. Raises InputError listing all that is
    missing, unknown or misshapen."""
    shapes = jax.tree.leaves_with_path(param_shapes(Generator(spec)))
    expected = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in shapes}
    table = _table(len(spec.features) - 1, bool(spec.length_projection))
    faults = [f"{key} is missing" for key in table.keys() - state.keys()]
    faults += [f"{key} is unknown" for key in state.keys() - table.keys() - {CRITERION_WEIGHT}]
    mapped = {}
    for key in table.keys() & state.keys():
        ours, (to_ours, _) = table[key]
        value = to_ours(state[key]) if state[key].ndim == len(expected[ours]) else state[key]
        if value.shape != expected[ours]:
            shape, kernel = state[key].shape, spec.kernel_size
            faults.append(
                f"{key} has shape {shape}, which does not fit features {spec.features} and "
                f"kernel {kernel}"
            )
        if value.dtype not in DTYPES.values():
            faults.append(f"{key} holds {value.dtype}, expected floating point")
        mapped[ours] = value
    if faults:
        raise listed(f"{source}: not the state dict of this generator", sorted(faults))
    return {path: mapped[path] for path in expected}


def load_reference_generator(
    path: str | os.PathLike,
    features: Sequence[Features],
    kernel_size: int,
    length_projection: str | None = None,
    max_text_length: int | None = None,
) -> tuple[Generator, dict]:
    """The original's .pth file as (module, params): `module.apply({"params": params}, condition) ->
    tokens [B, T, h, w]`.

    features: (N, L, C) of every stage. length_projection: None, "camera_ready" or "first_release";
    with one, the condition is (B, N, max_text_length, C), else (B, N, L, C). Raises InputError
    listing every missing, unknown or misshapen tensor.
    """
    if length_projection is not None and length_projection not in LENGTH_PROJECTIONS:
        raise InputError(f"length_projection {length_projection!r} is none of {LENGTH_PROJECTIONS}")
    if length_projection and max_text_length is None:
        raise InputError("max_text_length is needed with a length projection")
    spec = DecoderSpec(
        tuple(tuple(int(x) for x in f) for f in features),
        kernel_size,
        length_projection or "",
        max_text_length if length_projection else 0,
    )
    tensors = mapped(read_state_dict(path, FIRST), spec, os.fspath(path))
    return Generator(spec), traverse_util.unflatten_dict(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, sep="/"
    )


def save_reference_generator(
    module: Generator, params: Mapping, path: str | os.PathLike, criterion_weight: np.ndarray
) -> pathlib.Path:
    """Writes our parameters as the original's state dict, with criterion_weight (T,) stored as (1,
    T, 1, 1).

    Raises InputError when criterion_weight does not have one value a token.
    """
    weight, tokens = np.asarray(criterion_weight, np.float32).reshape(-1), module.spec.token_grid[0]
    if weight.size != tokens:
        raise InputError(
            f"criterion_weight has {weight.size} values, the generator {tokens} tokens"
        )
    leaves = {
        "/".join(k.key for k in keys): np.asarray(leaf)
        for keys, leaf in jax.tree.leaves_with_path(params)
    }
    state = {CRITERION_WEIGHT: torch.from_numpy(weight.reshape(1, -1, 1, 1).copy())}
    table = _table(len(module.spec.features) - 1, bool(module.spec.length_projection))
    for key, (ours, (_, from_ours)) in table.items():
        value = np.array(from_ours(leaves.pop(ours)), order="C")
        bfloat16 = value.dtype == ml_dtypes.bfloat16
        state[key] = (
            torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
            if bfloat16
            else torch.from_numpy(value)
        )
    if leaves:
        raise listed("parameters that the original has no name for", sorted(leaves))
    # If torch.save were given a name, it would write that into the file.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
    return pathlib.Path(path)
