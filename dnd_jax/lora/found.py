"""What lies where a LoRA adapter was expected, said with what to do."""

import os
import pathlib
from collections.abc import Iterator

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def what_is_there(path: str | os.PathLike) -> str:
    """The user's line for a path that is no whole PEFT adapter."""
    path = pathlib.Path(path)
    if not path.exists():
        return (
            f"{path}: no such folder; adapters are read from folders (of one on the hub: "
            f"hf download {path} --local-dir=FOLDER)"
        )
    if not path.is_dir():
        kind = "pickled" if path.suffix in _PICKLED else "a file"
        return f"{path}: {kind}, not a PEFT adapter, which is a folder with {WEIGHTS} and {CONFIG}"
    lacking = [name for name in (WEIGHTS, CONFIG) if not (path / name).is_file()]
    seen = next(_seen(path), "")
    return f"{path}: no {' and no '.join(lacking)}{f'; {seen}' if seen else ''}"


def is_unfinished(folder: pathlib.Path, alone: bool) -> bool:
    """Whether a folder without WEIGHTS was to be an adapter, or holds one in another form. alone:
    no whole adapter lies beside it; else folders inside are an archive's."""
    names = os.listdir(folder)
    # rsync calls a file .adapter_model.safetensors.a1B2c3 until it is there.
    if any(name == CONFIG or name.lstrip(".").startswith("adapter_model") for name in names):
        return True
    return alone and any((folder / name / CONFIG).is_file() for name in names)


def _seen(folder: pathlib.Path) -> Iterator[str]:
    """What a folder without a whole adapter holds, and what to do, the most telling first."""
    names = sorted(os.listdir(folder))
    folders = [name for name in names if (folder / name).is_dir()]
    # An adapter, but in another form or place.
    named = [name for name in folders if (folder / name / CONFIG).is_file()]
    if named:
        yield (
            f"there are adapters in {', '.join(named[:3])}: of one that PEFT saved under a name, "
            f"give that folder, {folder / named[0]}"
        )
    if f"{WEIGHTS}.index.json" in names:
        yield f"its weights are in several files; save them in one, {WEIGHTS}"
    if WEIGHTS in names:
        yield f"{WEIGHTS} is there: copy {CONFIG} from where the LoRA was trained"
    pickled = [name for name in names if name.endswith(_PICKLED) and name.startswith("adapter")]
    if pickled:
        yield (
            f"{pickled[0]} is there, which is pickled: save it as safetensors "
            "(PEFT: save_pretrained with safe_serialization=True)"
        )
    if any(name.startswith("adapters.") for name in names):
        yield "there is an adapter of MLX; convert it to PEFT's form"
    left = [
        name
        for name in names
        if name.endswith((".tmp", ".part", ".incomplete")) or name.startswith(f".{WEIGHTS}.")
    ]
    if left:
        yield f"{left[0]} is there, which was not finished; save or copy the adapter again"
    # Something else.
    steps = [name for name in folders if name.startswith("global_step")]
    if steps:
        yield (
            f"{steps[0]} is a state of DeepSpeed; save the adapter by PEFT's save_pretrained "
            "(ZeRO-3: stage3_gather_16bit_weights_on_model_save)"
        )
    sharded = [name for name in folders if "_fsdp_" in name] or [
        name for name in names if name.endswith(".distcp")
    ]
    if sharded:
        yield f"{sharded[0]} is sharded by FSDP; merge it: accelerate merge-weights"
    if {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} & set(names):
        yield "it is a checkpoint of Orbax; adapters are PEFT's folders"
    models = [name for name in names if name.startswith(("model", "pytorch_model"))]
    if "config.json" in names and models:
        yield (
            f"config.json and {models[0]} are there: a whole model, fine-tuned without LoRA; only "
            "LoRAs are read"
        )
    checkpoints = [name for name in folders if name.startswith(("checkpoint-", "step_"))]
    if checkpoints:
        yield f"it has {checkpoints[0]}: give one checkpoint, {folder / checkpoints[0]}"
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        yield f"{gguf[0]} is there; only PEFT's form is read"
    yield (
        f"there {'is' if len(names) == 1 else 'are'} {', '.join(names[:5])}"
        if names
        else ("the folder is empty")
    )


def why_no_checkpoints(root: pathlib.Path, dataset: str) -> str:
    """Why a dataset has no checkpoints below root: what is there instead, and what to do."""
    folder = root / dataset
    if not folder.is_dir():
        others = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        alike = [name for name in others if name.casefold() == dataset.casefold()]
        if alike:
            return f"no folder {dataset}, but {alike[0]}: rename it"
        return f"no folder {dataset}" + (f" (there are {', '.join(others[:3])})" if others else "")
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if (folder / WEIGHTS).is_file():
        return f"{folder} is one adapter: put it into a folder of its own, {folder / 'step_1'}"
    path = inner[0] if inner else folder
    return f"{path}: {next(_seen(path))}"
