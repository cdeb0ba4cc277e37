"""What a run remembers of its settings: WORKDIR/config.json, with which a later stage goes on."""

import contextlib
import pathlib
from collections.abc import Iterator

from dnd_jax.config.load import FORMAT, load_file
from dnd_jax.config.records import differences
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json, write_json


@contextlib.contextmanager
def remembering(workdir: pathlib.Path, config: Config) -> Iterator[None]:
    """Remembers a run's settings from here on, and lists on the terminal what differs from those
    that were. If the block refuses its input, what was remembered stays."""
    path = workdir / paths.CONFIG
    then = read_json(path) if path.is_file() else None
    changed = _changes(path, config) if then is not None else []
    if changed:
        print(f"settings that {path} remembers otherwise (then -> now):", *changed, sep="\n  ")
    if then is None or changed:
        write_json(path, {"format": FORMAT, "config": config.to_json()})
    try:
        yield
    except InputError:
        if changed:
            write_json(path, then)
        raise


def _changes(path: pathlib.Path, config: Config) -> list[str]:
    """What differs from the settings that a file remembers."""
    try:
        then = freeze(load_file(str(path)))
    except InputError as error:  # of another version: --config was given, so these are replaced
        return [str(error)]
    return list(differences(then.to_json(), config.to_json()).values())
