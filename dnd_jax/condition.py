"""The condition: prompts -> last hidden states of the frozen text encoder, (n, L, C), computed once and cached by content.

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
from dnd_jax.loop import stop
from dnd_jax.models import hf
from dnd_jax.models.text_encoder import encode_windows

TOKENS_PER_BATCH = 8192


class PromptEncoder:
    """The text encoder with its tokenizer; `fingerprint` identifies its weights, tokenizer and text length."""

    def __init__(self, config: config_lib.Condition):
        folder = hf.resolve(config.encoder)
        self.max_text_length = config.max_text_length
        self.module, self.params = hf.load_encoder(folder)
        self._tokenizer = hf.load_tokenizer(folder)
        digest = hashlib.sha256(f"last hidden states, L = {config.max_text_length}".encode())
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".safetensors")):
            digest.update(path.name.encode() + path.read_bytes())
        self.fingerprint = digest.hexdigest()
        # Parameters are an argument, not a constant that XLA would fold into the program.
        self._encode = jax.jit(lambda params, ids, valid: encode_windows(self.module, params, ids, valid))

    @property
    def width(self) -> int:
        """C."""
        return self.module.config.hidden_size

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> (ids, valid), int32 (n, L)."""
        encoded = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_text_length, return_tensors="np"
        )
        return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.int32)

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
