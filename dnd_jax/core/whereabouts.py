"""What lies in the place of a model's file that is not there: named, with what to do about it."""

import codecs
import json
import pathlib

from dnd_jax.core.errors import nearest

CONFIG = "config.json"
POINTER = b"version https://git-lfs"  # what git leaves in place of a file that it did not fetch
MOST = 4  # names that are listed


def flaw(path: pathlib.Path) -> str:
    """The user's line for a file that git did not fetch, or whose first characters transformers
    does not read; empty for any other."""
    try:
        with path.open("rb") as file:
            first = file.read(len(POINTER))
    except OSError:
        return ""
    if first == POINTER:
        return f"{path}: a pointer of git-lfs, not the file itself; run `git lfs pull` there"
    if path.suffix == ".json" and first.startswith(codecs.BOM_UTF8):
        return f"{path}: begins with a byte order mark; save it as UTF-8 without one"
    return ""


def not_a_folder(path: pathlib.Path) -> str:
    """What to do about a path that should be a model's folder and is a file, or nothing."""
    if path.is_file():
        inside = (path.parent / CONFIG).is_file() and path.suffix != ".zip"
        return f"a file; give {'the folder' if inside else 'a folder of a model'}" + (
            f" {path.parent}" if inside else f", with {CONFIG} in it"
        )
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"no such model folder{nearest(path.name, beside)}"


def instead_of(folder: pathlib.Path, wanted: str) -> str:
    """What is in a folder that has no `wanted`, and what to do."""
    entries = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    inside = _models_inside(folder)
    if not folder.is_dir():
        return not_a_folder(folder)
    if not entries:
        return "the folder is empty"
    if "adapter_config.json" in entries:
        base = _base_of(folder / "adapter_config.json")
        return f"it is a PEFT adapter{base}: give its base, or merge the two and give the result"
    if inside:
        which = "the folder" if len(inside) == 1 else "one of"
        return f"there is one in {', '.join(inside)}; give {which} {folder / inside[-1]}"
    if (folder.absolute().parent / CONFIG).is_file():
        return f"there is one a folder up; give {folder.absolute().parent}"
    gguf = [name for name in entries if name.endswith(".gguf")]
    if gguf:
        return f"there is {_some(gguf)}; give the file itself: {folder / gguf[0]}"
    if "params.json" in entries:
        return (
            f"it is in Meta's or Mistral's own format ({_some(entries)}); take the model's "
            "version for transformers, or convert it"
        )
    return f"there is {_some(entries)}; give a whole model folder, or copy {wanted} there"


def no_weights(folder: pathlib.Path) -> str:
    """What is in a model's folder without model.safetensors, and what to do."""
    entries = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    again = "save it again from transformers"
    shards = [n for n in entries if n.startswith("model-") and n.endswith(".safetensors")]
    if shards:
        return f"there is {_some(shards)} without model.safetensors.index.json; copy that file too"
    torch = [n for n in entries if n.endswith((".bin", ".pt", ".pth")) and "training" not in n]
    safe = [n for n in entries if n.endswith(".safetensors")]
    if torch and not safe:
        return f"only safetensors are read, and there is {_some(torch)}; {again}"
    if safe:
        return f"there is {_some(safe)}; rename it if it is the whole model, or {again}"
    gguf = [n for n in entries if n.endswith(".gguf")]
    if gguf:
        return f"there is {_some(gguf)}; give the file itself: {folder / gguf[0]}"
    parts = [n for n in entries if n.startswith(("pytorch_model_fsdp", "global_step"))]
    if parts:
        return (
            f"there is {_some(parts)}, in which a trainer keeps the parts of several devices; put "
            "them together (accelerate merge-weights, zero_to_fp32.py)"
        )
    others = [n for n in entries if n.endswith((".h5", ".msgpack", ".ckpt", ".onnx"))]
    if others:
        return f"only safetensors are read, and there is {_some(others)}; {again}"
    inside = _models_inside(folder)
    if inside:
        return f"there are models in {', '.join(inside)}; give {folder / inside[-1]}"
    return f"there is {_some(entries)}; copy the weights too" if entries else "it is empty"


def _models_inside(folder: pathlib.Path) -> list[str]:
    """The folders below, down to the second, that hold a model, and the commits in the hub's cache;
    of a trainer the checkpoints, the last of them last."""
    if not folder.is_dir():
        return []
    depths = ("*", "*/*", "models--*/snapshots/*")
    found = [p.parent for depth in depths for p in folder.glob(f"{depth}/{CONFIG}")]
    found = [p for p in found if not p.name.endswith(("_Pooling", "_Dense", "_Normalize"))]
    names = sorted((str(p.relative_to(folder)) for p in found), key=lambda n: (len(n), n))
    return names[-MOST:]


def _base_of(settings: pathlib.Path) -> str:
    """ " of NAME", as a PEFT adapter's settings call its base; nothing where they do not."""
    try:
        name = json.loads(settings.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        name = None
    return f" of {name}" if isinstance(name, str) and name else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
