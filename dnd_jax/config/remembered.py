"""What a run remembers of its settings: WORKDIR/config.json, with which a later stage goes on."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from dnd_jax.config.load import FORMAT, load_file
from dnd_jax.config.records import differences
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json, write_json


@contextlib.contextmanager
def remembering(workdir: pathlib.Path, config: Config, seeds: Sequence[int] = ()) -> Iterator[None]:
    """Remembers a run's settings and seeds from here on, and lists on the terminal what differs
    from those that were. If the block refuses its input, what was remembered stays. seeds: none
    for those that are remembered."""
    path = workdir / paths.CONFIG
    then = read_json(path) if path.is_file() else None
    seeds = list(seeds) or remembered_seeds(workdir, config.seed)
    changed = _changes(path, config, seeds) if then is not None else []
    if changed:
        print(f"settings that {path} remembers otherwise (then -> now):", *changed, sep="\n  ")
    if then is None or changed:
        write_settings(path, config, seeds)
    try:
        yield
    except InputError:
        if changed:
            write_json(path, then)
        raise


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
