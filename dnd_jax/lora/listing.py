"""Which LoRA checkpoints of each dataset there are below a folder."""

import os
import pathlib
import re
from collections.abc import Sequence

from dnd_jax.core.errors import InputError, listed
from dnd_jax.lora.found import WEIGHTS, is_unfinished, what_is_there, why_no_checkpoints


def dataset_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a dataset's folder, in the order of the numbers in their names: adapter
    folders (ours, PEFT's, LLaMA-Factory's checkpoint-N) or the original's flat N.safetensors; none
    if there are none. A link to another of them, as trainers' `latest`, is left out.

    Raises InputError when it holds both kinds, one of them in another form, or a whole model.
    """
    inner = [p for p in folder.glob("*/") if not p.name.startswith(".")]
    whole = [path for path in inner if (path / WEIGHTS).is_file()]
    # LLaMA-Factory leaves the last adapter beside its checkpoint-N folders.
    flat = [
        path
        for path in folder.glob("*.safetensors")
        if path.name != WEIGHTS and not path.name.startswith(".")
    ]
    alone = not whole and not flat
    broken = [path for path in inner if path not in whole and is_unfinished(path, alone)]
    if broken:
        raise InputError(what_is_there(min(broken)))
    if flat and (folder / "config.json").is_file():
        raise InputError(what_is_there(folder))
    if whole and flat:
        raise InputError(
            f"{folder.name} holds both {len(whole)} adapter folders and {len(flat)} flat files "
            f"({min(flat).name}, ...)"
        )
    links_first = sorted(whole or flat, key=lambda path: (not path.is_symlink(), _order(path)))
    return sorted({path.resolve(): path for path in links_first}.values(), key=_order)


def _order(path: pathlib.Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name


def checkpoint_folders(
    root: str | os.PathLike, datasets: Sequence[str]
) -> dict[str, list[pathlib.Path]]:
    """The checkpoints of each dataset: those of ROOT/DATASET, as `dataset_checkpoints`.

    Raises InputError naming the datasets without any, and those that hold both kinds.
    """
    found, faults = {}, []
    for name in datasets:
        folder = pathlib.Path(root, name)
        try:
            found[name] = dataset_checkpoints(folder)
        except InputError as error:
            faults.append(str(error))
            continue
        if not found[name]:
            faults.append(
                f"no checkpoints for {name}: {why_no_checkpoints(pathlib.Path(root), name)}"
            )
    if faults:
        raise listed(f"{root}: expected DATASET/*/{WEIGHTS} or DATASET/N.safetensors", faults)
    return found
