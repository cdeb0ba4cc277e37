"""`dnd bench --input`: how many samples a second this host can give its devices, and of its own
rate of copying how much that is.

    dnd bench --input --config=configs/qwen2_5_0_5b_commonsense.py

The batches are those of training (`Pairs.batch_at`) on files of the setting's sizes with random
numbers; "warm" is read from memory, "cold" from the disk, whose pages were given back before.
"""

import collections
import dataclasses
import math
import mmap
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dnd_jax.config.schema import Config
from dnd_jax.config.training import OF_LORAS
from dnd_jax.core.arrays import open_array, write_array
from dnd_jax.core.files import need_space
from dnd_jax.generator.pairs import THREADS, PairedDataset, Pairs
from dnd_jax.generator.sizes import sample_shapes, spec_of

DATASETS, CHECKPOINTS, REPEATS = 2, 4, 5
MOST = 1 << 30  # bytes of a batch here, about


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a sample is timed: bytes of it, seconds a batch of `samples`, warm and cold."""

    name: str
    size: int
    samples: int
    warm: float
    cold: float


def parts_of(config: Config, folder: pathlib.Path) -> list[Part]:
    """The parts of a training sample that the host reads, and all of them, timed on files in a
    folder. Raises InputError where it has no room."""
    grid, n, c = spec_of(config).token_grid, config.condition.num_prompts, config.train
    kept = c.targets_on == "devices"
    shapes = sample_shapes(config, kept)
    prompts = {k: (x.shape[1:], x.dtype) for k, x in shapes.items() if k not in OF_LORAS.values()}
    of_prompts = n * sum(_bytes(*of) for of in prompts.values())
    whole = sum(_bytes(x.shape, x.dtype) for x in shapes.values())
    samples = max(1, min(c.batch_size, MOST // whole))
    pool = 2 * n
    a_set = 2 * of_prompts + CHECKPOINTS * _bytes(grid, np.float32)
    need_space(folder, DATASETS * a_set, "the files of `dnd bench --input`", "free some space")
    datasets, mapped = [], []
    for k in range(DATASETS):
        arrays = {
            key: _file(folder / f"{k}_{key}.npy", (pool, *shape), dtype)
            for key, (shape, dtype) in prompts.items()
        }
        targets = _file(folder / f"{k}_tokens.npy", (CHECKPOINTS, *grid), np.float32)
        datasets.append(PairedDataset(f"dataset_{k}", arrays, targets))
        mapped += [*arrays.values(), targets]

    def timed(name: str, size: int, of: list[PairedDataset], taught: tuple[str, ...]) -> Part:
        how = {"taught_at": lambda step: taught, "of_loras": c.of_loras, "kept": kept}
        pairs = Pairs(of, samples, n, config.seed, **how)
        warm = _seconds(lambda i: pairs.batch_at(0, memory=0))  # the same ones again
        cold = _seconds(lambda i: pairs.batch_at(i, memory=0), lambda: give_back(folder, mapped))
        return Part(name, size, samples, warm, cold)

    taught = c.taught_at(c.weights_first)
    nothing = {"none": np.zeros((pool, 0), np.int8)}
    if kept:  # numbers, which are drawn with the prompts
        return [timed("prompts", whole, datasets, taught)]
    found = [timed("prompts", of_prompts, datasets, ())]
    if whole > of_prompts:
        alone = [dataclasses.replace(d, prompts=nothing) for d in datasets]
        found.append(timed("LoRA checkpoints", whole - of_prompts, alone, taught))
        found.append(timed("all", whole, datasets, taught))
    return found


def _bytes(shape: tuple[int, ...], dtype: type) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _file(path: pathlib.Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A file of random numbers, mapped into memory."""
    rng = np.random.default_rng(len(path.name))
    one = rng.integers(0, 100, shape[1:]).astype(dtype)
    write_array(path, shape, dtype, (one for _ in range(shape[0])))
    return open_array(path).view(dtype)


def give_back(folder: pathlib.Path, arrays: Iterable[np.ndarray]) -> None:
    """Drops the pages of the files from memory, where the system does that: first those that the
    arrays have mapped, which it would keep."""
    if not hasattr(os, "posix_fadvise"):
        return
    for array in arrays:
        while not isinstance(array, mmap.mmap):
            array = array.base
        array.madvise(mmap.MADV_DONTNEED)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(take: Callable[[int], object], before: Callable[[], object] | None = None) -> float:
    """The median over REPEATS calls, each after `before`, and all after two that do not count."""
    found = []
    for i in range(REPEATS + 2):
        if before:
            before()
        started = time.perf_counter()
        take(i)
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def copy_rate() -> float:
    """Bytes a second that as many threads as gather samples copy from memory to memory."""
    pieces = np.array_split(np.ones(MOST // 4, np.float32), THREADS)
    places = [np.empty_like(piece) for piece in pieces]
    with ThreadPoolExecutor(THREADS) as pool:

        def copy(_: int) -> None:
            collections.deque(pool.map(np.copyto, places, pieces), maxlen=0)

        return MOST / _seconds(copy)


def feed_table(config: Config, workdir: pathlib.Path) -> str:
    """The table and what it comes to. Raises InputError as `parts_of`."""
    rate = copy_rate()
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_input_", dir=workdir) as folder:
        parts = parts_of(config, pathlib.Path(folder))
    lines = ["| part | MB a sample | samples a second, warm | GB/s | of copying | cold |"]
    lines.append("|---|---|---|---|---|---|")
    for part in parts:
        a_second = part.size * part.samples / part.warm
        lines.append(
            f"| {part.name} | {part.size / 1e6:.3g} | {part.samples / part.warm:.4g} | "
            f"{a_second / 1e9:.3g} | {a_second / rate:.2f} | {part.samples / part.cold:.4g} |"
        )
    last, batch = parts[-1], config.train.batch_size
    warm, cold = (batch * seconds / last.samples for seconds in (last.warm, last.cold))
    return "\n".join(lines) + (
        f"\n\ncopying from memory to memory: {rate / 1e9:.3g} GB/s. A batch of {batch}, by this "
        f"host alone: {warm:.3g} s warm, {cold:.3g} s cold; `dnd plan` says what the step takes."
    )
