"""Stage `export-gguf`: a PEFT adapter as a GGUF file that llama.cpp takes beside its base.

    dnd export-gguf ADAPTER --out=FILE.gguf [--base=BASE.gguf] [--dtype=float16]
    llama-server --model BASE.gguf --lora FILE.gguf

llama.cpp multiplies B A of a tensor by the file's one alpha over the tensor's rank. What PEFT has
beside that (rsLoRA, alphas and ranks of single modules) is folded into B. It stores the rows of a
llama's queries and keys in another order than transformers, so the rows of their B follow.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from dnd_jax.base.architecture import LmConfig
from dnd_jax.base.gguf.header import Gguf
from dnd_jax.base.gguf.weights import PARTS, file_rows
from dnd_jax.base.hub import gguf_of
from dnd_jax.base.known import base_sizes
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import replacing
from dnd_jax.core.stage import Given
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.card import names_hub_model
from dnd_jax.lora.fit import Modules, module_faults, projections
from dnd_jax.lora.names import lora_pairs
from dnd_jax.lora.peft_settings import module_scales, read_fields, read_shapes

gguf = packages.deferred("gguf")

# What --dtype may be -> its name in gguf.GGMLQuantizationType.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ARCHITECTURES = {"mistral": "llama"}  # model_type -> general.architecture, where they differ
NAMES = {path: part for part, path in PARTS.items()}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
GIVE = "give the file that llama.cpp runs by --base=FILE.gguf"
FAMILIES = "a Llama, Mistral, Qwen2 or Qwen3"


@dataclasses.dataclass(frozen=True)
class Target:
    """The base that an adapter is exported for. head: channels of an attention head."""

    architecture: str
    head: int
    modules: Modules


def export_gguf(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    base: str | os.PathLike = "",
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes an adapter folder as a GGUF file, whole or not at all, and returns its path. base: a
    folder, GGUF file or hub id, of which the sizes alone are read (empty: the one that the adapter
    names); dtype: one of DTYPES.

    Raises InputError for what llama.cpp has no place for, and listing the modules that the base
    lacks or has in other shapes.
    """
    adapter, out = pathlib.Path(adapter), pathlib.Path(out)
    fields, shapes = read_fields(adapter), read_shapes(adapter)
    pairs, _, faults = lora_pairs(shapes)
    if faults:
        raise listed(f"{adapter}: not a usable LoRA adapter", sorted(faults))
    scales = module_scales(adapter)
    named = str(fields.get("base_model_name_or_path") or "")
    target = _target(adapter, base, named)
    faults = [f for module in sorted(pairs) for f in module_faults(module, shapes, target.modules)]
    if faults:
        raise listed(f"{adapter}: llama.cpp takes a LoRA on projections of layers alone", faults, 5)

    # Of the first matrix; the others' B are in proportion, so that alpha / rank is every scale.
    modules = sorted(pairs, key=_place)
    alpha = scales[modules[0]] * shapes[f"{modules[0]}.lora_A.weight"][0]
    if not np.isfinite(np.float32(alpha)) or not np.float32(alpha):
        raise InputError(f"{adapter}: alpha {alpha:g} has no room in float32; fold it into B")
    tensors = _tensors(load_adapter(adapter), scales, alpha, target)
    stored = {name: _stored(value, dtype, f"{adapter}: {name}") for name, value in tensors.items()}
    with replacing(out) as temporary:
        _write(temporary, target.architecture, alpha, stored, dtype, named)
        _check(temporary, out, stored)
    return out


def _target(adapter: pathlib.Path, base: str | os.PathLike, named: str) -> Target:
    """Raises InputError for a base that is none of those known here, naming the way out."""
    if not base and not named:
        raise InputError(f"{adapter}: names no base; {GIVE}")
    name = os.fspath(base or named)
    file = gguf_of(name)
    try:
        return _of_sizes(name, base_sizes(name)) if file is None else _of_file(Gguf(file))
    except InputError as error:
        if base:
            raise
        raise InputError(
            f"{error}; it is the base that {adapter} names: if it is {FAMILIES}, {GIVE}"
        ) from None


