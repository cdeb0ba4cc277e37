"""What the decoder is trained to output: LoRA weights normalised in one of two ways, and back.

"chunk": the paper's weight tokens, each chunk standardised by its own moments, which ride along as
scale cells (docs/METHOD.md section 2). "element": each weight minus its mean over all training
checkpoints, divided by one scale a token; the statistics stay with the generator. A token is then
the chunk alone (r, w), and the decoder spends itself on what differs between tasks.
"""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from tqdm import tqdm

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import replacing
from dnd_jax.core.tensors import opened, write_safetensors
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.moments import Moments

Tensors = Mapping[str, np.ndarray]


# Targets are arguments of a compiled step: their statistics are data, the layout is its shape.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ChunkTarget:
    layout: LoraLayout
    bfloat16: bool = False  # round checkpoints first, as the original does

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, h, w) of the token grid."""
        return token_grid("chunk", self.layout)

    def encode(self, tensors: Tensors, source: str = "adapter") -> np.ndarray:
        """LoRA tensors -> float32 (T, h, w), NaN where a token is padded."""
        return self.layout.tokenize(tensors, self.bfloat16, source)

    def decode(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `encode`."""
        return self.layout.detokenize(tokens)

    def chunks(self, tokens):
        """Tokens (T, h, w) of NumPy or JAX -> weights in chunks [T, r, w]."""
        return self.layout.chunks(tokens)

    def statistics(self) -> dict[str, np.ndarray]:
        return {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ElementTarget:
    layout: LoraLayout = dataclasses.field(metadata={"static": True})
    mean: np.ndarray  # (T, r, w)
    scale: np.ndarray  # (T,)

    @classmethod
    def fit(
        cls, layout: LoraLayout, checkpoints: Callable[[], Iterable[tuple[str, Tensors]]]
    ) -> "ElementTarget":
        """Statistics over all training checkpoints, read once, one at a time. A token that never
        differs gets scale 1."""
        moments = Moments(by_token=True)
        for source, tensors in checkpoints():
            moments.add(layout.cut(tensors, source))
        scale = np.where(moments.std > 0, moments.std, 1)
        return cls(layout, moments.mean.astype(np.float32), scale.astype(np.float32))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, r, w) of the token grid."""
        return token_grid("element", self.layout)

    def encode(self, tensors: Tensors, source: str = "adapter") -> np.ndarray:
        """LoRA tensors -> float32 (T, r, w), NaN where a token is padded."""
        return (self.layout.cut(tensors, source) - self.mean) / self.scale[:, None, None]

    def decode(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `encode`."""
        return self.layout.join(self.chunks(np.asarray(tokens, np.float32)))

    def chunks(self, tokens):
        """Tokens (T, r, w) of NumPy or JAX -> weights in chunks [T, r, w]."""
        return tokens * self.scale[:, None, None] + self.mean

    def statistics(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "scale": self.scale}


Target = ChunkTarget | ElementTarget


def save_statistics(path: str | os.PathLike, target: Target) -> None:
    """Writes a target's statistics with their checksum as safetensors, whole or not at all."""
    statistics = target.statistics()
    with replacing(path) as temporary:
        write_safetensors(temporary, statistics, {"crc32": _checksum(statistics)})


def load_statistics(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """What `save_statistics` wrote; None where there is no file, or, after one line on the
    terminal, where it is not what was written."""
    if not path.is_file():
        return None
    try:
        with opened(path) as file:
            statistics = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get("crc32") == _checksum(statistics):
                return statistics
    except InputError:
        pass
    tqdm.write(f"{path}: its content is not what was written; it is made again")
    return None


def _checksum(statistics: Mapping[str, np.ndarray]) -> str:
    found = 0
    for _, value in sorted(statistics.items()):
        found = zlib.crc32(np.ascontiguousarray(value), found)
    return f"{found:08x}"


def token_grid(kind: str, layout: LoraLayout) -> tuple[int, int, int]:
    """(T, h, w) of the tokens of a kind of target, "chunk" or "element"."""
    return layout.num_tokens, *(layout.token_shape if kind == "chunk" else layout.chunk_shape)


def from_statistics(
    kind: str, layout: LoraLayout, statistics: Mapping[str, np.ndarray], bfloat16: bool = False
) -> Target:
    """The target that a stored generator was trained on."""
    return (
        ChunkTarget(layout, bfloat16)
        if kind == "chunk"
        else ElementTarget(layout, statistics["mean"], statistics["scale"])
    )
