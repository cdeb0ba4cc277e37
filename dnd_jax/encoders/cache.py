"""The condition: prompts -> hidden states of the frozen text encoder, (n, L, C), computed once and
cached by content.

docs/METHOD.md section 4; padding positions included, texts truncated and padded to L =
max_text_length, dropout off. States of many long texts are large (3 MB a text for L = 4096, C =
384, in bfloat16): they go to disk batch by batch and are mapped into memory from there.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import DTypeLike

from dnd_jax.base.hub import resolve
from dnd_jax.config import schema
from dnd_jax.core import digests
from dnd_jax.core.arrays import open_array, write_array
from dnd_jax.core.files import need_space, replacing
from dnd_jax.core.stopping import stop
from dnd_jax.encoders.load import LAST, encode_windows, encoder_files, is_vectors, load_encoder
from dnd_jax.parallel.placement import BATCH_AXES, batch_ways

VERSION = 1  # of the fingerprint, by which files of states are named
TOKENS_PER_BATCH = 8192  # of a device


def mean_pooled(condition, valid):
    """Embeddings (n, L, C) and masks (n, L) of NumPy or JAX -> (n, C), the mean over each prompt's
    real tokens."""
    weight = valid[..., None].astype(np.float32)
    return (condition * weight).sum(axis=1) / weight.sum(axis=1)


@jax.jit
def _picked(states: Sequence[jax.Array], at: np.ndarray) -> jax.Array:
    """Rows of batches of states, in one program: op by op six are compiled."""
    return jnp.concatenate(states)[at]


def fingerprint(files: Mapping[str, pathlib.Path], config: schema.Condition) -> str:
    """What an encoder's output depends on: its files (`Encoder.files`), layer, text length and
    type."""
    of_model = digests.of_files(files)
    kind = [config.dtype] if config.dtype != "float32" else []  # once all were
    return digests.of_json([VERSION, of_model, config.layer, config.max_text_length, *kind])


def identify(config: schema.Condition) -> str:
    """`PromptEncoder.fingerprint`, without loading it."""
    return fingerprint(encoder_files(config.encoder), config)


def is_encoder(wanted: str, config: schema.Condition) -> bool:
    """Whether an encoder has the fingerprint that a generator's description of any version wants;
    it is not loaded."""
    return wanted == identify(config) or (
        config.dtype == "float32" and wanted == fingerprint_of_format_0(config)
    )


def fingerprint_of_format_0(config: schema.Condition) -> str:
    """The fingerprint in descriptions without a format number: of every .json, .txt, .safetensors
    and .model file of the encoder's folder, whether it belongs to the model or not."""
    path = pathlib.Path(config.encoder)
    kinds = (".json", ".txt", ".safetensors", ".model")
    folder = None if is_vectors(path) else resolve(config.encoder)
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds) if folder else [path]
    last = config.layer == LAST
    which = "last hidden states" if last else f"hidden states of layer {config.layer}"
    parts = (part for file in files for part in (file.name, *_blocks(file)))
    return digests.of_text(f"{which}, L = {config.max_text_length}", *parts)


def _blocks(path: pathlib.Path) -> Iterator[bytes]:
    """A file's bytes, a block at a time."""
    with path.open("rb") as file:
        yield from iter(lambda: file.read(digests.BLOCK), b"")


