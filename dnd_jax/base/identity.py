"""Which base it is, whatever the spelling of its path: the sha256 of its files; and the name that
adapters give it."""

import os
import pathlib
from collections.abc import Iterable

from dnd_jax.base.hub import PACKAGE, hub_id, resolve
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError

SETTINGS = ("config.json", "generation_config.json")
CHAT = ("chat_template.jinja", "chat_template.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# The first of these that a folder has any of are its weights.
WEIGHTS = (
    ("model.safetensors.index.json", "model.safetensors", "model-*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*.bin"),
)


def model_files(folder: pathlib.Path, settings: Iterable[str]) -> dict[str, pathlib.Path]:
    """{name: path} of a model folder's weights, tokenizer and these settings; what else lies there
    (a card, a record, an optimiser) does not belong to the model."""
    found = {name: folder / name for name in (*settings, *TOKENIZER) if (folder / name).is_file()}
    for patterns in WEIGHTS:
        weights = {path.name: path for pattern in patterns for path in folder.glob(pattern)}
        if weights:
            return found | weights
    return found


def base_digest(path: str | os.PathLike) -> str:
    """sha256 of a base's configuration, weights and tokenizer. path: a folder, package or hub id.

    Raises InputError as `resolve`.
    """
    return digests.of_files(model_files(resolve(path), (*SETTINGS, *CHAT)))


def base_digest_of_format_0(path: str | os.PathLike) -> str:
    """The digest of a base in records without a format number: of every file of these kinds."""
    folder = resolve(path)
    kinds = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.bin")
    files = sorted({file for kind in kinds for file in folder.glob(kind)})
    found = digests.contents(files)
    return digests.of_text(
        *(part for file in files for part in (file.name, bytes.fromhex(found[file])))
    )


def base_name(path: str | os.PathLike) -> str:
    """What an adapter's settings call a base: a hub id or package as it is, the hub id of a folder
    in the hub's cache, and any other folder by its absolute path."""
    name = os.fspath(path)
    folder = pathlib.Path(name)
    return hub_id(folder) or str(folder.resolve()) if folder.is_dir() else name


def one_name(names: Iterable[str], decides: str | os.PathLike | None) -> str:
    """The name of the base of LoRAs that name it so. decides: the base that is given, if any.

    One name stays as it is, but a folder's becomes absolute. Of several (a hub id and a folder, a
    quantised copy) that of the given base is taken, with a note. Raises InputError without one.
    """
    names = sorted(set(names))
    if len(names) == 1 and (decides is None or _lasts(names[0])):
        return base_name(names[0])
    spelled = ", ".join(map(repr, names))
    if decides is None:
        raise InputError(
            f"the LoRA checkpoints name several bases ({spelled}); if they are one base, "
            "say which by --config.base.path=FOLDER or hub id"
        )
    name = base_name(decides)
    if len(names) > 1:
        print(f"note: the LoRA checkpoints name {spelled}; taken as {name}", flush=True)
    return name


def _lasts(name: str) -> bool:
    """Whether a name means the same base elsewhere: a hub id or package, no folder."""
    local = name.startswith((".", "/", "~")) or pathlib.Path(name).exists() or not name
    return name.startswith(PACKAGE) or (name.count("/") == 1 and not local)
