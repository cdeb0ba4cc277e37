"""Weight tokens: any PEFT LoRA of a decoder LLM <-> one array of equally sized tokens
(docs/METHOD.md section 2).

    layout = LoraLayout.from_tensors(tensors)
        # {"...q_proj.lora_A.weight": (r, d_in), "...lora_B.weight": (d_out, r)}
    tokens = layout.tokenize(tensors)              # float32 [T, r+2, w+2]
    tensors = layout.detokenize(tokens)            # the same keys and shapes back

Order, shapes, chunk width w and token count T come from the tensors alone; `to_json`/`from_json`
keep them with a generator.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dnd_jax.core.errors import InputError, listed
from dnd_jax.lora.names import canonical, lora_pairs

# The order of the projections inside a layer; other names follow, alphabetically.
MODULE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
SCALE_CELLS = 2  # rows and columns that a token adds for its scale pair


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One LoRA matrix and its place among the tokens. `shape` is as PEFT stores it: A (r, d_in), B
    (d_out, r)."""

    key: str
    shape: tuple[int, int]
    first_token: int
    num_tokens: int

    @property
    def is_b(self) -> bool:
        return self.key.endswith(".lora_B.weight")


class Stack(NamedTuple):
    """K matrices of one side and shape, of modules of one name, as one array (K, *shape)."""

    keys: tuple[str, ...]
    shape: tuple[int, int]
    is_b: bool
    tokens: np.ndarray  # (K, n) of each matrix, in order


def _module_sort_key(module: str) -> tuple:
    """Layers ascending; inside a layer MODULE_ORDER, then unknown names; modules outside any layer
    come last."""
    parts = module.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), math.inf)
    name = parts[-1]
    rank = MODULE_ORDER.index(name) if name in MODULE_ORDER else len(MODULE_ORDER)
    # A path may hold further numbers (experts): compare them as numbers, and the words around them
    # as words.
    path = tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
    return layer, rank, name if rank == len(MODULE_ORDER) else "", path