def _of_sizes(name: str, sizes: LmConfig) -> Target:
    architecture = ARCHITECTURES.get(sizes.model_type, sizes.model_type)
    return Target(architecture, sizes.head_width, Modules(name, projections(sizes), exact=True))


def _of_file(file: Gguf) -> Target:
    """The base in a GGUF file, by its own tensors. Raises InputError for one whose heads cannot be
    told."""
    shapes = {
        f"model.layers.{found[1]}.{PARTS[found[2]]}": tuple(map(int, tensor.shape[::-1]))
        for name, tensor in file.tensors.items()
        if (found := TENSOR.fullmatch(name)) and found[2] in PARTS and len(tensor.shape) == 2
    }
    heads = file.get(f"{file.architecture}.attention.head_count")
    queries, _ = shapes.get("model.layers.0.self_attn.q_proj", (0, 0))
    head = queries // heads if type(heads) is int and heads > 0 else 0
    rows = [of for module, (of, _) in shapes.items() if module.endswith(("q_proj", "k_proj"))]
    if not head or head % 2 or any(of % head for of in rows):
        raise InputError(
            f"{file.path}: {queries} rows of blk.0.attn_q.weight are not those of {heads} heads "
            f"({file.architecture}.attention.head_count)"
        )
    return Target(file.architecture, head, Modules(str(file.path), shapes, exact=True))


def _place(module: str) -> tuple[int, str]:
    """(layer, path inside it)."""
    layer, path = LAYER.fullmatch(module).groups()
    return int(layer), path


def _tensors(
    tensors: Mapping[str, np.ndarray], scales: Mapping[str, float], alpha: float, target: Target
) -> dict[str, np.ndarray]:
    """{llama.cpp's name: values}, so that alpha / rank is the scale of all."""
    found = {}
    for module in sorted(scales, key=_place):
        a, b = (np.asarray(tensors[f"{module}.lora_{side}.weight"], np.float32) for side in "AB")
        layer, path = _place(module)
        name = f"blk.{layer}.{NAMES[path]}.weight"
        in_file = np.empty_like(b)
        in_file[file_rows(target.architecture, name, len(b), target.head)] = b
        factor = np.float32(scales[module] * len(a) / alpha)
        with np.errstate(over="ignore", invalid="ignore"):
            found |= {f"{name}.lora_a": a, f"{name}.lora_b": in_file * factor}
    return found


def _stored(value: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """The values as the file holds them. Raises InputError where they are, or become, NaN or
    Inf."""
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    with np.errstate(over="ignore"):
        stored = gguf.quants.quantize(np.ascontiguousarray(value), kind)
    if not np.all(np.isfinite(gguf.quants.dequantize(stored, kind))):
        mend = "train it again" if dtype == "float32" else "take --dtype=float32"
        raise InputError(f"{where} would hold NaN or Inf in {dtype}; {mend}")
    return stored


def _write(
    path: pathlib.Path,
    architecture: str,
    alpha: float,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    base: str,
) -> None:
    keys = gguf.Keys
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(keys.General.TYPE, gguf.GGUFType.ADAPTER)
    writer.add_string(keys.Adapter.TYPE, "lora")
    writer.add_float32(keys.Adapter.LORA_ALPHA, alpha)
    if names_hub_model(base):
        writer.add_base_model_count(1)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for name, value in tensors.items():
        writer.add_tensor(name, value, raw_dtype=gguf.GGMLQuantizationType[DTYPES[dtype]])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(path: pathlib.Path, out: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises InputError unless the file holds these tensors, bit for bit."""
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if read.keys() != tensors.keys() or not all(
        read[name].tobytes() == value.tobytes() for name, value in tensors.items()
    ):
        raise InputError(
            f"{out}: what was read back differs from what was written; the disk is not to be "
            "trusted"
        )


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("out")
    if given["dtype"] not in DTYPES:
        raise InputError(f"--dtype={given['dtype']}: none of {', '.join(DTYPES)}")
    if os.path.lexists(given["out"]):
        raise InputError(f"--out={given['out']}: exists already; choose another --out")
    out = export_gguf(given.argument, given["out"], given["base"], given["dtype"])
    print(f"llama.cpp's adapter: {out.absolute()}")
