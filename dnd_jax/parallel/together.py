"""How the processes of one run start together: the flags that say who they are, and the run's
folder, which process 0 holds for all."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

from dnd_jax.config.remembered import remembering
from dnd_jax.core import workdir as paths
from dnd_jax.core.environment import PROGRAMS, programs_folder
from dnd_jax.core.errors import InputError
from dnd_jax.core.stage import Given
from dnd_jax.core.workdir import held
from dnd_jax.parallel import hosts, rendezvous
from dnd_jax.parallel.programs import keep_in


@contextlib.contextmanager
def together(
    given: Given, stage: str, same: Sequence[str] = (), folders: Sequence[tuple[str, str]] = ()
) -> Iterator[None]:
    """The processes of a stage, or this one alone, for as long as the block lasts. Process 0 holds
    the run's folder and remembers the settings there.

    same: what else must be the same everywhere. folders: (folder, flag that gives it) of others
    that all must see, beside the workdir. Raises InputError for flags that do not fit together, and
    as `rendezvous.joined` and `hosts.check_shared` do.
    """
    config, workdir = given.config, given.workdir
    run = [stage, json.dumps(config.to_json(), sort_keys=True), *given["allow"], *same]
    joined = rendezvous.joined(*_address(given), given["multihost"], given["start-timeout"], run)
    with joined, contextlib.ExitStack() as stack:
        if hosts.lead():
            stack.enter_context(held(workdir, stage))
            stack.enter_context(remembering(workdir, config))
        hosts.check_shared(workdir)
        if hosts.several() and os.environ.get(PROGRAMS) == str(programs_folder()):
            keep_in(workdir / paths.PROGRAMS)
        for folder, flag in folders:
            hosts.check_shared(pathlib.Path(folder), flag)
        yield


def _address(given: Given) -> tuple[str, int, int]:
    """(coordinator, processes, process). Raises InputError for what does not fit together."""
    flags = ("coordinator", "processes", "process")
    address = coordinator, processes, process = tuple(given[flag] for flag in flags)
    if given["multihost"] and address != ("", 1, 0):
        raise InputError(f"--multihost finds out --{', --'.join(flags)}; leave them out")
    if not (coordinator or given["multihost"]) and (processes > 1 or process):
        raise InputError("--processes and --process need --coordinator=HOST:PORT of process 0")
    if process >= processes and coordinator:
        raise InputError(
            f"--process={process} is not one of 0 to {processes - 1} (--processes={processes})"
        )
    return address