@dataclasses.dataclass(frozen=True)
class LoraLayout:
    """Where every LoRA matrix lies in the token array. T tokens of (r+2, w+2); a chunk is the (r,
    w) inside a token."""

    rank: int
    chunk_width: int
    matrices: tuple[Matrix, ...]

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], chunk_width: int | None = None
    ) -> "LoraLayout":
        """The layout of an adapter's tensors (arrays or anything with `.shape`; keys with or
        without PEFT's prefix).

        chunk_width w: None derives the greatest common divisor of all d_in and d_out. Raises
        InputError listing every key that is not a LoRA matrix, every missing partner and every
        deviating rank.
        """
        return cls.from_shapes(
            {key: tuple(value.shape) for key, value in tensors.items()}, chunk_width
        )

    @classmethod
    def from_shapes(
        cls, raw_shapes: Mapping[str, tuple[int, ...]], chunk_width: int | None = None
    ) -> "LoraLayout":
        """`from_tensors` for {key: shape}."""
        pairs, ranks, faults = lora_pairs(raw_shapes)
        if len(set(ranks.values())) > 1:
            common = max(set(ranks.values()), key=list(ranks.values()).count)
            faults += [
                f"{key} has rank {r}, the others {common}"
                for key, r in ranks.items()
                if r != common
            ]
        if faults:
            raise listed("not a usable LoRA adapter", sorted(faults))

        modules = sorted(pairs, key=_module_sort_key)
        lengths = [d for m in modules for d in (pairs[m]["A"][1], pairs[m]["B"][0])]
        width = math.gcd(*lengths) if chunk_width is None else chunk_width
        if width < 1:
            raise InputError(f"chunk width must be at least 1, not {width}")
        matrices, first = [], 0
        for module in modules:
            for side, long_axis in (("A", 1), ("B", 0)):
                shape = pairs[module][side]
                count = -(-shape[long_axis] // width)
                matrices.append(Matrix(f"{module}.lora_{side}.weight", shape, first, count))
                first += count
        return cls(rank=next(iter(ranks.values())), chunk_width=width, matrices=tuple(matrices))

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.matrices[-1].first_token + self.matrices[-1].num_tokens

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(r, w)."""
        return self.rank, self.chunk_width

    @property
    def token_shape(self) -> tuple[int, int]:
        """(r + 2, w + 2)."""
        return self.rank + SCALE_CELLS, self.chunk_width + SCALE_CELLS

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the adapted modules, in token order."""
        return tuple(m.key.removesuffix(".lora_A.weight") for m in self.matrices if not m.is_b)

    @functools.cached_property
    def cell_mask(self) -> np.ndarray | None:
        """bool [T, 1, w], True where a chunk's cell belongs to its matrix; None when the width
        divides everything."""
        lengths = np.concatenate([self._chunk_lengths(m) for m in self.matrices])
        if np.all(lengths == self.chunk_width):
            return None
        return (np.arange(self.chunk_width) < lengths[:, None])[:, None, :]

    @functools.cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """All matrices, those alike together: few arrays, however many layers there are."""
        alike: dict[tuple, list[Matrix]] = {}
        for m in self.matrices:
            alike.setdefault((*m.key.rsplit(".", 3)[-3:], m.shape), []).append(m)
        return tuple(
            Stack(
                tuple(m.key for m in found),
                found[0].shape,
                found[0].is_b,
                np.stack([m.first_token + np.arange(m.num_tokens) for m in found]),
            )
            for found in alike.values()
        )

    def _chunk_lengths(self, matrix: Matrix) -> np.ndarray:
        long_axis = matrix.shape[0 if matrix.is_b else 1]
        return np.minimum(
            long_axis - self.chunk_width * np.arange(matrix.num_tokens), self.chunk_width
        )

    def check(
        self, tensors: Mapping[str, np.ndarray], source: str = "adapter"
    ) -> dict[str, np.ndarray]:
        """The tensors under canonical keys; raises InputError listing all that deviates from this
        layout or is not finite."""
        found, faults = canonical(tensors), []
        expected = {m.key: m.shape for m in self.matrices}
        faults += [f"{key} is missing" for key in expected.keys() - found.keys()]
        faults += [f"{key} is not in the layout" for key in found.keys() - expected.keys()]
        for key in expected.keys() & found.keys():
            if tuple(found[key].shape) != expected[key]:
                faults.append(
                    f"{key} has shape {tuple(found[key].shape)}, expected {expected[key]}"
                )
            elif not np.all(np.isfinite(np.asarray(found[key], np.float32))):
                faults.append(f"{key} holds NaN or Inf")
        if faults:
            raise listed(f"{source} does not fit the LoRA layout", sorted(faults))
        return found

    def cut(self, tensors: Mapping[str, np.ndarray], source: str = "adapter") -> np.ndarray:
        """LoRA tensors -> chunks, float32 [T, r, w]; cells beyond a matrix's end are NaN. Raises
        InputError as `check`."""
        found = self.check(tensors, source)
        r, w = self.chunk_shape
        chunks = np.full((self.num_tokens, r, w), np.nan, np.float32)
        for m in self.matrices:
            matrix = np.asarray(found[m.key], np.float32)
            matrix = matrix.T if m.is_b else matrix  # (r, d)
            # A view of these tokens as (r, n, w).
            place = chunks[m.first_token : m.first_token + m.num_tokens].transpose(1, 0, 2)
            whole = matrix.shape[1] // w
            place[:, :whole] = matrix[:, : whole * w].reshape(r, whole, w)
            if whole < m.num_tokens:
                place[:, whole, : matrix.shape[1] - whole * w] = matrix[:, whole * w :]
        return chunks

    def join(self, chunks: np.ndarray) -> dict[str, np.ndarray]:
        """Chunks [T, r, w] -> LoRA tensors, float32, canonical keys: the inverse of `cut`. Raises
        InputError on another shape."""
        r, w = self.chunk_shape
        if chunks.shape != (self.num_tokens, r, w):
            raise InputError(
                f"chunks have shape {chunks.shape}, this layout has {(self.num_tokens, r, w)}"
            )
        tensors = {}
        for stack, values in zip(self.stacks, self.stacked(chunks), strict=True):
            for key, value in zip(stack.keys, values, strict=True):
                tensors[key] = np.array(value, np.float32, order="C")
        return {m.key: tensors[m.key] for m in self.matrices}

    def stacked(self, chunks) -> list:
        """Chunks [T, r, w] -> the matrices of each of `stacks`, (K, *shape). Differentiable where
        the chunks are JAX's."""
        found = []
        for stack in self.stacks:
            rows = chunks[stack.tokens].swapaxes(1, 2)  # (K, r, n, w)
            rows = rows.reshape(*rows.shape[:2], -1)[:, :, : stack.shape[0 if stack.is_b else 1]]
            found.append(rows.swapaxes(1, 2) if stack.is_b else rows)
        return found

    def tokenize(
        self, tensors: Mapping[str, np.ndarray], bfloat16: bool = False, source: str = "adapter"
    ) -> np.ndarray:
        """LoRA tensors -> float32 [T, r+2, w+2]: standardised chunks with their scale pair in the
        last rows and columns.

        bfloat16: round the tensors first, as the original does (parity). NaN marks padding. Raises
        InputError as `check`.
        """
        chunks = self.cut(tensors, source)
        if bfloat16:
            chunks = chunks.astype(ml_dtypes.bfloat16).astype(np.float32)
        mean, std = self._moments(chunks)
        tokens = np.full((self.num_tokens, *self.token_shape), np.nan, np.float32)
        # A constant chunk keeps its std of 0 in the scale pair; dividing by 1 leaves zeros rather
        # than NaN.
        divisor = np.where(std > 0, std, np.float32(1))
        tokens[:, : self.rank, : self.chunk_width] = (chunks - mean[:, None, None]) / divisor[
            :, None, None
        ]
        # (T, 2)
        pair = np.stack([8 * mean, np.log(0.9 * std + 0.1) + 1.6], axis=-1).astype(np.float32)
        row = np.resize(np.arange(2), self.token_shape[1])
        tokens[:, self.rank :, :] = pair[:, row][:, None, :]
        tokens[:, :, self.chunk_width :] = pair[:, None, :]
        return tokens

    def detokenize(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens [T, r+2, w+2] -> LoRA tensors, float32. Raises InputError on another shape."""
        tokens = np.asarray(tokens, np.float32)
        if tokens.shape != (self.num_tokens, *self.token_shape):
            raise InputError(
                f"tokens have shape {tokens.shape}, this layout has "
                f"{(self.num_tokens, *self.token_shape)}"
            )
        return self.join(self.chunks(tokens))

    def chunks(self, tokens):
        """Tokens [T, r+2, w+2] of NumPy or JAX -> chunks [T, r, w], float32. A predicted std below
        0 counts as 0 (a std of 0.01 is s1 = -0.62 and one of 0 is -0.70, so a small error can cross
        it)."""
        xp, (r, w) = tokens.__array_namespace__(), self.chunk_shape
        pair = tokens[:, :, w:].mean(axis=1)
        # The rows repeat the pair s0 s1 s0 s1 ... as far as whole pairs reach; an odd width breaks
        # the pattern at the corner.
        whole = w + SCALE_CELLS if w % 2 == 0 else w - 1
        if whole:
            pair = (pair + tokens[:, r:, :whole].reshape(len(tokens), -1, 2).mean(axis=1)) / 2
        mean = pair[:, 0] / 8
        std = xp.maximum((xp.exp(pair[:, 1] - 1.6) - 0.1) / 0.9, 0)
        return tokens[:, :r, :w] * std[:, None, None] + mean[:, None, None]

    def _moments(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sample standard deviation (ddof 1; undefined -> 1) of each chunk's own cells,
        float32 [T] each."""
        if self.cell_mask is None and chunks[0].size > 1:
            flat = chunks.reshape(len(chunks), -1)
            return flat.mean(axis=1), flat.std(axis=1, ddof=1)
        count = np.broadcast_to(~np.isnan(chunks), chunks.shape).sum(axis=(1, 2)).astype(np.float32)
        mean = np.nansum(chunks, axis=(1, 2)) / count
        square = np.nansum((chunks - mean[:, None, None]) ** 2, axis=(1, 2))
        return mean, np.where(count > 1, np.sqrt(square / np.maximum(count - 1, 1)), 1).astype(
            np.float32
        )

    def to_json(self) -> dict:
        """A JSON manifest: rank, chunk width and the matrices in token order."""
        return {
            "rank": self.rank,
            "chunk_width": self.chunk_width,
            "num_tokens": self.num_tokens,
            "token_shape": list(self.token_shape),
            "matrices": [[m.key, *m.shape] for m in self.matrices],
        }

    @classmethod
    def from_json(cls, manifest: Mapping | str) -> "LoraLayout":
        """The layout that `to_json` wrote. Raises InputError when the manifest contradicts
        itself."""
        if isinstance(manifest, str):
            manifest = json.loads(manifest)
        shapes = {key: (rows, columns) for key, rows, columns in manifest["matrices"]}
        layout = cls.from_shapes(shapes, manifest["chunk_width"])
        if (layout.num_tokens, layout.rank) != (manifest["num_tokens"], manifest["rank"]):
            raise InputError(
                f"layout manifest says {manifest['num_tokens']} tokens of rank "
                f"{manifest['rank']}, "
                f"its matrices give {layout.num_tokens} of rank {layout.rank}"
            )
        return layout
