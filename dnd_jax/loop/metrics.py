"""What a run writes about itself: metrics.jsonl always, TensorBoard and Weights & Biases when asked
for, and profiler traces."""

import json
import os
import pathlib
import time
from collections.abc import Callable, Collection, Mapping

from dnd_jax.core import digests, packages
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import json_of, read_text, replacing


class Metrics:
    """metrics.jsonl of a run: one object a line; a resumed run first drops the lines that it will
    write again.

    Each has "time" (seconds since 1970), "wall_seconds" since the run's first start, and "goodput",
    the share of these that went into the steps whose lines are there: not what was compiled, saved,
    scored, waited or done again.

    trackers: "tensorboard" and "wandb" get the numbers too, under the directory. Raises InputError
    when one is not installed.
    """

    def __init__(
        self, directory: pathlib.Path, step: int, trackers: Collection[str] = (), title: str = ""
    ):
        self._trackers = [_TRACKERS[name](directory, step, title) for name in trackers]
        path = directory / paths.METRICS
        try:
            rows = _rows(path) if path.exists() else []
        except InputError:
            if step:
                raise
            rows = []  # all of it is written anew
        kept = [(line, row) for line, row in rows if row["step"] <= step]
        self._start, good = _so_far((kept or rows)[-1][1] if kept or rows else {})
        self._good = good if kept else 0.0  # seconds
        with replacing(path) as temporary:
            temporary.write_text("".join(line + "\n" for line, _ in kept))
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping, good: float = 0) -> None:
        """good: seconds of the step without what it waited for or compiled."""
        now = time.time()
        self._good += good
        wall = max(now - self._start, 1e-6)
        row = {**row, "time": round(now, 3), "wall_seconds": round(wall, 3)}
        row["goodput"] = round(self._good / wall, 6)
        self._file.write(json.dumps(row) + "\n")
        for log, _ in self._trackers:
            log(row["step"], {k: value for k, value in row.items() if k not in ("step", "time")})

    def close(self) -> None:
        self._file.close()
        for _, close in self._trackers:
            close()


def _so_far(row: Mapping) -> tuple[float, float]:
    """(time of the first start, good seconds since) by a run's line; of one without, that starts
    now."""
    if not {"time", "wall_seconds", "goodput"} <= row.keys():
        return time.time(), 0.0
    return row["time"] - row["wall_seconds"], row["goodput"] * row["wall_seconds"]


def _tensorboard(
    directory: pathlib.Path, step: int, title: str
) -> tuple[Callable[[int, Mapping], None], Callable[[], None]]:
    writer = packages.load("tensorboardX").SummaryWriter(
        str(directory / "tensorboard"), purge_step=step + 1
    )

    def log(step: int, row: Mapping) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(
    directory: pathlib.Path, step: int, title: str
) -> tuple[Callable[[int, Mapping], None], Callable[[], None]]:
    folder = directory.absolute()
    name = digests.of_text(str(folder))[:16]  # the same run when it goes on
    run = packages.load("wandb").init(
        project="dnd_jax",
        name=f"{folder.parent.name} {title}",
        dir=str(folder),
        id=name,
        resume="allow",
    )
    return lambda step, row: run.log(dict(row), step=step), run.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = pathlib.Path(directory, paths.METRICS)
    return [row for _, row in _rows(path)] if path.exists() else []


def _rows(path: pathlib.Path) -> list[tuple[str, dict]]:
    """(line, row) of a run's metrics, but for a last line that was not written to its end. Raises
    InputError for a line that is no row."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.endswith("}"):
            row = json_of(line, f"{path}:{number}")
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise InputError(f"{path}:{number}: no row of metrics; remove the line")
            found.append((line, row))
    return found