class PromptEncoder:
    """The text encoder with its tokenizer; `fingerprint` identifies its weights, tokenizer, layer,
    text length and type.

    `module` and `params` are what `encode_windows` takes, `tokens` gives those of texts. mesh:
    of this process' devices, to split parameters and texts over. revision: of an encoder from the
    hub, the commit to take; the attribute says which it is.
    """

    def __init__(
        self,
        config: schema.Condition,
        mesh: jax.sharding.Mesh | None = None,
        revision: str = "",
    ):
        encoder = load_encoder(config.encoder, config.layer, mesh, revision, config.dtype)
        self.revision = encoder.revision
        self.module, self.params, self._tokenize = encoder.module, encoder.params, encoder.tokenize
        self.tokens = encoder.tokens
        self.max_text_length = config.max_text_length
        self.fingerprint = fingerprint(encoder.files, config)
        self._ways, self._over_texts = 1, None
        if mesh is not None:
            self._ways = batch_ways(mesh)
            self._over_texts = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        # Parameters are an argument, not a constant that XLA would fold into the program.
        self._encode = jax.jit(
            lambda params, ids, valid: encode_windows(self.module, params, ids, valid),
            out_shardings=self._over_texts,
        )

    @property
    def width(self) -> int:
        """C."""
        return self.module.width

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> (ids, valid), int32 (n, L)."""
        return self._tokenize(prompts, self.max_text_length)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> float32 (n, L, C)."""
        return np.concatenate([states for states, _ in self._batches(prompts)])

    def on_devices(self, prompts: Sequence[str]) -> tuple[jax.Array, np.ndarray]:
        """(`encode` in the encoder's type, on its devices; the masks (n, L))."""
        states, valid = zip(*self._computed(prompts), strict=True)
        return jnp.concatenate(states), np.concatenate(valid)

    def cached(
        self, prompts: Sequence[str], cache: str | os.PathLike, dtype: str = "float32"
    ) -> np.ndarray:
        """`encode` in a type, kept in a file under `cache` that is mapped into memory, named by a
        hash of encoder and prompts. Raises InputError when the disk has no room for it."""
        kind = jnp.dtype(dtype)
        what = "states" if kind == np.float32 else f"states_{kind}"
        of_one = self.max_text_length, self.width
        means = []

        def parts() -> Iterator[np.ndarray]:
            for states, valid in self._batches(prompts):
                if kind != np.float32:  # of rounded states they could not be made later
                    means.append(mean_pooled(states, valid))
                yield states.astype(kind, copy=False)

        found = self._cached(prompts, cache, what, of_one, kind, parts())
        if means:
            self._cached(prompts, cache, "means", (self.width,), np.float32, iter(means))
        return found.view(kind)  # NumPy's files know no bfloat16, only that it has two bytes

    def cached_means(self, prompts: Sequence[str], cache: str | os.PathLike) -> np.ndarray:
        """The mean of `encode` over each prompt's real tokens, (n, C), kept in the same way. What
        `cached` has kept of these texts is read; else one batch of states is held at a time."""
        states = open_array(self._path(prompts, cache, "states"))
        parts = (mean_pooled(*batch) for batch in self._batches(prompts, states))
        return self._cached(prompts, cache, "means", (self.width,), np.float32, parts)

    def cached_tokens(
        self, prompts: Sequence[str], cache: str | os.PathLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """`tokenize`, kept in the same way: texts are tokenised once, ahead of training."""
        size = self._at_once(len(prompts), self.max_text_length)
        parts = (
            np.stack(self.tokenize(prompts[i : i + size]), axis=1)
            for i in range(0, len(prompts), size)
        )
        both = self._cached(prompts, cache, "ids", (2, self.max_text_length), np.int32, parts)
        return both[:, 0], both[:, 1]

    def _at_once(self, rows: int, length: int) -> int:
        """How many rows of tokens, of so many, are encoded at once: a multiple of the parts that
        the mesh splits them into."""
        return self._ways * min(-(-rows // self._ways), max(1, TOKENS_PER_BATCH // length))

    def _batches(
        self, prompts: Sequence[str], states: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(float32 states (b, L, C), valid (b, L)), batch after batch of the prompts; states: those
        of all, if they are known."""
        if states is None:
            for computed, valid in self._computed(prompts):
                yield np.asarray(computed, np.float32), valid
            return
        size = self._at_once(len(prompts), self.max_text_length)
        for first in range(0, len(prompts), size):
            _, valid = self.tokenize(prompts[first : first + size])
            yield states[first : first + size], valid

    def _computed(self, prompts: Sequence[str]) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """(states (b, L, C), valid (b, L)), batch after batch of the prompts."""
        size = self._at_once(len(prompts), self.max_text_length)
        for first in range(0, len(prompts), size):
            stop.check()
            ids, valid = self.tokenize(prompts[first : first + size])
            yield self._states(ids, valid, size), valid

    def _states(self, ids_bxL: np.ndarray, valid_bxL: np.ndarray, texts: int) -> jax.Array:
        """States (b, L, C) of at most so many texts, cut into windows as `encode_windows` does."""
        batch, length = ids_bxL.shape
        window = min(self.module.window or length, length)
        whole = length // window * window
        both = np.stack((ids_bxL, valid_bxL), axis=-1)
        parts = both[:, :whole].reshape(-1, window, 2), both[:, whole:]
        states = [
            self._of_rows(part, self._at_once(texts * len(part) // batch, part.shape[1]), of_text)
            for part, of_text in zip(parts, (whole // window, 1), strict=True)
            if part.size
        ]
        return jnp.concatenate([x.reshape(batch, -1, self.width) for x in states], axis=1)

    def _of_rows(self, rows_RxLx2: np.ndarray, size: int, of_text: int) -> jax.Array:
        """States (R, L, C) of rows (ids, valid), so many of a text, at most `size` at once. Equal
        ones, such as windows of padding alone, are encoded once."""
        count, length, _ = rows_RxLx2.shape
        whole = np.ascontiguousarray(rows_RxLx2).reshape(count, -1)
        as_bytes = whole.view(f"V{whole.shape[1] * whole.itemsize}")[:, 0]  # fast to compare
        _, which, at = np.unique(as_bytes, return_index=True, return_inverse=True)
        different, states = whole[which], []
        # Of long texts little may be left; of halves there are few shapes to compile.
        half = -(-size // self._ways // 2) * self._ways
        while of_text > 1 and len(different) <= half < size:
            size, half = half, -(-half // self._ways // 2) * self._ways
        for first in range(0, len(different), size):
            stop.check()
            some = different[first : first + size].reshape(-1, length, 2)
            # The last batch is filled up: one shape, one compilation.
            rows = some[np.arange(size) % len(some)]
            # Put, as jit takes no NumPy arrays to split where there are several processes.
            ids_valid = jax.device_put((rows[..., 0], rows[..., 1]), self._over_texts)
            states.append(self._encode(self.params, *ids_valid))
        return _picked(states, at)

    def _path(self, prompts: Sequence[str], cache: str | os.PathLike, what: str) -> pathlib.Path:
        texts = (part for p in prompts for part in (len(p).to_bytes(8, "little"), p))
        digest = digests.of_parts(itertools.chain([self.fingerprint], texts))
        return pathlib.Path(cache, f"{what}_{digest[:32]}.npy")

    def _cached(
        self,
        prompts: Sequence[str],
        cache: str | os.PathLike,
        what: str,
        of_one: tuple[int, ...],
        dtype: DTypeLike,
        parts: Iterator[np.ndarray],
    ) -> np.ndarray:
        """The array (n, *of_one) of the parts, which are only made when there is no file of it."""
        path = self._path(prompts, cache, what)
        array = open_array(path)
        if array is None:
            shape = len(prompts), *of_one
            size, instead = np.dtype(dtype).itemsize * math.prod(shape), "use another --workdir"
            if what.startswith("states"):
                instead += ", or --config.condition.in_graph=true, which keeps none of them"
            need_space(path.parent, size, f"the {what} of {len(prompts)} prompts", instead)
            with replacing(path) as temporary:
                write_array(temporary, shape, dtype, parts)
            array = np.load(path, mmap_mode="r")
        return array
