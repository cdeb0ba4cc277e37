"""What a compiled program says of itself: its collectives, counted through loops, with the bytes
that they put on the links."""

import dataclasses
import re
from collections import defaultdict

import numpy as np

from dnd_jax.core import digests

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_HEADER = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(
    r"^\s+(ROOT )?%?[\w.\-]+ = (?P<type>.*?) (?P<op>[a-z][a-z0-9\-]*)\((?P<rest>.*)$"
)
_SHAPE = re.compile(r"\b(?P<type>pred|[a-z]+\d+\w*)\[(?P<dims>[\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations)=(?:\{(?P<many>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_LIMIT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'known_trip_count[\\"]*:\s*\{[\\"]*n[\\"]*:[\\"]*(\d+)')


@dataclasses.dataclass
class Traffic:
    """One kind of collective: how often a device takes part, bytes of its arrays, and bytes over
    links in and between slices."""

    count: int = 0
    bytes: float = 0.0
    link_bytes: float = 0.0
    network_bytes: float = 0.0


def _bytes(text: str) -> list[int]:
    """Of every array in a type such as "(f32[8,16]{1,0}, bf16[4])"."""
    sizes = []
    for match in _SHAPE.finditer(text):
        bits = 8 if match["type"] == "pred" else int(re.search(r"\d+", match["type"])[0])
        sizes.append(
            int(np.prod([int(d) for d in match["dims"].split(",") if d], dtype=np.int64))
            * max(bits, 8)
            // 8
        )
    return sizes


def replica_groups(text: str) -> np.ndarray | None:
    """(groups, members) of an operation's attributes; None when it names none, which means
    everyone."""
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", text)
    if listed:
        return np.array([[int(i) for i in group.split(",")] for group in listed[1].split("},{")])
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if counted:
        shape, dims, order = (
            [int(i) for i in part.split(",")] if part else None for part in counted.groups()
        )
        return np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{(.*?)\}",
        text,
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        dims, order = (
            [int(i) for i in part.split(",")] if part else None for part in (named[2], named[3])
        )
        ids = np.arange(np.prod(list(sizes.values())))
        if dims:
            ids = ids.reshape(dims).transpose(order)
        ids = ids.reshape(list(sizes.values()))
        over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
        return np.moveaxis(ids, over, range(-len(over), 0)).reshape(
            -1, np.prod([ids.shape[a] for a in over], dtype=int)
        )
    return None


def _wire(kind: str, sizes: list[float], members: int) -> float:
    """Bytes that a device sends in a ring of so many. sizes: of the results."""
    share, total = (members - 1) / members, sum(sizes)
    return {
        "all-reduce": 2 * share,
        "reduce-scatter": members * share,
        "collective-permute": 1.0,
    }.get(kind, share) * total


def collectives(program: str, devices: int, slices: int = 1) -> dict[str, Traffic]:
    """Of a compiled program's text (`compiled.as_text()`), for one device; a loop's body counts as
    often as it is known to run."""
    bodies: dict[str, list[str]] = defaultdict(list)
    entry = name = ""
    for line in program.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header["name"]
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)
    found: dict[str, Traffic] = defaultdict(Traffic)

    def trips(rest: str) -> int:
        """How often a while runs: as noted, or the limit that its condition compares a counter from
        0 with; 1 when unknown."""
        noted, condition = _TRIPS.search(rest), _CONDITION.search(rest)
        limits = (
            [int(n) for line in bodies.get(condition[1], ()) for n in _LIMIT.findall(line)]
            if condition
            else []
        )
        return int(noted[1]) if noted else limits[0] if len(limits) == 1 else 1

    def walk(computation: str, times: int) -> None:
        for line in bodies.get(computation, ()):
            match = _OPERATION.match(line)
            if match is None:
                continue
            op, rest = match["op"], match["rest"]
            kind = op.removesuffix("-start")
            # A TPU's network between slices: each device sends its share.
            if op == "send" and "xla_megascale" in rest:
                transfer, size = _TRANSFER.search(rest), _bytes(match["type"])[0]
                kind = transfer[1].lower().replace("_", "-") if transfer else "send"
                found[kind].count += times
                found[kind].bytes += times * size
                found[kind].network_bytes += times * _wire(kind, [size], slices)
            elif kind in KINDS:
                sizes = _bytes(match["type"])
                if op.endswith("-start") and kind != "all-reduce" and len(sizes) > 1:
                    # Its type is (operands, results).
                    sizes = sizes[len(sizes) // 2 :] if kind != "collective-permute" else sizes[:1]
                groups = replica_groups(rest)
                members = devices if groups is None else groups.shape[1]
                # How a TPU's compiler writes a reduce-scatter.
                if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                    kind, sizes = "reduce-scatter", [size / members for size in sizes]
                per_slice = max(1, devices // slices)
                crosses = slices > 1 and (
                    groups is None
                    or bool(np.any(groups // per_slice != groups[:, :1] // per_slice))
                )
                traffic, wire = found[kind], _wire(kind, sizes, members)
                traffic.count += times
                traffic.bytes += times * sum(sizes)
                traffic.link_bytes += 0.0 if crosses else times * wire
                traffic.network_bytes += times * wire if crosses else 0.0
            elif not op.endswith("-done"):
                repeated = times * trips(rest) if op == "while" else times
                for called in _CALLED.finditer(rest):
                    for inner in (called["many"] or called["one"]).split(", "):
                        walk(inner.removeprefix("%"), repeated)

    walk(entry, 1)
    return dict(found)


def fingerprint(program: str) -> str:
    """A short hash of a program without what only says where it came from."""
    header, *lines = program.splitlines()
    # Before the first computation: tables of files and functions.
    first = next((i for i, line in enumerate(lines) if _HEADER.match(line)), 0)
    plain = re.sub(
        r", metadata=\{.*?\}|, stack_frame_id=\d+", "", "\n".join([header, *lines[first:]])
    )
    return digests.of_text(plain)[:12]
