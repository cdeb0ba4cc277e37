"""Word vectors as a text encoder, from a text file with one word a line: `word v1 v2 ... vC`
(GloVe's format).

A text is cut into words (runs of letters, digits and underscores) and single other marks; spaces
separate. Each is looked up as it stands, then in lower case. Unknown words and padding are zero
vectors. A first line "words C" (word2vec's) is passed over.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dnd_jax.core.errors import InputError

RULES = ((r"vectors$", (None, "fsdp")),)
UNKNOWN = 0  # the id of unknown words and padding


@dataclasses.dataclass(frozen=True)
class WordVectorsConfig:
    vocab_size: int  # words and UNKNOWN
    width: int  # C


class WordVectors(nn.Module):
    config: WordVectorsConfig
    dtype: jnp.dtype = jnp.float32

    @property
    def width(self) -> int:
        """C of a vector."""
        return self.config.width

    @property
    def window(self) -> None:
        """None: texts may have any length."""
        return None

    @nn.compact
    def __call__(self, ids_BxL: jax.Array, valid_BxL: jax.Array) -> jax.Array:
        """valid_BxL is 1 at words. Returns (B, L, C)."""
        init = nn.initializers.normal(0.02)
        vectors = self.param("vectors", init, (self.config.vocab_size, self.config.width))
        return jnp.where(valid_BxL[..., None] > 0, vectors[ids_BxL], 0).astype(self.dtype)


def read_vectors(path: str | os.PathLike) -> tuple[dict[str, int], np.ndarray]:
    """(id of each word, vectors float32 (words + 1, C), row 0 zero) of a text file; of a repeated
    word the first counts.

    Raises InputError naming the line that is no word with C numbers.
    """
    path = pathlib.Path(path)
    ids: dict[str, int] = {}
    rows: list[np.ndarray] = []
    width = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                parts = line.rstrip().split(" ")
                if number == 1 and len(parts) == 2 and all(p.isdecimal() for p in parts):
                    continue
                width = width or len(parts) - 1
                split = len(parts) - width  # not always 1: a few of GloVe's "words" hold spaces
                row = _numbers(parts[split:]) if width and split > 0 else None
                if row is None or not parts[0]:
                    count = f"{width} " if width else ""
                    raise InputError(
                        f"{path}:{number}: not a word and its {count}finite numbers with one "
                        "space between"
                    )
                word = " ".join(parts[:split])
                if word not in ids:
                    ids[word] = len(rows) + 1
                    rows.append(row)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8, so no text file of word vectors") from None
    if not rows:
        raise InputError(f"{path}: no word vectors in it")
    return ids, np.stack([np.zeros(width, np.float32), *rows])


def _numbers(parts: Sequence[str]) -> np.ndarray | None:
    try:
        row = np.array(parts, np.float32)
    except ValueError:
        return None
    return row if np.isfinite(row).all() else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def words(texts: Sequence[str], length: int | None) -> list[list[str]]:
    """The words of each text; the first `length` of them."""
    return [_words(text)[:length] for text in texts]


def tokenize(
    vocabulary: Mapping[str, int], texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> (ids, valid), int32 (n, L): the first L words, padded on the right."""
    ids, valid = (
        np.full((len(texts), length), UNKNOWN, np.int32),
        np.zeros((len(texts), length), np.int32),
    )
    for i, text in enumerate(texts):
        words = _words(text)[:length]
        ids[i, : len(words)] = [
            vocabulary.get(w, vocabulary.get(w.lower(), UNKNOWN)) for w in words
        ]
        valid[i, : len(words)] = 1
    return ids, valid
