"""A GGUF file (llama.cpp, Ollama) as a Hugging Face folder, written once.

    $DND_JAX_CACHE/gguf/SHA256-FORMAT/    config.json, generation_config.json, model.safetensors
                                          (float32), tokenizer files, chat template, gguf.json

The folder is whole or absent and named by the file's contents: the same file under another path
leads to the same folder, and any number of processes may ask for it. gguf.json says which file it
was written from.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re

from dnd_jax.base.gguf.config import config_of
from dnd_jax.base.gguf.header import MAGIC, Gguf, check_start
from dnd_jax.base.gguf.tokenizer import read_tokenizer, write_tokenizer
from dnd_jax.base.gguf.weights import GgufWeights
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError, nearest
from dnd_jax.core.files import as_json, cache_folder, need_space, read_json, replacing
from dnd_jax.core.tensors import WHOLE, write_tensors

SUFFIX = ".gguf"
RECORD = "gguf.json"
FORMAT = 1  # of what is written: another one is written to another folder
SHORT = 16  # characters of a sha256 that name a file
# Files that do not name the model on the hub that they were made from.
KNOWN = {
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53": (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
}
# Keys that name it. general.base_model is another: the model that it was fine-tuned from.
NAMED = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")


@dataclasses.dataclass(frozen=True)
class Source:
    """The GGUF file that a folder was written from."""

    file: str  # its name, without its folder
    sha256: str
    quantisation: str
    name: str  # what it calls the model
    hub_id: str  # of the model on the hub that it was made from; empty: it does not say

    @property
    def folder(self) -> str:
        """The name of the folder that is written."""
        return f"{self.sha256[:SHORT]}-{FORMAT}"

    @property
    def said(self) -> str:
        """For records and people: "FILE (Q4_1, sha256 0123456789abcdef)"."""
        return f"{self.file} ({self.quantisation}, sha256 {self.sha256[:SHORT]})"


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path means a GGUF file, there or not: by its suffix, or a file's first bytes
    (Ollama's files have no suffix)."""
    path = pathlib.Path(path)
    if path.suffix.lower() == SUFFIX:
        return not path.is_dir()
    if not path.is_file():  # a pipe's first bytes are not ours to take
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def as_folder(path: str | os.PathLike) -> pathlib.Path:
    """The Hugging Face folder of a GGUF file, which is written when it is first asked for.

    Raises InputError in one line for a file that is absent or cannot be read here, without the
    package gguf, and where the disk has no room.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(_absent(path))
    check_start(path)
    sha256 = digests.of_file(path)
    folder = cache_folder() / "gguf" / f"{sha256[:SHORT]}-{FORMAT}"
    found = source_of(folder)
    if found is None or found.sha256 != sha256:
        _write(Gguf(path), sha256, folder)
    return folder


def source_of(folder: pathlib.Path) -> Source | None:
    """The file that a folder was written from by `as_folder`; None for any other folder, and a copy
    of one, which may have been changed."""
    record = folder / RECORD
    try:
        source = _source(record, record.stat().st_mtime_ns)
    except OSError:
        return None
    return source if source is not None and folder.name == source.folder else None


@functools.lru_cache(maxsize=64)
def _source(record: pathlib.Path, changed: int) -> Source | None:
    try:
        return Source(**read_json(record))
    except (InputError, TypeError):
        return None


def _absent(path: pathlib.Path) -> str:
    """What to do about a GGUF file that is not there."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    parts = path.parts
    hub = ""
    if len(parts) == 3 and not path.is_absolute() and not pathlib.Path(parts[0]).exists():
        hub = f"; one on the hub: hf download {parts[0]}/{parts[1]} {parts[2]} --local-dir=."
    return f"{path}: no such GGUF file{nearest(path.name, beside)}{hub}"


def _write(file: Gguf, sha256: str, folder: pathlib.Path) -> None:
    config = config_of(file)
    weights, tokenizer = GgufWeights(file, config), read_tokenizer(file, config)
    generation = tokenizer.ids | {"eos_token_id": tokenizer.ends}
    source = Source(
        file.path.name,
        sha256,
        file.quantisation,
        str(file.get("general.name", "")),
        KNOWN.get(sha256) or _hub_id(file),
    )
    shapes = weights.shapes()
    size = 4 * sum(math.prod(shape) for shape, _ in shapes.values())
    instead = "set DND_JAX_CACHE to a folder on another disk"
    try:
        need_space(folder.parent, size, f"the float32 weights of {file.path}", instead)
    except OSError as error:
        raise InputError(
            f"{folder.parent}: cannot write here ({error.strerror or error}); {instead}"
        ) from None
    print(f"{file.path}: written once as a model folder, {folder}", flush=True)
    with replacing(folder, directory=True) as temporary:
        for name, content in {
            "config.json": config | tokenizer.ids,
            "generation_config.json": generation,
            RECORD: dataclasses.asdict(source),
        }.items():
            (temporary / name).write_text(as_json(content), encoding="utf-8")
        write_tokenizer(tokenizer, temporary)
        write_tensors(temporary / WHOLE, shapes, weights.blocks(), {"format": "pt"})


def _hub_id(file: Gguf) -> str:
    """USER/NAME of the model that a file says it was made from, which is no GGUF file itself."""
    for key in NAMED:
        said = str(file.get(key, ""))
        found = re.search(r"^(?:https?://huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)$", said)
        if found and not found[1].upper().endswith("GGUF"):
            return found[1]
    return ""
