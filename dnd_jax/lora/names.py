"""Names of an adapter's tensors: PEFT's, and what wrappers of a training made of them.

PEFT attaches a tensor by its name alone and only warns when no module has it: the adapter then
loads and changes nothing. What is known for certain is undone here; whether the base has the module
is checked in dnd_jax/lora/fit.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from dnd_jax.core.errors import InputError, listed

PEFT_PREFIX = "base_model.model."
IN_FRONT = "model."  # before the layers of a base that is no part of another model
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# Behind a shape that is none: what leaves such files.
EMPTY = " (ZeRO-3 or FSDP saved it without gathering its parts)"
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Parts that a wrapper puts anywhere into a name.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP of PyTorch 1",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "_module": "Opacus",
}
# In front: DDP's and DeepSpeed's module., Lightning's model., and PEFT's own prefix, once or more.
_FRONT = re.compile(r"(module\.|((model|module)\.)*base_model\.model\.)+")
_DOUBLED = re.compile(r"^(model\.){2,}(?=layers\.\d)")
_HEADLESS = re.compile(r"layers\.\d+\.(self_attn|mlp)\.")  # of a base that was loaded without head
_NAMED = re.compile(r"\.lora_([AB])\.([^.]+)\.weight$")  # with the adapter's name inside
# What other methods and tools store, by a piece of its name.
_OTHERS = (
    (r"lora_embedding_[AB]", "a LoRA of an embedding; train without it in target_modules"),
    (r"lora_magnitude_vector", "DoRA's; train with use_dora=False"),
    (r"\.lora_[ab]\.|\.attn\.\w+\.lora_", "torchtune's own form; give the folder that its "
     "FullModelHFCheckpointer writes (adapter_config.json beside adapter_model.safetensors)"),
    (r"_flat_param", "a flat parameter of FSDP; save a full state dict"),
    (r"lora_(down|up)\b", "kohya's or diffusers' form; only PEFT's is read"),
    (r"\.lora_E\b|ranknum", "AdaLoRA's; only plain LoRA is read"),
    (r"lora_diag", "KaSA's; only plain LoRA is read"),
    (r"\.bias$", "a bias; train with bias='none' and lora_bias=False"),
    (r"\.(base_layer|modules_to_save|original_module)\.|(embed_tokens|lm_head)\.weight$",
     "a whole weight; train without modules_to_save and save with save_embedding_layers=False"),
)  # fmt: skip
# Of known families: modules outside any layer, lists of layers, and what a path has before them.
_HEADS = ("lm_head", "embed_out")
_LISTS = ("layers", "layer", "h", "blocks", "block")
_ROOTS = {"model", "transformer", "decoder", "encoder", "backbone", "gpt_neox", "llm"} | {
    *("language_model", "text_model", "thinker", "talker"),
    *("visual", "vision_tower", "vision_model", "audio_tower"),
}
Value = TypeVar("Value")


def canonical_name(key: str) -> str:
    """A tensor's name without PEFT's prefix, wrappers and the adapter's name: those of
    `model.layers.0.self_attn.q_proj.lora_A.weight`. What is not known stays."""
    name = _unwrapped(key)
    return _NAMED.sub(r".lora_\1.weight", f"model.{name}" if _HEADLESS.match(name) else name)


def _unwrapped(key: str) -> str:
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    return _DOUBLED.sub("model.", re.sub(_FRONT, "", name, count=1) if _FRONT.match(name) else name)


def is_headless(keys: Iterable[str]) -> bool:
    """Whether names are of a base that was loaded without its head: the settings beside them have
    its modules without the "model." that `canonical_name` puts in front."""
    return any(_HEADLESS.match(_unwrapped(key)) for key in keys)


def canonical(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The same tensors, or what else is named so, under canonical names. Raises InputError for
    names that come to one, and for several adapters in one file."""
    faults = name_faults(tensors)
    if faults:
        raise listed("not a usable LoRA adapter", faults)
    return {canonical_name(key): value for key, value in tensors.items()}


