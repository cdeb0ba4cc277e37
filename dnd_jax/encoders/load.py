"""The frozen text encoder, of whichever kind its folder or file holds (docs/METHOD.md section 4).

    BERT family (MiniLM, BERT, GTE, BGE)        model_type bert                          bert.py
    T5, T5 v1.1 and mT5's encoder               model_type t5, mt5                       t5.py
    hidden states of a decoder-only LM's layer  model_type qwen2, qwen3, llama, mistral  lm.py
    word vectors                                a text file: word v1 ... vC      word_vectors.py

All are Linen modules of one shape: module.apply({"params": params}, ids (B, L), valid (B, L)) ->
(B, L, C), padding positions included, with `config.vocab_size`, `width` (C) and `window` (the
longest L, None for any).
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dnd_jax.base import architecture as base_lm
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.hf_config import BASES, CONFIG, load_base_config, read_config
from dnd_jax.base.hub import gguf_of, resolve, revision_of
from dnd_jax.base.identity import model_files
from dnd_jax.base.names import HEAD, Table, lm_names, lm_table
from dnd_jax.base.weights import StoredWeights, load_params
from dnd_jax.config.validate import fields_of
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json
from dnd_jax.core.whereabouts import not_a_folder
from dnd_jax.encoders import bert, t5, word_vectors
from dnd_jax.encoders.bert import bert_names, bert_table
from dnd_jax.encoders.cut import Tokens
from dnd_jax.encoders.lm import LmEncoder
from dnd_jax.encoders.t5 import t5_names, t5_table
from dnd_jax.parallel.rules import shapes_of, shard_by_rules

LAST = -1  # layer
TOKENIZER = ("*.json", "*.txt", "*.model")  # its files and CONFIG, of a hub id
OF_MODELS = (".safetensors", ".bin", ".json", ".pt", ".pth")  # no word vectors
Names = Callable[[Collection[str]], Mapping[str, str]]  # as of StoredWeights
# Keys of a BERT that make it another model.
NOT_OF_BERT = ("is_decoder", "add_cross_attention", "pruned_heads", "quantization_config")
WHOLE = (r".", ())  # the rule of what an encoder's own ones do not divide


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A loaded text encoder."""

    module: nn.Module
    params: dict
    # Texts, L -> (ids, valid), int32 (n, L), padded on the right.
    tokenize: Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]
    tokens: Tokens
    files: dict[str, pathlib.Path]  # {name: path} of what its output depends on
    revision: str = ""  # the commit, where it comes from the hub


def is_vectors(name: str | os.PathLike) -> bool:
    """Whether an encoder's name is that of a file of word vectors; a GGUF file is a model."""
    return pathlib.Path(name).is_file() and gguf_of(name) is None


def load_encoder(
    name: str | os.PathLike,
    layer: int = LAST,
    mesh: jax.sharding.Mesh | None = None,
    revision: str = "",
    dtype: str = "float32",
) -> Encoder:
    """The encoder of a folder, GGUF or vector file, package or hub id, in a type, on the mesh by
    its rules where one is given; a parameter that the mesh does not divide is whole on every
    device.

    layer: of a decoder-only LM, 0 for its embeddings. revision: of a hub id, the commit. Raises
    InputError for an architecture or layer that does not exist.
    """
    if is_vectors(name):
        return _load_vectors(pathlib.Path(name), layer, mesh, dtype)
    folder = resolve(name, revision=revision)
    module, rules, table, names = _architecture(folder, layer)
    module = module.clone(dtype=jnp.dtype(dtype))
    ids = np.zeros((1, 2), np.int32)
    shapes = shapes_of(module.init, ids, ids)["params"]
    stored = StoredWeights(folder, names)
    params = load_params(stored, table, shapes, (*rules, WHOLE), mesh, module.dtype)
    tokenizer = load_tokenizer(folder)
    _check_case(folder, tokenizer)
    tokenize = functools.partial(_tokenize, tokenizer)
    tokens, files = functools.partial(_tokens, tokenizer), encoder_files(folder)
    return Encoder(module, params, tokenize, tokens, files, revision_of(folder))


