"""Which base it is, whatever the spelling of its path: the sha256 of its files; and the name that
adapters give it."""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping

from dnd_jax.base.gguf.file import RECORD, Source, source_of
from dnd_jax.base.hub import gguf_of, hub_id, resolve
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.tensors import INDEX, weight_files
from dnd_jax.core.workdir import BASE
from dnd_jax.parallel import hosts

SETTINGS = ("config.json", "generation_config.json")
# The last of them counts first.
CHAT = (
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/default.jinja",
)
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
    (INDEX, "model.safetensors", "model-*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*.bin"),
)


def model_files(folder: pathlib.Path, settings: Iterable[str]) -> dict[str, pathlib.Path]:
    """{name: path} of a model folder's weights, tokenizer and these settings; what else lies there
    (a card, a record, an optimiser) does not belong to the model.

    Raises InputError for an index that cannot be read.
    """
    found = {name: folder / name for name in (*settings, *TOKENIZER) if (folder / name).is_file()}
    for patterns in WEIGHTS:
        weights = {path.name: path for pattern in patterns for path in folder.glob(pattern)}
        if INDEX in weights:  # which may call its shards anything
            weights |= {path.name: path for path in weight_files(folder) if path.is_file()}
        if weights:
            return found | weights
    return found


def base_digest(path: str | os.PathLike) -> str:
    """sha256 of a base's configuration, weights and tokenizer. path: a folder, package or hub id.

    Raises InputError as `resolve`.
    """
    return digests.of_files(model_files(resolve(path), (*SETTINGS, *CHAT)))


def base_name(path: str | os.PathLike) -> str:
    """What an adapter's settings call a base: a hub id or package as it is, the hub id of a folder
    in the hub's cache, or of the model that a GGUF file says it was made from, and any other folder
    or file by its absolute path. Empty: none is named."""
    name = os.fspath(path)
    folder = pathlib.Path(name)
    if (source := weights_source(name)) is not None and source.hub_id:
        return source.hub_id
    if not name or not folder.exists():
        return name
    return hub_id(folder) or str(folder.resolve())


def weights_source(path: str | os.PathLike) -> Source | None:
    """The GGUF file that a base's weights come from: given as such, or as the folder that was
    written from it. None for any other base, and for a file that is not there."""
    file = gguf_of(path)
    if file is not None:
        return source_of(resolve(file)) if file.is_file() else None
    return source_of(pathlib.Path(path)) if pathlib.Path(path, RECORD).is_file() else None


def base_weights(path: str | os.PathLike) -> str:
    """`Source.said` of a base whose weights come from a GGUF file; empty for any other."""
    source = weights_source(path)
    return "" if source is None else source.said


def other_weights(then: str, path: str | os.PathLike) -> str:
    """What to note of adapters that were trained on the weights `then` (as `base_weights`) and meet
    this base: a GGUF file's are other numbers than the hub's under the same name. Empty where they
    are the same."""
    now = base_weights(path)
    same = re.findall(r"sha256 (\w+)", then) == re.findall(r"sha256 (\w+)", now)
    if same:
        return ""
    return (
        f"trained on {then or 'no GGUF file that is named'}, and this base is "
        f"{now or 'no GGUF file'}: other numbers, though the name may be one"
    )


def means_base(then: object, path: str | os.PathLike) -> bool:
    """Whether a record without a format number, which names the base by its path, means this one:
    the same path, hub id or folder; or a base that was pretrained in a workdir that has moved."""
    if not isinstance(then, str):
        return False
    old, new = pathlib.Path(then), pathlib.Path(path)
    moved = old.name == new.name == BASE and (new / "pretrain.json").is_file()
    return moved or then == os.fspath(path) or base_name(then) == base_name(path)


def one_name(named: Mapping[str, os.PathLike], decides: str | os.PathLike | None) -> str:
    """The name of the one base of LoRAs, named {what their settings call it: one that calls it so}:
    that of the base that `decides`, with a note where they differ (a hub id and a folder, a
    quantised copy); without it theirs, a folder's made absolute. A LoRA may name none; where none
    does and nothing decides, the name is empty.

    Raises InputError when they name several and nothing decides.
    """
    where = {base_name(name): path for name, path in named.items() if name}
    names = sorted(where)
    if decides is None and len(names) <= 1:
        return names[0] if names else ""
    spelled = ", ".join(map(repr, names))
    if decides is None:
        each = ", ".join(f"{name!r} in {where[name]}" for name in names)
        raise InputError(
            f"the LoRA checkpoints name several bases ({each}); if they are copies of one, "
            "say which by --config.base.path=FOLDER or hub id"
        )
    decided = base_name(decides)
    if names not in ([], [decided]) and hosts.lead():
        print(f"note: the LoRA checkpoints' base is {decided}; they name {spelled}", flush=True)
    return decided
