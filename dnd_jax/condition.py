"""The condition: prompts -> hidden states of the frozen text encoder, (n, L, C), computed once and cached by content.

METHOD.md section 4; padding positions included, texts truncated and padded to L = max_text_length, dropout off.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dnd_jax import config as config_lib
from dnd_jax.files import replacing
from dnd_jax.models.text_encoder import LAST, encode_windows, load_encoder
from dnd_jax.stopping import stop

TOKENS_PER_BATCH = 8192
CHUNK = 1 << 24  # bytes of a file hashed at a time


class PromptEncoder:
    """The text encoder with its tokenizer; `fingerprint` identifies its weights, tokenizer, layer and text length.

    `module` and `params` are what `encode_windows` takes; `rules` the sharding of `params`, which lie on the mesh if one is given.
    """

    def __init__(self, config: config_lib.Condition, mesh: jax.sharding.Mesh | None = None):
        encoder = load_encoder(config.encoder, config.layer, mesh)
        self.module, self.params, self.rules, self._tokenize = encoder.module, encoder.params, encoder.rules, encoder.tokenize
        self.max_text_length = config.max_text_length
        which = "last hidden states" if config.layer == LAST else f"hidden states of layer {config.layer}"
        digest = hashlib.sha256(f"{which}, L = {config.max_text_length}".encode())
        for path in encoder.files:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        self.fingerprint = digest.hexdigest()
        # Parameters are an argument, not a constant that XLA would fold into the program.
        self._encode = jax.jit(lambda params, ids, valid: encode_windows(self.module, params, ids, valid))

    @property
    def width(self) -> int:
        """C."""
        return self.module.width

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> (ids, valid), int32 (n, L)."""
        return self._tokenize(prompts, self.max_text_length)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> float32 (n, L, C)."""
        ids, valid = self.tokenize(prompts)
        size = min(len(ids), max(1, TOKENS_PER_BATCH // self.max_text_length))
        out = np.empty((*ids.shape, self.width), np.float32)
        for first in range(0, len(ids), size):
            stop.check()
            rows = np.arange(first, first + size) % len(ids)  # the last batch wraps around: one shape, one compilation
            values = self._encode(self.params, ids[rows], valid[rows])
            count = min(size, len(ids) - first)
            out[first : first + count] = values[:count]
        return out

    def cached(self, prompts: Sequence[str], cache: str | os.PathLike) -> np.ndarray:
        """`encode`, kept as a memory-mapped file under `cache` whose name is the hash of encoder and prompts."""
        return self._cached(prompts, cache, "states", lambda: self.encode(prompts))

    def cached_tokens(self, prompts: Sequence[str], cache: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
        """`tokenize`, kept in the same way: texts are tokenised once, ahead of training."""
        both = self._cached(prompts, cache, "tokens", lambda: np.stack(self.tokenize(prompts)))
        return both[0], both[1]

    def _cached(self, prompts: Sequence[str], cache: str | os.PathLike, what: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        digest = hashlib.sha256(self.fingerprint.encode())
        for prompt in prompts:
            digest.update(len(prompt).to_bytes(8, "little") + prompt.encode())
        path = pathlib.Path(cache, f"{what}_{digest.hexdigest()[:32]}.npy")
        if not path.is_file():
            values = make()
            with replacing(path) as temporary:
                np.save(temporary, values)
        return np.load(path, mmap_mode="r")