def load_tokens(name: str | os.PathLike) -> Tokens:
    """The tokens that an encoder of `load_encoder` sees, without its weights. Raises InputError."""
    if is_vectors(name):
        return word_vectors.words
    return functools.partial(_tokens, load_tokenizer(resolve(name, TOKENIZER)))


def encoder_files(name: str | os.PathLike) -> dict[str, pathlib.Path]:
    """{name: path} of what the output of a folder's, package's or hub id's encoder, or that of a
    vector file, depends on."""
    if is_vectors(name):
        return {"vectors": pathlib.Path(name)}
    return model_files(resolve(name), (CONFIG,))


def load_module(name: str | os.PathLike, layer: int = LAST, dtype: str = "float32") -> nn.Module:
    """The module of a folder, package, hub id or vector file without its weights, for its sizes."""
    if is_vectors(name):
        return _load_vectors(pathlib.Path(name), layer, None, dtype).module
    return _architecture(resolve(name, (CONFIG,)), layer)[0].clone(dtype=jnp.dtype(dtype))


def encode_windows(
    module: nn.Module, params: Mapping, ids_BxL: jax.Array, valid_BxL: jax.Array
) -> jax.Array:
    """Hidden states (B, L, C) for any L: ids beyond the module's window are cut into windows that
    are encoded independently."""
    batch, length = ids_BxL.shape
    window = module.window or length
    whole = length // window * window

    def encode(ids_and_valid) -> jax.Array:
        return module.apply({"params": params}, *ids_and_valid)

    if length <= window:
        return encode((ids_BxL, valid_BxL))
    # One window after the other, in a loop that is compiled once: the paper's longest texts have
    # 52.
    cut = [x[:, :whole].reshape(batch, -1, window).swapaxes(0, 1) for x in (ids_BxL, valid_BxL)]
    states = jax.lax.map(encode, cut).swapaxes(0, 1).reshape(batch, whole, -1)
    if whole == length:
        return states
    return jnp.concatenate([states, encode((ids_BxL[:, whole:], valid_BxL[:, whole:]))], axis=1)


def _architecture(folder: pathlib.Path, layer: int) -> tuple[nn.Module, tuple, Table, Names]:
    """(module, sharding rules, table of names, naming) of a folder's config.json."""
    file, raw = read_config(folder)
    kind = raw.get("model_type")
    if kind in BASES:
        return _lm(folder, layer)
    if kind == "bert":
        parts = _bert(file, raw)
    elif kind in ("t5", "mt5"):
        parts = _t5(file, raw)
    else:
        supported = ", ".join(("bert", "t5", "mt5", *BASES))
        raise InputError(
            f"{file}: model_type {kind!r} is not supported as text encoder; use one of {supported}"
        )
    _only_last(folder, layer)
    return parts


def _bert(file: pathlib.Path, raw: Mapping) -> tuple[nn.Module, tuple, Table, Names]:
    if (
        raw.get("hidden_act", "gelu") != "gelu"
        or raw.get("position_embedding_type", "absolute") != "absolute"
    ):
        raise InputError(f"{file}: only hidden_act gelu and absolute positions are supported")
    if faults := [key for key in NOT_OF_BERT if raw.get(key)]:
        raise InputError(f"{file}: {', '.join(faults)} is not supported in a text encoder")
    config = fields_of(bert.BertConfig, raw, file)
    layers = config.num_hidden_layers
    names = functools.partial(bert_names, layers=layers)
    return bert.Bert(config), bert.RULES, bert_table(layers), names


