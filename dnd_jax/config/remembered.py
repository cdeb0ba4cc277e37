"""What a run remembers of its settings: WORKDIR/config.json, with which a later stage goes on."""

import contextlib
import dataclasses
import os
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dnd_jax.config.constraints import PATH
from dnd_jax.config.load import FORMAT, load_file
from dnd_jax.config.records import differences
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.files import read_json, write_json


@contextlib.contextmanager
def remembering(workdir: pathlib.Path, config: Config, seeds: Sequence[int] = ()) -> Iterator[None]:
    """Remembers a run's settings and seeds from here on, and lists on the terminal what differs
    from those that were. If the block refuses before anything was made with them, all
    is as it was; later they stay. seeds: none for those that are remembered."""
    path, config = workdir / paths.CONFIG, absolute(config)
    then, made = read_json(path) if path.is_file() else None, _made(workdir)
    seeds = list(seeds) or remembered_seeds(workdir, config.seed)
    changed = _changes(path, config, seeds) if then is not None else []
    if changed:
        print(f"settings that {path} remembers otherwise (then -> now):", *changed, sep="\n  ")
    if then is None or changed:
        write_settings(path, config, seeds)
    try:
        yield
    except (InputError, CheckFailed):
        if _made(workdir) == made:
            _restore(path, then, changed)
        raise


def _made(workdir: pathlib.Path) -> dict[pathlib.Path, tuple[int, int]]:
    """{file: its inode and time of change} of what stages make with their settings: a training's
    metrics, which are written anew when it begins, and scores."""
    files = [path for name in paths.MADE for path in workdir.glob(name)]
    return {path: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for path in files}


def _restore(path: pathlib.Path, then: Any, changed: bool) -> None:
    """Makes a run's memory what it was before; `then` is None where there was none."""
    if then is None:
        path.unlink(missing_ok=True)
    elif changed:
        write_json(path, then)


def absolute(section: Any) -> Any:
    """The settings, or a section of them, with absolute paths, for a stage that is started
    elsewhere. A name that is no file here may be a hub id and stays."""
    changes = {}
    for name, kind in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            changes[name] = absolute(value)
        elif PATH in getattr(kind, "__metadata__", ()) and _is_local(name, value):
            changes[name] = os.path.abspath(value)
    return dataclasses.replace(section, **changes)


def _is_local(name: str, value: str) -> bool:
    """Whether a setting is a path of this machine; the loop makes its folders itself."""
    to_be_made = name in ("checkpoint_dir", "local_dir") and bool(value) and "://" not in value
    return to_be_made or os.path.exists(value)


def write_settings(path: pathlib.Path, config: Config, seeds: Sequence[int] = ()) -> None:
    """Writes settings, and the seeds of a run (default: theirs), to a JSON file, which --config
    takes."""
    seeds = list(seeds) or [config.seed]
    write_json(path, {"format": FORMAT, "config": config.to_json(), "seeds": seeds})


def remembered_seeds(workdir: pathlib.Path, seed: int) -> list[int]:
    """The seeds that a run remembers; `seed` alone where it remembers none that begin with it."""
    path = workdir / paths.CONFIG
    raw = read_json(path) if path.is_file() else None
    seeds = raw.get("seeds") if isinstance(raw, Mapping) else None
    return seeds if isinstance(seeds, list) and seeds[:1] == [seed] else [seed]


def _changes(path: pathlib.Path, config: Config, seeds: list[int]) -> list[str]:
    """What differs from the settings and seeds that a file remembers."""
    try:
        then = freeze(load_file(str(path)))
    except InputError as error:  # of another version: --config was given, so these are replaced
        return [str(error)]
    seeds_then = remembered_seeds(path.parent, then.seed)
    return list(
        differences(
            then.to_json() | {"seeds": seeds_then}, config.to_json() | {"seeds": seeds}
        ).values()
    )
