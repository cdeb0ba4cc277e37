"""Stage `verify-adapter`: proof in numbers, by PyTorch and PEFT, that an adapter does to its base
what its matrices say.

    dnd verify-adapter ADAPTER [--base=FOLDER]
    dnd verify-adapter ADAPTER --server=URL --model=NAME    by a running server

PEFT only warns when names do not match: such an adapter loads and changes nothing. Here every
stored tensor is looked up in the loaded model, and the logits are compared with those of W + scale
* B A, merged by hand from the files without PEFT.
"""

import os
import pathlib
import warnings
from collections.abc import Mapping

import numpy as np

from dnd_jax.base.hub import is_hub_id, resolve
from dnd_jax.base.identity import other_weights
from dnd_jax.base.served import Served
from dnd_jax.base.torch_base import load_torch_base
from dnd_jax.core import packages
from dnd_jax.core.errors import CheckFailed, InputError, first_line, is_no_room
from dnd_jax.core.stage import Given
from dnd_jax.core.tensors import read_safetensors
from dnd_jax.core.workdir import BASE as OWN
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.names import PEFT_PREFIX, canonical_name
from dnd_jax.lora.peft_settings import CONFIG, WEIGHTS, load_adapter_config, weights_file
from dnd_jax.lora.verify_served import verify_served

torch, peft = packages.deferred("torch"), packages.deferred("peft")
ROWS, LENGTH = 2, 32  # of the random tokens that both models read
# Of the change by hand: how far PEFT's may be from it, beside float32's own rounding of logits of
# this size.
RELATIVE, ROUNDING = 1e-2, 1e-5
END = ".lora_A.weight"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _logits(model, ids: "torch.Tensor") -> np.ndarray:
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device)).logits.float().cpu().numpy()


def _attach(model, folder: pathlib.Path) -> "peft.PeftModel":
    """The base with the adapter by PEFT. Raises CheckFailed naming the tensors that were not
    attached as they are stored, and the adapted modules that the file has no tensors for."""
    stored = read_safetensors(weights_file(folder))
    modules = {name for name, _ in model.named_modules()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is checked below
            adapted = peft.PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if is_no_room(error):
            raise
        raise CheckFailed(f"{folder}: PEFT does not load it ({first_line(error)})") from None
    slots = {
        name.replace(".default.weight", ".weight"): value.detach()
        for name, value in adapted.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }
    lost = sorted(key for key in stored if key not in slots)
    if lost:
        example = lost[0].removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0]
        near = sorted((len(m), m) for m in modules if m.split(".")[-1] == example.split(".")[-1])
        hint = f"; a module of the base is {PEFT_PREFIX}{near[0][1]}" if near else ""
        if wrapped := [key for key in lost if key != PEFT_PREFIX + canonical_name(key)]:
            hint = f"; PEFT writes {PEFT_PREFIX}{canonical_name(wrapped[0])}: rename them"
        raise CheckFailed(
            f"{folder}: {len(lost)} of {len(stored)} tensors belong to no module of the base: "
            f"{_some(lost)}{hint}"
        )
    other = sorted(
        key
        for key, value in stored.items()
        if not np.array_equal(slots[key].float().cpu().numpy(), np.asarray(value, np.float32))
    )
    if other:
        raise CheckFailed(
            f"{folder}: {len(other)} tensors are other in the model than in the file: "
            f"{_some(other)}"
        )
    empty = sorted(slots.keys() - stored.keys())
    if empty:
        raise CheckFailed(
            f"{folder}: target_modules names modules that the file has no tensors for: "
            f"{_some(empty)}"
        )
    return adapted.eval()


def _base_of(
    folder: pathlib.Path, base: str | os.PathLike, revision: str, weights: str
) -> pathlib.Path:
    """The base's folder. Raises InputError that says where the name comes from, and for the
    relative path of a run's own base, which elsewhere reads as a stranger's USER/NAME."""
    if is_hub_id(base) and os.fspath(base).endswith(f"/{OWN}"):
        raise InputError(
            f"{base}: no such model folder; {folder} names it, the base of a run that was made "
            "elsewhere; give it by --base=FOLDER"
        )
    try:
        return resolve(base, revision=revision)
    except InputError as error:
        which = f", and was trained on its {weights}" if weights else ""
        raise InputError(
            f"{error}; it is the base that {folder} names{which}; give it by --base=FOLDER or hub "
            "id"
        ) from None


