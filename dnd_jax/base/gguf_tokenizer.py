"""A GGUF file's tokenizer -> tokenizer.json, its settings and the ids of its special tokens.

The file has tokens, merges and the name of a pre-tokenizer (tokenizer.ggml.pre), which stands for
how a text is cut before the merges: here each known name is cut as the tokenizer.json of its models
does it. transformers' own reader takes GPT-2's cut for names that it does not know (in SmolLM2's
texts, fractions and digits of other scripts become other tokens), and needs PyTorch.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

from dnd_jax.base.gguf_header import HUB, Gguf
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line, listed
from dnd_jax.core.files import as_json

tokenizers = packages.deferred("tokenizers")
transformers = packages.deferred("transformers")
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
KEY = "tokenizer.ggml"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"


@dataclasses.dataclass(frozen=True)
class Cut:
    """How texts are cut before the merges. cuts: regular expressions of pieces; None: GPT-2's."""

    cuts: str | None = None
    digits: bool = False  # each digit by itself, before that
    composed: bool = False  # Unicode's composed form (NFC) first
    whole: bool = False  # a piece that is a token is it, whatever the merges make of it
    begins: bool = False  # texts begin with the bos token, where the file does not say


_LLAMA3 = Cut(f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{REST}", whole=True, begins=True)
# tokenizer.ggml.pre -> how its models' own tokenizer.json cuts.
CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Cut(f"{CONTRACTIONS}|{WORDS}|\\p{{N}}|{REST}", composed=True),
}
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
    cut = _cut(file)
    tokens, kinds = _tokens(file, config["vocab_size"])
    ids = _ids(file, len(tokens))
    backend = _backend(file, cut, tokens, kinds)
    ends = [ids["eos_token_id"]]
    ends += [file.get(f"{KEY}.{name}_token_id") for name in ("eot", "eom")]
    own = (CONTROL, USER_DEFINED)
    ends += [i for i, token in enumerate(tokens) if token in ENDS and kinds[i] in own]
    ends = [i for i in dict.fromkeys(ends) if i is not None and i < len(tokens)]
    bos, eos = (ids.get(key) for key in ("bos_token_id", "eos_token_id"))
    begins = file.get(f"{KEY}.add_bos_token", cut.begins) and bos is not None
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


def _cut(file: Gguf) -> Cut:
    kind, pre = file.get(f"{KEY}.model"), file.get(f"{KEY}.pre")
    if kind != "gpt2":
        raise InputError(
            f"{file.path}: {KEY}.model {kind!r} is not read (only gpt2, byte-level pairs, is); "
            f"{HUB}"
        )
    if pre in (None, "", "default"):
        raise InputError(
            f"{file.path}: {KEY}.pre does not say how texts are cut into tokens; convert the "
            f"model by a newer llama.cpp, or {HUB}"
        )
    if pre not in CUTS:
        raise InputError(
            f"{file.path}: {KEY}.pre {pre!r} is not known here (known: {', '.join(CUTS)}); {HUB}"
        )
    return CUTS[pre]


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


def _ids(file: Gguf, count: int) -> dict[str, int]:
    """{"eos_token_id": 2, ...} of the special tokens that the file names."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {f"{of}_token_id": file.get(f"{KEY}.{name}_token_id") for name, of in names.items()}
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


def _backend(
    file: Gguf, cut: Cut, tokens: Sequence[str], kinds: Sequence[int]
) -> "tokenizers.Tokenizer":
    merges = file.get(f"{KEY}.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{file.path}: {KEY}.merges is no list of pairs; copy the file again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        pieces = tokenizers.models.BPE(vocabulary, pairs, ignore_merges=cut.whole)
    except Exception as error:  # the package raises Exception itself
        raise InputError(f"{file.path}: {KEY}.merges: {first_line(error)}; {HUB}") from None
    backend, cutting = tokenizers.Tokenizer(pieces), tokenizers.pre_tokenizers
    if cut.composed:
        backend.normalizer = tokenizers.normalizers.NFC()
    steps = [cutting.Digits(individual_digits=True)] if cut.digits else []
    if cut.cuts is not None:
        steps.append(cutting.Split(tokenizers.Regex(cut.cuts), behavior="isolated"))
    steps.append(cutting.ByteLevel(add_prefix_space=False, use_regex=cut.cuts is None))
    backend.pre_tokenizer = cutting.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        own = [token for token, of in zip(tokens, kinds, strict=True) if of == kind]
        special = kind == CONTROL
        add([tokenizers.AddedToken(token, normalized=False, special=special) for token in own])
    return backend


def _post_process(backend: "tokenizers.Tokenizer", first: list[str], last: list[str]) -> None:
    """Has texts begin and end with these tokens, where special tokens are asked for."""
    processors = tokenizers.processors
    steps = [processors.ByteLevel(trim_offsets=False)]
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
