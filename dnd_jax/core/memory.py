"""How much memory is free: of the machine, and of the groups of processes (cgroups) that it puts
this one in, as containers and job schedulers do."""

import pathlib
from collections.abc import Iterator

CGROUP = pathlib.Path("sys/fs/cgroup")
# Where groups lie; files of one: its limit, what it uses; and in memory.stat, what of that is only
# a copy of files, which gives way.
V2 = (CGROUP, "memory.max", "memory.current", "inactive_file")
V1 = (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that a new process may take; None where nothing says so. root: of the file system."""
    found = [*_of_machine(root), *_of_groups(root)]
    return max(0, min(found)) if found else None


def _of_machine(root: pathlib.Path) -> Iterator[int]:
    words = _words(root / "proc/meminfo")
    if "MemAvailable:" in words:
        yield int(words["MemAvailable:"]) * 1024


def _of_groups(root: pathlib.Path) -> Iterator[int]:
    """What is left to each group of this process that has a limit, the groups around it too."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, used, files = V1 if controllers else V2
        inner = pathlib.PurePosixPath(name.lstrip("/"))
        # In a container the name may be the host's, and only the outermost is there.
        for folder in (root / mount / path for path in (inner, *inner.parents)):
            most, taken = _read(folder / limit).strip(), _read(folder / used).strip()
            if most.isdigit() and taken.isdigit():  # "max": no limit
                yield int(most) - int(taken) + int(_words(folder / "memory.stat").get(files, 0))


def _words(path: pathlib.Path) -> dict[str, str]:
    """{first word: second} of a file's lines."""
    return {
        words[0]: words[1] for line in _read(path).splitlines() if len(words := line.split()) > 1
    }


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
