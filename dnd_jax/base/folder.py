"""Hugging Face folders (config.json, *.safetensors, tokenizer files) <-> our base LM, and their
tokenizers."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dnd_jax.base.architecture import RULES, BaseLM, LmConfig
from dnd_jax.base.hf_config import (
    BASES,
    CONFIG,
    config_json,
    ids_beyond,
    load_base_config,
    read_config,
)
from dnd_jax.base.hub import resolve
from dnd_jax.base.identity import TOKENIZER
from dnd_jax.base.names import EMBEDDINGS, HEAD, lm_names, lm_table, part_of
from dnd_jax.base.weights import StoredWeights, load_params
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line, listed
from dnd_jax.core.files import as_json, read_json, replacing
from dnd_jax.core.tensors import write_safetensors
from dnd_jax.core.whereabouts import flaw, instead_of
from dnd_jax.parallel.rules import shapes_of

tokenizers, transformers = packages.deferred("tokenizers"), packages.deferred("transformers")
GENERATION = "generation_config.json"
SETTINGS_OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# model_type -> the class that AutoTokenizer takes where tokenizer_config.json names it too. To look
# for it, AutoTokenizer imports PyTorch where that is installed, which takes longer than all else
# that generating an adapter imports.
AUTO = "AutoTokenizer"
CLASSES = {
    "bert": "BertTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "llama": "TokenizersBackend",
}
SAME_CLASS = {"PreTrainedTokenizer": "TokenizersBackend"}  # an older name, without its "Fast"
SENTENCE = "Which sea is deep: the größte, 42 miles?"


def load_base(
    path: str | os.PathLike, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[BaseLM, dict]:
    """(module, parameters) of a base LM from a Hugging Face folder or id, or a GGUF file; computed
    and stored in `dtype`.

    With a mesh, the parameters are read shard by shard and lie on it by architecture.RULES. Without
    one, they lie whole on the default device.
    """
    folder = resolve(path)
    config = load_base_config(folder)
    weights = StoredWeights(folder, functools.partial(lm_names, config=config))
    config = _tied_as_stored(config, weights)
    module = BaseLM(config, dtype)
    shapes = shapes_of(module.init, np.zeros((1, 2), np.int32))["params"]
    return module, load_params(weights, lm_table(config), shapes, RULES, mesh, dtype)


def _tied_as_stored(config: LmConfig, weights: StoredWeights) -> LmConfig:
    """A configuration whose head is tied to the embeddings, unless the file holds a head of other
    values: then it counts. A copy of the embeddings is left on the disk."""
    if config.tie_word_embeddings and HEAD in weights.shapes:
        if weights.alike(HEAD, EMBEDDINGS):
            weights.leave(HEAD)
        else:
            return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def save_base(
    folder: str | os.PathLike,
    config: LmConfig,
    params: Mapping,
    tokenizer,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes a base as a Hugging Face folder that `transformers` loads, float32, in one file: whole
    or not at all. beside: {name: value} of other JSON files in it."""
    flat = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flat.items()}
    weights, named = {}, set()
    for theirs, ours, transposed in lm_table(config):
        path, layer = part_of(ours)
        value = flat[path] if layer is None else flat[path][layer]
        weights[theirs] = np.ascontiguousarray(value.T if transposed else value)
        named.add(path)
    if unnamed := flat.keys() - named:
        raise listed("base parameters without a Hugging Face name", sorted(unnamed))
    raw = {
        "architectures": [BASES[config.model_type]],
        **config_json(config),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    generation = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    with replacing(folder, directory=True) as temporary:
        (temporary / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        (temporary / GENERATION).write_text(json.dumps(generation, indent=1) + "\n")
        write_safetensors(temporary / "model.safetensors", weights, {"format": "pt"})
        tokenizer.save_pretrained(temporary)
        for name, value in (beside or {}).items():
            (temporary / name).write_text(as_json(value), encoding="utf-8")


def load_tokenizer(path: str | os.PathLike):
    """The fast tokenizer of a model folder, package or hub id; one without a padding token (Llama)
    pads with its end token.

    Raises InputError when there is none, and where it has tokens that the embeddings lack.
    """
    folder = resolve(path)
    if missing := _no_vocabulary(folder):  # of which transformers makes a tokenizer of one token
        raise InputError(f"{folder}: no usable tokenizer; {missing}")
    try:
        tokenizer = getattr(transformers, _reader(folder)).from_pretrained(folder)
        tokenizer("a")  # settings of another type are noticed here
    except Exception as error:  # transformers raises whatever a damaged folder makes of its code
        for name in TOKENIZER:
            if name.endswith(".json") and (folder / name).is_file():
                read_json(folder / name)  # says more of a damaged one
        raise InputError(f"{folder}: no usable tokenizer ({first_line(error)})") from None
    processor = folder / "chat_template.json"  # beside those of some vision-language models
    if tokenizer.chat_template is None and processor.is_file():
        raw = read_json(processor)
        tokenizer.chat_template = raw.get("chat_template") if isinstance(raw, dict) else None
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise InputError(
            f"{folder}: the tokenizer has neither a padding nor an end token; set pad_token in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:  # Llama's; every use of padding here is masked
        tokenizer.pad_token = tokenizer.eos_token
    if (folder / CONFIG).is_file():
        _check_vocabulary(folder, tokenizer)
        _check_class(folder, tokenizer)
    return tokenizer


def _reader(folder: pathlib.Path) -> str:
    """The class of transformers that reads a folder's tokenizer as AutoTokenizer does: itself,
    unless both files name the one that it would take."""
    try:
        of_model, own = (read_json(folder / name) for name in (CONFIG, SETTINGS_OF_TOKENIZER[0]))
        kind, named = of_model.get("model_type"), own.get("tokenizer_class").removesuffix("Fast")
        alike = CLASSES.get(kind) == SAME_CLASS.get(named, named)
        code = "auto_map" in of_model or "auto_map" in own  # the model's own
    except (InputError, AttributeError, TypeError):  # a file is absent or damaged
        return AUTO
    return CLASSES[kind] if alike and not code else AUTO


def _no_vocabulary(folder: pathlib.Path) -> str:
    """What a folder lacks to hold a tokenizer; empty where it has a vocabulary."""
    there = {name for name in TOKENIZER if (folder / name).is_file()}
    if flaws := [line for name in sorted(there) if (line := flaw(folder / name))]:
        return flaws[0]
    if not folder.is_dir() or not there - {*SETTINGS_OF_TOKENIZER, "merges.txt"}:
        return f"tokenizer.json is not there; {instead_of(folder, 'tokenizer.json')}"
    if there & {"vocab.json", "merges.txt", "tokenizer.json"} == {"vocab.json"}:
        return "vocab.json needs merges.txt, which is not there; copy tokenizer.json from the model"
    return ""


def _check_vocabulary(folder: pathlib.Path, tokenizer) -> None:
    """Raises InputError for a token, or a special id of the settings, beyond the rows of the
    embeddings; embeddings of more rows than tokens (Qwen's) are well."""
    file, raw = read_config(folder)
    text = raw.get("text_config")
    rows = raw.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    if type(rows) is not int:
        return
    generation = folder / GENERATION
    settings = read_json(generation) if generation.is_file() else {}
    for path, of in ((file, raw), (generation, settings)):
        ids = dict(of) if isinstance(of, dict) else {}
        if path == generation:  # its end tokens are looked at where they are asked for
            ids.pop("eos_token_id", None)
        if faults := ids_beyond(ids, rows):
            raise InputError(f"{path}: {'; '.join(faults)} ({file}: vocab_size); correct it")
    # What stands for a picture or a sound: text has none (Gemma 3's alone has such a token).
    others = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    beyond = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= rows]
    beyond = sorted(found for found in beyond if found[1] not in others)
    if beyond:
        first = f"{beyond[0][1]!r} the id {beyond[0][0]}"
        more = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
        raise InputError(
            f"{folder}: the tokenizer's files give {first}{more}, beyond the {rows} rows of the "
            f"embeddings ({file}: vocab_size); take the model's own tokenizer, or resize the "
            "embeddings by resize_token_embeddings and save the model again"
        )


def _check_class(folder: pathlib.Path, tokenizer) -> None:
    """Raises InputError where transformers reads a base's tokenizer.json as a class that loses the
    spaces or letters of a text, which the file itself keeps: its classes replace what the file says
    of them by their own."""
    whole, file = folder / "tokenizer.json", folder / CONFIG
    kind = read_config(folder)[1].get("model_type")

    def kept(ids: list[int], decode: Callable) -> bool:
        return decode(ids, skip_special_tokens=False).split() == SENTENCE.split()

    ids = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    if kind not in BASES or not whole.is_file() or kept(ids, tokenizer.decode):
        return
    own = tokenizers.Tokenizer.from_file(str(whole))
    if kept(own.encode(SENTENCE, add_special_tokens=False).ids, own.decode):
        mend = "say TokenizersBackend as its tokenizer_class in tokenizer_config.json"
        if kind == "qwen2":
            mend = f"it does so with any model_type qwen2 ({file}), so take a tokenizer of Qwen's"
        raise InputError(
            f"{whole}: transformers reads it as {type(tokenizer).__name__}, which makes "
            f"{tokenizer.decode(ids)!r} of {SENTENCE!r}; {mend}"
        )