def _t5(file: pathlib.Path, raw: Mapping) -> tuple[nn.Module, tuple, Table, Names]:
    # transformers' defaults
    first = {"feed_forward_proj": "gated-gelu" if raw["model_type"] == "mt5" else "relu"}
    config = fields_of(t5.T5Config, first | raw, file)
    if config.feed_forward_proj not in t5.FEED_FORWARDS:
        raise InputError(
            f"{file}: feed_forward_proj {config.feed_forward_proj!r} is none of "
            f"{', '.join(t5.FEED_FORWARDS)}"
        )
    sizes = config.num_layers, config.gated
    names = functools.partial(t5_names, layers=sizes[0], gated=sizes[1])
    return t5.T5Encoder(config), t5.RULES, t5_table(*sizes), names


def _lm(folder: pathlib.Path, layer: int) -> tuple[nn.Module, tuple, Table, Names]:
    config = load_base_config(folder)
    if not LAST <= layer <= config.num_hidden_layers:
        raise InputError(
            f"config.condition.layer = {layer}: {folder} has layers 0 (its embeddings) to "
            f"{config.num_hidden_layers}; {LAST} is the last"
        )
    layer = config.num_hidden_layers if layer == LAST else layer
    table = lm_table(config, layer)
    wanted = {theirs for theirs, _, _ in table}
    every = {theirs for theirs, _, _ in lm_table(config)} | {HEAD}

    def names(stored: Collection[str]) -> dict[str, str]:
        found = lm_names(stored, config)  # later layers and the head stay on the disk
        return {a: b for a, b in found.items() if b in wanted or b not in every}

    return LmEncoder(config, layer), base_lm.RULES, table, names


def _load_vectors(
    path: pathlib.Path, layer: int, mesh: jax.sharding.Mesh | None, dtype: str
) -> Encoder:
    _only_last(path, layer)
    if path.suffix in OF_MODELS:
        raise InputError(f"{path}: {not_a_folder(path)}")
    vocabulary, vectors = word_vectors.read_vectors(path)
    config = word_vectors.WordVectorsConfig(*vectors.shape)
    module = word_vectors.WordVectors(config, jnp.dtype(dtype))
    params = {"vectors": vectors.astype(module.dtype)}
    params = jax.device_put(
        params, mesh and shard_by_rules(mesh, (*word_vectors.RULES, WHOLE), params)
    )
    tokenize = functools.partial(word_vectors.tokenize, vocabulary)
    return Encoder(module, params, tokenize, word_vectors.words, {"vectors": path})


def _only_last(name: pathlib.Path, layer: int) -> None:
    if layer != LAST:
        raise InputError(
            f"config.condition.layer = {layer}: only decoder-only LMs have layers to choose; set "
            f"it to -1 for {name}"
        )


def _check_case(folder: pathlib.Path, tokenizer) -> None:
    """Raises InputError where sentence-transformers would write texts in small letters first, and
    the tokenizer does not do so by itself."""
    file = folder / "sentence_bert_config.json"
    settings = read_json(file) if file.is_file() else {}
    if isinstance(settings, dict) and settings.get("do_lower_case"):
        capitals, small = tokenizer(["Which SEA?", "which sea?"])["input_ids"]
        if capitals != small:
            raise InputError(
                f"{file}: do_lower_case is true, which only sentence-transformers reads; set "
                "do_lower_case in tokenizer_config.json, or remove it"
            )


def _tokenize(tokenizer, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    # On the right whatever the tokenizer prefers: on the left, a causal LM's padding would see
    # nothing at all.
    how = {
        "padding": "max_length",
        "padding_side": "right",
        "truncation": True,
        "max_length": length,
        "return_tensors": "np",
    }
    encoded = tokenizer(list(texts), **how)
    return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.int32)


def _tokens(tokenizer, texts: Sequence[str], length: int | None) -> list[list[int | None]]:
    how = {"truncation": length is not None, "max_length": length, "verbose": False}
    found = tokenizer(list(texts), return_attention_mask=False, **how)["input_ids"]
    unknown = tokenizer.unk_token_id
    if length is None or unknown is None:
        return found
    return [[None if i == unknown else i for i in ids] for ids in found]
