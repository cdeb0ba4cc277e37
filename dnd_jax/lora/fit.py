"""Whether an adapter fits its base: its modules are those of the base, in these shapes. Asked of
the base's config.json, or of the headers of its weights, before anything long begins; PyTorch and
the weights are not read."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from dnd_jax.base import hub
from dnd_jax.base.architecture import LmConfig
from dnd_jax.base.folder import CONFIG, load_base_config
from dnd_jax.base.known import KNOWN, TEXT_PARTS
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.packages import PACKAGE
from dnd_jax.core.tensors import DTYPES, stored_tensors
from dnd_jax.lora.names import KEY, check_known
from dnd_jax.lora.peft_fields import is_targeted

# A model of text and images has its language model under model.language_model. in memory, where
# PEFT takes its names from, under model. in the files of Qwen2.5-VL, language_model.model. in
# others: transformers renames them while it loads.
TOWERS = re.compile(r"^((model|language_model)\.)+")


@dataclasses.dataclass(frozen=True)
class Modules:
    """The modules of a base that a LoRA can be on. exact: by the names that they have in memory;
    else by those of its files, of which TOWERS may be others."""

    of: str
    shapes: Mapping[str, tuple[int, int] | None]  # (d_out, d_in); None: quantised
    exact: bool

    def shape(self, module: str) -> tuple[int, int] | None:
        """Raises KeyError for a module that is none of the base's."""
        return self.shapes[module if self.exact else TOWERS.sub("", module)]


def find_modules(base: str | os.PathLike) -> Modules | None:
    """The modules of a base that is at hand: a folder, a package, in the hub's cache, or of known
    sizes. None for any other; nothing is downloaded."""
    name = os.fspath(base)
    folder = _at_hand(name)
    try:
        sizes = load_base_config(folder) if folder else KNOWN.get(name)
    except InputError:  # of a kind that we cannot run
        sizes = None
    if not folder and name in TEXT_PARTS:
        sizes = None
    if sizes is not None:
        head = {"lm_head": (sizes.vocab_size, sizes.hidden_size)}
        return Modules(name, {**projections(sizes), **head}, exact=True)
    try:
        stored = stored_tensors(folder) if folder else {}
    except InputError:
        return None
    found = {}
    for key, part in stored.items():
        module, _, kind = key.rpartition(".")
        whole = kind == "weight" and part.dtype in DTYPES
        if len(part.shape) == 2 and kind in ("weight", "qweight", "weight_packed"):
            found[TOWERS.sub("", module)] = part.shape if whole else None
    if "embed_tokens" in found:
        found.setdefault("lm_head", found["embed_tokens"])  # tied
    return Modules(name, found, exact=False) if found else None


def projections(sizes: LmConfig) -> dict[str, tuple[int, int]]:
    """{module: (d_out, d_in)} of all layers."""
    return {
        f"model.layers.{i}.{path}": (d_out, d_in)
        for i in range(sizes.num_hidden_layers)
        for path, (d_in, d_out) in sizes.projections().items()
    }


def _at_hand(name: str) -> pathlib.Path | None:
    """The folder of a base that is on this machine."""
    if hub.is_hub_id(name):
        return hub.cached(name, CONFIG)
    if not pathlib.Path(name).is_dir() and not name.startswith(PACKAGE):
        file = hub.gguf_of(name)
        return hub.resolve(name) if file is not None and file.is_file() else None
    try:
        return hub.resolve(name)
    except InputError:  # a package that is not installed
        return None


def check_fits(
    shapes: Mapping[str, tuple[int, ...]],
    fields: Mapping,
    base: str | os.PathLike,
    title: str,
) -> None:
    """Raises InputError listing the modules of an adapter that its base has not, or has in other
    shapes, and those of the base that its settings name but its file has no tensors for. shapes:
    by canonical names; fields: of its adapter_config.json. Of a base that is not at hand, the
    modules must look like those of a known family."""
    modules = sorted({match["module"] for key in shapes if (match := KEY.fullmatch(key))})
    known = find_modules(base) if base else None
    if known is None:
        return check_known(modules, title)
    faults = [fault for module in modules for fault in module_faults(module, shapes, known)]
    if not faults and known.exact and fields:
        lacking = _lacking(modules, fields, known)
        faults += [f"target_modules names {m}, which the file has no tensors for" for m in lacking]
    if faults:
        raise listed(title, faults, most=5)
    return None


def _lacking(modules: Sequence[str], fields: Mapping, known: Modules) -> list[str]:
    """The modules of a base that the settings name besides an adapter's. They call them as the base
    was loaded, with its head or without."""
    others = [module for module in known.shapes if module not in modules]
    found = [
        [module for module in others if is_targeted(fields, module, headless)]
        for headless in (False, True)
        if all(is_targeted(fields, module, headless) for module in modules)
    ]
    return min(found, key=len, default=[])


def module_faults(
    module: str, shapes: Mapping[str, tuple[int, ...]], known: Modules
) -> Iterator[str]:
    """In what an adapted module is not the base's."""
    try:
        sizes = known.shape(module)
    except KeyError:
        alike = [name for name in known.shapes if name.split(".")[-1] == module.split(".")[-1]]
        hint = f" (which has {alike[0]})" if alike else ""
        yield f"{module} is no module of {known.of}{hint}"
        return
    a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    rank = shapes[a][0]
    wanted = {a: (rank, sizes[1]), b: (sizes[0], rank)} if sizes else {}
    for key, shape in wanted.items():
        if shapes[key] != shape:
            yield f"{key} has shape {shapes[key]}, the base's would be {shape}"
