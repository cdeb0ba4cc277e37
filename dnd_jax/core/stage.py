"""What a command is. A room's commands.py has one `Stage` for each, and a line of main.py's table
makes it `dnd NAME`.

COMMANDS = {"name": Stage("room.module", (WORKDIR, Flag("limit", int, 0, "questions a task")))}

commands.py imports nothing that takes long, as JAX does: the module, whose `run(given)` does what
is asked, is imported once a command line has been found right.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dnd_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Flag:
    """--NAME of a stage. kind: str, bool, int, float (neither below 0) or list (of texts between
    commas). setting: the one that it says too, such as "base.path"; only one of both is given."""

    name: str
    kind: type
    default: Any
    meaning: str
    setting: str = ""


# Flags of several stages.
WORKDIR = Flag(
    "workdir",
    str,
    "",
    "folder of the run (default: runs/NAME of --config=NAME, DIR of --config=DIR/config.json); the "
    "same command goes on in it",
)
SUITE = Flag(
    "suite", str, "", "folder or JSON file of your own tasks (default: the embedded suite)", "suite"
)
STRICT = Flag("strict", bool, False, "refuse a suite with faults in its data instead of warning")
SEEDS = Flag(
    "seeds", list, [], "comma-separated seeds (default: the run's, else the config's)", "seed"
)
OUT = Flag("out", str, "", "what to write")
ALLOW = Flag(
    "allow",
    list,
    [],
    "settings that may differ from the run that is resumed, such as train.steps,train.clip",
)
BASE_NAME = Flag(
    "base-name",
    str,
    "",
    "what adapters call their base, such as a hub id (default: config.base.path, made absolute)",
)
ON_SUITE = (WORKDIR, SUITE, STRICT)
# Of a stage that several processes share: dnd_jax/parallel/together.py.
PROCESSES = (
    Flag(
        "multihost",
        bool,
        False,
        "one process of a cluster that JAX detects (Cloud TPU, GKE, SLURM)",
    ),
    Flag("coordinator", str, "", "elsewhere, HOST:PORT of process 0"),
    Flag("processes", int, 1, "with --coordinator, how many processes there are"),
    Flag("process", int, 0, "with --coordinator, which one this is"),
    Flag("start-timeout", int, 300, "seconds until all processes must have joined"),
)

# Where a stage's settings come from. RUN: --config, else what WORKDIR/config.json remembers.
# DEFAULT: those, else configs/default.py. NONE: it has no settings.
RUN, DEFAULT, NONE = "run", "default", "none"


@dataclasses.dataclass(frozen=True)
class Given:
    """What a stage was called with.

    argument: what stands behind its name, of a stage that takes one. config: the frozen settings,
    their seed the first of --seeds; config_file their file or WORKDIR/config.json. words: the
    command as it was typed, behind the stage's name.
    """

    flags: Mapping[str, Any]
    config: Any
    config_file: str
    workdir: pathlib.Path
    argument: str = ""
    words: Sequence[str] = ()

    def __getitem__(self, flag: str) -> Any:
        return self.flags[flag]

    def need(self, *flags: str) -> None:
        """Raises InputError naming the first of these flags that is empty."""
        for flag in flags:
            if not self.flags[flag]:
                raise InputError(f"--{flag} is needed")

    def seeds(self) -> list[int]:
        """--seeds, or the settings' own. Raises InputError for what are no different whole
        numbers."""
        words = [word.strip() for word in self["seeds"]]
        if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
            raise InputError(
                f"--seeds={','.join(words)}: expected different whole numbers, such as 0,1,2"
            )
        return list(map(int, words)) or [self.config.seed]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command: the module of dnd_jax that runs it, its flags, and the packages beyond a plain
    install that it needs.

    needs: names of modules, or a function of what it was called with that gives them; checked
    before it runs. argument: the name of what stands behind the stage's name ("X.pth"), empty for
    none. settings: RUN, DEFAULT or NONE. reads: the settings that it goes by, or their sections;
    any other is refused on its command line; empty: all. fallback: the settings that RUN means
    without --config and without remembered ones; empty: that is refused. writes: whether it writes
    into the workdir, which is this process's alone meanwhile and remembers the settings.
    """

    module: str
    flags: tuple[Flag, ...] = ()
    needs: tuple[str, ...] | Callable[[Given], tuple[str, ...]] = ()
    argument: str = ""
    settings: str = RUN
    reads: tuple[str, ...] = ()
    fallback: str = ""
    writes: bool = False

    def packages(self, given: Given) -> tuple[str, ...]:
        """The modules that this call needs."""
        return self.needs(given) if callable(self.needs) else self.needs

    def load(self) -> Callable[[Given], None]:
        """What it runs, its module imported."""
        return importlib.import_module(f"dnd_jax.{self.module}").run


def stage_of(room: str, name: str) -> Stage:
    """The stage of that name, of a room's commands."""
    return importlib.import_module(f"dnd_jax.{room}.commands").COMMANDS[name]