def renamed(tensors: Mapping[str, Value], old: str, new: str) -> dict[str, Value]:
    """The same tensors, `new` in the place of `old` in front of layers. Raises InputError where no
    name begins so."""
    front = f"{old}layers."
    if not any(key.startswith(front) for key in tensors):
        first = min(tensors, default="none")
        raise InputError(f"no tensor's name begins with {front} (the first is {first})")
    return {
        new + key.removeprefix(old) if key.startswith(front) else key: value
        for key, value in tensors.items()
    }


def check_key_prefix(prefix: str) -> None:
    """Raises InputError for what stands before no module's name."""
    if not re.fullmatch(r"([A-Za-z_]\w*\.)+", prefix):
        raise InputError(f"--key-prefix={prefix}: expected names with a dot behind each, a.b.")


def name_faults(keys: Iterable[str]) -> list[str]:
    """What is wrong with names as a whole: two of one matrix, several adapters."""
    seen: dict[str, str] = {}
    faults = []
    adapters = sorted({found[2] for key in keys if (found := _NAMED.search(key))})
    if len(adapters) > 1:
        faults.append(f"it holds the adapters {' and '.join(adapters)}; save one of them alone")
    for key in keys if not faults else ():
        other = seen.setdefault(canonical_name(key), key)
        if other != key:
            faults.append(f"{key} occurs twice, also as {other}")
    return faults


def lora_pairs(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, int], list[str]]:
    """({module: {"A": shape, "B": shape}}, {key: rank}, faults) of an adapter's tensors: a fault is
    a key that is no LoRA matrix, a shape that is none, a partner that is missing."""
    faults, pairs, ranks = name_faults(shapes), {}, {}
    for key, shape in shapes.items():
        match = KEY.fullmatch(canonical_name(key))
        if match is None:
            faults.append(f"{key} is not a LoRA matrix: {what_it_is(key)}")
            continue
        pairs.setdefault(match["module"], {})[match["side"]] = shape
        if len(shape) != 2 or 0 in shape:
            faults.append(f"{key} has shape {shape}, expected two non-empty dimensions{EMPTY}")
        else:
            ranks[key] = shape[0 if match["side"] == "A" else 1]
    for module, sides in pairs.items():
        faults += [f"{module}.lora_{side}.weight is missing" for side in "AB" if side not in sides]
    if not pairs and not faults:
        faults.append("no LoRA matrices at all")
    return pairs, ranks, faults


def what_it_is(key: str) -> str:
    """What a tensor is that is no LoRA matrix, as far as its name tells."""
    expected = "expected ...lora_A.weight or ...lora_B.weight"
    return next((what for piece, what in _OTHERS if re.search(piece, key)), expected)


def are_pefts(keys: Iterable[str]) -> bool:
    """Whether names are as PEFT writes them, so that PEFT attaches them."""
    return all(key == PEFT_PREFIX + canonical_name(key) for key in keys)


def strange(module: str) -> str:
    """Why a module's path is not that of a known family of decoders; empty when it is. For bases
    that are not at hand: what cannot be looked up must at least look right."""
    parts = module.split(".")
    odd = [part for part in parts if not re.fullmatch(r"[A-Za-z]\w*|\d+", part)]
    if odd or "module" in parts:
        return f"its part {(odd or ['module'])[0]!r} is of no known wrapper"
    layer = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if layer is None:
        return "" if module in _HEADS else "it is in no layer"
    if parts[layer - 1] not in _LISTS or not set(parts[: layer - 1]) <= _ROOTS or layer < 2:
        return f"{'.'.join(parts[: layer + 1])} is no layer of a known family"
    return "" if parts[layer + 1 :] else "it is a whole layer"


def check_known(modules: Iterable[str], title: str) -> None:
    """Raises InputError listing the modules that look like none of a decoder LLM."""
    faults = [f"{module}: {why}" for module in modules if (why := strange(module))]
    if faults:
        raise InputError(
            f"{listed(title, faults)}; give the base by --config.base.path=FOLDER, whose names "
            "then decide"
        )
