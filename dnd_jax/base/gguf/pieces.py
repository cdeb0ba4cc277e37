"""How a GGUF file's tokenizer makes tokens of a text that has none of the special ones.

Byte-level pairs (tokenizer.ggml.model gpt2): the file has tokens, merges and a name
(tokenizer.ggml.pre) for how a text is cut before them; each name known here is cut as the
tokenizer.json of its models does it. transformers' own reader takes GPT-2's cut for names that it
does not know (in SmolLM2's texts, fractions and digits of other scripts become other tokens), and
needs PyTorch.

SentencePiece (llama): the file has tokens with scores; of two neighbours that make a token, those
of the best score are merged first. A space is put before a text, and before what follows a special
token, as llama.cpp and the tokenizer.json of Llama 2 have it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from dnd_jax.base.gguf.header import HUB, Gguf
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line

tokenizers = packages.deferred("tokenizers")
KEY = "tokenizer.ggml"
NORMAL = 1  # of tokenizer.ggml.token_type
SPACE = "\u2581"  # as SentencePiece writes it
# Of a SentencePiece vocabulary whose file does not say.
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}
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
_LOWER, _UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how its models' own tokenizer.json cuts.
CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": Cut(_TEKKEN, whole=True, begins=True),
    "qwen2": Cut(f"{CONTRACTIONS}|{WORDS}|\\p{{N}}|{REST}", composed=True),
}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How texts become tokens. begins: with the bos token, where the file does not say; ids: of
    special tokens, likewise."""

    backend: "tokenizers.Tokenizer"
    begins: bool
    ids: Mapping[str, int]


def pieces_of(file: Gguf, tokens: Sequence[str], kinds: Sequence[int]) -> Pieces:
    """Of a file's tokens and their kinds. Raises InputError naming the key of what is missing,
    damaged or not known here."""
    kind = file.get(f"{KEY}.model")
    if kind == "gpt2":
        cut = _cut(file)
        return Pieces(_byte_level(file, cut, tokens), cut.begins, {})
    if kind == "llama":
        return Pieces(_sentencepiece(file, tokens, kinds), True, SENTENCEPIECE_IDS)
    raise InputError(f"{file.path}: {KEY}.model {kind!r} is not read (only gpt2, llama); {HUB}")


def _cut(file: Gguf) -> Cut:
    pre = file.get(f"{KEY}.pre")
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


def _byte_level(file: Gguf, cut: Cut, tokens: Sequence[str]) -> "tokenizers.Tokenizer":
    merges = file.get(f"{KEY}.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{file.path}: {KEY}.merges is no list of pairs; copy the file again")
    backend = _merging(file, tokens, pairs, ignore_merges=cut.whole)
    cutting = tokenizers.pre_tokenizers
    if cut.composed:
        backend.normalizer = tokenizers.normalizers.NFC()
    steps = [cutting.Digits(individual_digits=True)] if cut.digits else []
    if cut.cuts is not None:
        steps.append(cutting.Split(tokenizers.Regex(cut.cuts), behavior="isolated"))
    steps.append(cutting.ByteLevel(add_prefix_space=False, use_regex=cut.cuts is None))
    backend.pre_tokenizer = cutting.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentencepiece(
    file: Gguf, tokens: Sequence[str], kinds: Sequence[int]
) -> "tokenizers.Tokenizer":
    scores, first = file.get(f"{KEY}.scores"), file.get(f"{KEY}.add_space_prefix", True)
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise InputError(
            f"{file.path}: {KEY}.scores is not one for each of the {len(tokens)} tokens; copy the "
            "file again"
        )
    if file.get(f"{KEY}.remove_extra_whitespaces", False):
        raise InputError(
            f"{file.path}: {KEY}.remove_extra_whitespaces is true, which is not done here; {HUB}"
        )
    unknown = file.get(f"{KEY}.unknown_token_id", SENTENCEPIECE_IDS["unk"])
    how = {"byte_fallback": True, "fuse_unk": True}
    if type(unknown) is int and 0 <= unknown < len(tokens):
        how["unk_token"] = tokens[unknown]
    backend = _merging(file, tokens, _by_score(tokens, kinds, scores[: len(tokens)]), **how)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * first + [spaces])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * first)
    return backend


def _by_score(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, those of the best score first."""
    known = set(tokens)
    found = [
        (-score, i, -at, token)
        for i, (token, kind, score) in enumerate(zip(tokens, kinds, scores, strict=True))
        if kind == NORMAL
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    return [(token[:-cut], token[-cut:]) for _, _, cut, token in sorted(found)]


def _merging(
    file: Gguf, tokens: Sequence[str], pairs: Sequence[tuple[str, str]], **how
) -> "tokenizers.Tokenizer":
    """A tokenizer that merges these pairs, in this order."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs, **how))
    except Exception as error:  # the package raises Exception itself
        raise InputError(f"{file.path}: {KEY}.merges: {first_line(error)}; {HUB}") from None