def verify_on_base(adapter: str | os.PathLike, base: str | os.PathLike = "") -> str:
    """Loads base and adapter and returns a report in lines. base: a folder or hub id; empty: the
    one the adapter names.

    Raises CheckFailed when a tensor is not attached, the adapter changes nothing, or PEFT's change
    of the logits is not the one computed by hand; InputError when something cannot be read.
    """
    folder = pathlib.Path(adapter)
    if folder.is_file():
        raise InputError(
            f"{folder}: a file; PEFT loads folders: give one with {WEIGHTS} and {CONFIG}"
        )
    config, tensors = load_adapter_config(folder), load_adapter(folder)
    if not base and not config.base:
        raise InputError(f"{folder}: names no base; give --base=FOLDER")
    path = _base_of(folder, base or config.base, "" if base else config.revision, config.weights)
    model = load_torch_base(path)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (ROWS, LENGTH)))
    plain = _logits(model, ids)
    adapted = _attach(model, folder)
    changed = _logits(adapted, ids) - plain
    model = adapted.unload()

    largest = _merge_by_hand(model, tensors, config.scale)
    expected = _logits(model, ids) - plain

    change, by_hand, off = (float(np.abs(x).max()) for x in (changed, expected, changed - expected))
    rounding = ROUNDING * float(np.abs(plain).max())
    allowed = RELATIVE * by_hand + rounding
    if not change > rounding:
        raise CheckFailed(
            f"{folder}: changes nothing: the largest change of a logit is {change:.3g}, by hand "
            f"{by_hand:.3g}"
        )
    if not off <= allowed:
        raise CheckFailed(
            f"{folder}: not what its matrices say: logits change by up to {change:.6g}, merged by "
            f"hand by up to {by_hand:.6g}, {off:.3g} apart (allowed {allowed:.3g})"
        )
    strongest = max(largest, key=largest.__getitem__)
    idle = [module for module, change in largest.items() if not change]
    lines = [
        f"{folder} on {path}",
        f"modules attached: {len(largest)} of {len(largest)}, rank {config.rank}, scale "
        f"{config.scale:g}",
        f"largest change of a weight: {largest[strongest]:.3g} in {strongest}"
        + (f"; none in {_some(idle)}" if idle else ""),
        f"largest change of a logit, {ROWS} x {LENGTH} random tokens: {change:.6g}; merged by "
        f"hand: {by_hand:.6g}",
        f"largest deviation: {off:.3g} (allowed {allowed:.3g})",
        *([f"note: {note}"] if (note := other_weights(config.weights, path)) else []),
        "ok: the adapter changes the base as its matrices say",
    ]
    return "\n".join(lines)


def _merge_by_hand(model, tensors: Mapping[str, np.ndarray], scale: float) -> dict[str, float]:
    """Adds scale * B A to the weights of each adapted module, without PEFT; returns the largest
    change of each."""
    weights, largest = dict(model.named_parameters()), {}
    for module in (key.removesuffix(END) for key in tensors if key.endswith(END)):
        a, b = (np.asarray(tensors[f"{module}.lora_{side}.weight"], np.float32) for side in "AB")
        delta = scale * (b @ a)
        largest[module] = float(np.abs(delta).max())
        change = torch.from_numpy(delta.astype(np.float32))
        weights[f"{module}.weight"].data += change.to(model.device)
    return largest


def run(given: Given) -> None:
    """Runs the stage."""
    if not given["server"]:
        of_a_server = ("model", "served-base", "token-file", "key-prefix")
        if of_server := [name for name in of_a_server if given[name]]:
            raise InputError(f"--{of_server[0]} is for --server=URL")
        print(verify_on_base(given.argument, given["base"]))
        return
    given.need("model")
    server = Served(given["server"], given["token-file"])
    print(
        verify_served(
            given.argument,
            server,
            given["model"],
            given["base"],
            given["served-base"],
            given["key-prefix"],
        )
    )
