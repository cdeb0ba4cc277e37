"""A GGUF file's tokenizer -> tokenizer.json, its settings, and which tokens are special."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

from dnd_jax.base.gguf.header import HUB, Gguf
from dnd_jax.base.gguf.pieces import KEY, NORMAL, pieces_of
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.files import as_json

tokenizers = packages.deferred("tokenizers")
transformers = packages.deferred("transformers")
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # of tokenizer.ggml.token_type
# Tokens that end an answer wherever a file has them as tokens of their own: llama.cpp stops there.
ENDS = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
    "</s>",
}
# Texts that known cuts make different pieces of.
PROBES = ("Don't SAY'LL 1234\u00bd abc12\n\n  \tx", "e\u0301 \uac00 ... !!\n", "")


@dataclasses.dataclass(frozen=True)
class GgufTokenizer:
    """What the files of a tokenizer say."""

    file: pathlib.Path
    pre: str
    backend: "tokenizers.Tokenizer"
    settings: dict  # of tokenizer_config.json
    ids: dict[str, int]  # bos_token_id, eos_token_id, pad_token_id, as far as there are
    ends: list[int]  # every token that ends an answer, the file's eos first
    template: str  # the chat template; empty: none


def read_tokenizer(file: Gguf, config: Mapping) -> GgufTokenizer:
    """The tokenizer of a GGUF file, whose config.json this is. Raises InputError naming the key of
    what is missing, damaged or not known here."""
    tokens, kinds = _tokens(file, config["vocab_size"])
    pieces = pieces_of(file, tokens, kinds)
    ids, backend = _ids(file, len(tokens), pieces.ids), pieces.backend
    if kinds[ids.get("pad_token_id", ids["eos_token_id"])] == NORMAL:  # a word is no padding
        ids.pop("pad_token_id", None)
    ends = _ends(file, ids["eos_token_id"], tokens, kinds)
    _add_own(backend, tokens, [CONTROL if i in ends else kind for i, kind in enumerate(kinds)])
    bos, eos = (ids.get(key) for key in ("bos_token_id", "eos_token_id"))
    begins = file.get(f"{KEY}.add_bos_token", pieces.begins) and bos is not None
    _post_process(
        backend,
        [tokens[bos]] if begins else [],
        [tokens[eos]] if file.get(f"{KEY}.add_eos_token", False) else [],
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    settings |= {key.removesuffix("_id"): tokens[i] for key, i in ids.items()}
    template = file.get("tokenizer.chat_template") or ""
    ids.pop("unk_token_id", None)  # config.json has none
    pre = file.get(f"{KEY}.pre")
    return GgufTokenizer(file.path, pre, backend, settings, ids, ends, template)


def _tokens(file: Gguf, rows: int) -> tuple[list[str], list[int]]:
    """(tokens, their kinds), without the unused ones that fill the embeddings up. Raises InputError
    for a list that is none, and a token that is there twice."""
    tokens, kinds = (file.get(f"{KEY}.{name}", []) for name in ("tokens", "token_type"))
    faults = []
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        faults.append(f"{KEY}.tokens is no list of texts")
    elif not 0 < len(tokens) <= rows:
        faults.append(f"{KEY}.tokens: {len(tokens)} for {rows} rows of token_embd.weight")
    elif len(set(tokens)) < len(tokens):
        faults.append(f"{KEY}.tokens: {Counter(tokens).most_common(1)[0][0]!r} is there twice")
    elif not isinstance(kinds, list) or len(kinds) != len(tokens):
        faults.append(f"{KEY}.token_type is not one for each of the {len(tokens)} tokens")
    if faults:
        raise listed(f"{file.path}: no usable tokenizer", faults)
    used = len(tokens)
    while used > 1 and kinds[used - 1] == UNUSED:
        used -= 1
    return tokens[:used], kinds[:used]


def _ids(file: Gguf, count: int, implied: Mapping[str, int]) -> dict[str, int]:
    """{"eos_token_id": 2, ...} of the special tokens that the file names, or does not need to."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {
        f"{of}_token_id": file.get(f"{KEY}.{name}_token_id", implied.get(of))
        for name, of in names.items()
    }
    found = {key: i for key, i in found.items() if i is not None}
    faults = [
        f"{KEY}: {key} {i!r} is none of its {count} tokens"
        for key, i in found.items()
        if type(i) is not int or not 0 <= i < count
    ]
    if "eos_token_id" not in found:
        faults.append(f"{KEY}.eos_token_id is missing, so no answer could end")
    if faults:
        raise listed(f"{file.path}: no usable tokenizer", [f"{fault}; {HUB}" for fault in faults])
    return found


def _ends(file: Gguf, eos: int, tokens: Sequence[str], kinds: Sequence[int]) -> list[int]:
    """Every token that ends an answer: those that the file names, and those that are known."""
    named = [eos, *(file.get(f"{KEY}.{name}_token_id") for name in ("eot", "eom"))]
    own = (CONTROL, USER_DEFINED)
    known = [i for i, token in enumerate(tokens) if token in ENDS and kinds[i] in own]
    return [i for i in dict.fromkeys([*named, *known]) if type(i) is int and i < len(tokens)]


def _add_own(backend: "tokenizers.Tokenizer", tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Has tokens of these kinds matched whole in a text, before it is cut."""
    special = (UNKNOWN, CONTROL)
    for own, add in (
        (special, backend.add_special_tokens),
        ((USER_DEFINED,), backend.add_tokens),
    ):
        found = [token for token, kind in zip(tokens, kinds, strict=True) if kind in own]
        add([tokenizers.AddedToken(t, normalized=False, special=own is special) for t in found])


def _post_process(backend: "tokenizers.Tokenizer", first: list[str], last: list[str]) -> None:
    """Has texts begin and end with these tokens, where special tokens are asked for."""
    processors = tokenizers.processors
    steps = [processors.ByteLevel(trim_offsets=False)]  # changes no token
    if first or last:
        special = [(token, backend.token_to_id(token)) for token in (*first, *last)]
        second = [f"{token}:1" for token in first], [f"{token}:1" for token in last]
        steps.append(
            processors.TemplateProcessing(
                single=[*first, "$A", *last],
                pair=[*first, "$A", *last, *second[0], "$B:1", *second[1]],
                special_tokens=list(dict(special).items()),
            )
        )
    backend.post_processor = processors.Sequence(steps)


def write_tokenizer(tokenizer: GgufTokenizer, folder: pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template to a folder that has its
    config.json. Raises InputError where transformers makes another tokenizer of them: it has a
    class of its own for some kinds of model."""
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
    settings = as_json(tokenizer.settings)
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    if tokenizer.template:
        (folder / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in PROBES:
        if theirs(text)["input_ids"] != tokenizer.backend.encode(text).ids:
            raise InputError(
                f"{tokenizer.file}: {KEY}.pre {tokenizer.pre!r} is not that of its architecture: "
                f"transformers has a {type(theirs).__name__} for it, which cuts otherwise; {HUB}"
            )
