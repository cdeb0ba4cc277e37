"""The base of a run, given or pretrained."""

import pathlib

from dnd_jax.base.hub import pinned
from dnd_jax.config.schema import Config
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError


def find_base(config: Config, workdir: pathlib.Path) -> str:
    """The given base (of a hub id the folder of the commit that this run took first), or the one
    that was pretrained in the workdir. Raises InputError when it was not."""
    folder = workdir / paths.BASE
    if not config.base.path and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no base here; run `dnd pretrain` first or set --config.base.path"
        )
    return pinned(config.base.path, workdir) or str(folder)
