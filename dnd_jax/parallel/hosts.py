"""What several processes of one run ask of each other: who leads, who goes first, whether all have
the same files."""

import contextlib
import functools
import pathlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.parallel import peers

Item = TypeVar("Item")
_in_turn = False  # whether this process is within `lead_first`


def lead() -> bool:
    """Whether this is process 0, which alone writes the files of a run. Asked of a process by
    itself, it takes no device, which another run may have."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process. Asked as `lead` is, it takes no device either."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def lead_first() -> Iterator[None]:
    """Process 0 runs the block first; all others run it when process 0 is through. While they wait,
    no collective is open that could time out. Not within such a block: the others would be let
    through too early, and ever after."""
    global _in_turn
    mine = peers.present
    assert not _in_turn, "a turn within a turn"
    _in_turn = True
    try:
        if mine is not None and mine.process:
            mine.wait_turn()
        yield
        if mine is not None and not mine.process:
            mine.pass_turn()
    finally:
        _in_turn = False


def check_shared(folder: pathlib.Path, flag: str = "workdir") -> None:
    """Process 0 leaves a mark in the folder that --flag gives. A process that does not see it there
    raises InputError: its folder is another one."""
    mine = peers.present
    if mine is None:
        return
    mark = folder / ".processes"
    with lead_first():
        if not mine.process:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(mine.token)
        elif not mark.is_file() or mark.read_text() != mine.token:
            raise InputError(
                f"--{flag}={folder}: process {mine.process} ({socket.gethostname()}) does not see "
                "what process 0 wrote there; "
                "give a folder that all hosts share"
            )


def check_alike(values: Mapping[str, str]) -> None:
    """Compares {what: text} over all processes. Where one has another text than process 0, all
    processes raise InputError, which names what differs and in which process."""
    if not several():
        return
    mine = [list(bytes.fromhex(digests.of_text(value))) for value in values.values()]
    # (processes, values, 32)
    everywhere = multihost_utils.process_allgather(np.asarray(mine, np.uint8))
    other = (everywhere != everywhere[0]).any(axis=2)
    faults = [
        f"{name} of process {', '.join(map(str, np.flatnonzero(other[:, i])))} differ from those "
        "of process 0"
        for i, name in enumerate(values)
        if other[:, i].any()
    ]
    if faults:
        raise InputError(
            f"{'; '.join(faults)}; copy the same files to all hosts, or share one folder"
        )


def check_writes(path: pathlib.Path) -> None:
    """Process 0 calls this before it writes `path`, which the other processes only read. If another
    process comes here, it has looked for the file under another name than process 0, because it
    reads other input files: it raises InputError."""
    if not lead():
        raise InputError(
            f"{path}: not there, though process 0 is through; process {jax.process_index()} "
            f"({socket.gethostname()}) reads other "
            "files: share the folder of the LoRA checkpoints, or copy it again"
        )


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process' share of a list that every process has: every item is some process'."""
    return items[jax.process_index() :: jax.process_count()] if several() else items


def lead_waits() -> None:
    """Process 0 waits until all others have come here too, however long that takes; these go on."""
    if peers.present is not None:
        peers.present.come_by()


def all_of(flag: bool) -> bool:
    """Whether the flag is true in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag)))) if several() else flag


def of_lead(value: int) -> int:
    """The number of process 0, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value))) if several() else value


def text_of_lead(text: str) -> str:
    """The text of process 0, in every process."""
    if not several():
        return text
    mine = np.frombuffer(text.encode(), np.uint8)
    size = of_lead(mine.size)
    sent = mine if lead() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes().decode()


def agreed(flag: bool) -> bool:
    """The flag of process 0, in every process."""
    return bool(of_lead(flag))


def to_host(x: jax.Array) -> np.ndarray | None:
    """A sharded array as NumPy in process 0, None in all others. Every process must call it: the
    parts that process 0 lacks go to all devices, one after the other, so that none ever holds the
    whole."""
    if not several() or x.is_fully_replicated:
        return np.asarray(x) if lead() else None
    whole = np.empty(x.shape, x.dtype) if lead() else None
    mine = {str(shard.index): shard.data for shard in x.addressable_shards}
    for number, (index, processes) in parts_of(x).items():
        if 0 in processes:
            part = mine.get(str(index))
        else:  # waited for: else all would be on their way at once
            part = jax.block_until_ready(part_on_all(x.sharding)(x, number))
        if whole is not None:
            whole[index] = part
    return whole


def _split_over(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that split some dimension."""
    return tuple(
        axis
        for entry in sharding.spec
        for axis in (entry if isinstance(entry, tuple) else (entry,))
        if axis is not None
    )


def parts_of(x: jax.Array) -> dict[int, tuple[tuple[slice, ...], set[int]]]:
    """{number of a part: (where it lies in the whole, processes that have it)}; the number counts
    along the axes of `_split_over`."""
    mesh, axes = x.sharding.mesh, _split_over(x.sharding)
    where, found = x.sharding.devices_indices_map(x.shape), {}
    for at in np.ndindex(mesh.devices.shape):
        on = dict(zip(mesh.axis_names, at, strict=True))
        number = int(np.ravel_multi_index([on[a] for a in axes], [mesh.shape[a] for a in axes]))
        device = mesh.devices[at]
        found.setdefault(number, (where[device], set()))[1].add(device.process_index)
    return found


@functools.cache
def part_on_all(sharding: NamedSharding) -> Callable[[jax.Array, int], jax.Array]:
    """(an array of that sharding, number of a part) -> the part on every device: as bits, of which
    the others add zeros."""
    axes = _split_over(sharding)

    def local(x, number):
        bits = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))
        only = jnp.where(jax.lax.axis_index(axes) == number, bits, jnp.zeros_like(bits))
        return jax.lax.bitcast_convert_type(jax.lax.psum(only, axes), x.dtype)

    specs = sharding.spec, PartitionSpec()
    return jax.jit(
        jax.shard_map(
            local,
            mesh=sharding.mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


def to_all_hosts(tree: Any) -> Any:
    """A tree of sharded arrays as NumPy, in every process; every process must call it."""
    if not several():
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(_whole(x)), tree)


def _whole(x: jax.Array) -> jax.Array:
    """The whole array on every device, where it is not wholly within this process."""
    if not several() or x.is_fully_replicated:
        return x
    return copied_to(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)


@functools.cache
def copied_to(where: Any) -> Callable[[Any], Any]:
    """The program that copies an array to a sharding, or a tuple of them to as many: one for all of
    a shape."""
    return jax.jit(lambda x: x, out_shardings=where)
