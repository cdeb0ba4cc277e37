"""Sizes of the paper's bases and of SmolLM2, known without a download: what their config.json on
the hub says. For plans, configurations and tests; whoever loads weights reads the file itself."""

import functools
import os
import pathlib

from dnd_jax.base.architecture import LmConfig
from dnd_jax.base.hf_config import load_base_config


def _qwen(vocab: int, d: int, f: int, layers: int, heads: int, kv_heads: int, **other) -> LmConfig:
    return LmConfig(vocab, d, f, layers, heads, kv_heads, 1e-6, 1e6, **other)


_QWEN_7B = _qwen(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False)
KNOWN = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen(151936, 896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen(151936, 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2.5-Coder-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen(
        151936, 2048, 11008, 36, 16, 2, max_position_embeddings=128000
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LmConfig(
        *(49152, 576, 1536, 30, 9, 3, 1e-5, 1e5),
        max_position_embeddings=8192,
        model_type="llama",
        qkv_bias=False,
    ),
}
# Of these only the text model stands above: its sizes count tokens, but its modules have other
# names inside the whole.
TEXT_PARTS = {"Qwen/Qwen2.5-VL-3B-Instruct"}


def base_sizes(path: str | os.PathLike, text_part: bool = False) -> LmConfig:
    """The sizes of a base: of a folder, else of KNOWN, else of the hub's config.json.

    text_part: whether those of TEXT_PARTS will do. Raises InputError as `load_base_config`.
    """
    name = os.fspath(path)
    if name in KNOWN and not pathlib.Path(name).is_dir() and (text_part or name not in TEXT_PARTS):
        _say(name)
        return KNOWN[name]
    return load_base_config(path)


@functools.cache
def _say(name: str) -> None:
    """Once a process."""
    print(f"{name}: its sizes are those that come with dnd_jax; the hub was not asked", flush=True)
