"""Stage `doctor`: everything that can be checked before hours are spent, in one table.

    dnd doctor --base=FOLDER --suite=PATH --checkpoints=FOLDER --generator=FOLDER
    dnd doctor --workdir=runs/mini

What is not given is taken from the settings, then from the workdir; what is nowhere is not looked
at. docs/FILES.md says what each file may be.
"""

import dataclasses
import os
import pathlib
import textwrap
from collections.abc import Callable, Sequence

from dnd_jax.base.hf_config import CONFIG
from dnd_jax.base.hub import resolve
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.stage import Given
from dnd_jax.generator.folder import DESCRIPTION
from dnd_jax.studies import doctor_checks as checks
from dnd_jax.studies.doctor_checks import FAULT, Case, Found

WIDTH = 110  # of the table


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the table: what was looked at, how it is (ok, note or FAULT), what was found."""

    check: str
    state: str
    text: str


# What the table's lines are called, which setting names what they look at, and who looks.
CHECKS: tuple[tuple[str, Callable[[Case], str], Callable[[Case], Found]], ...] = (
    ("base", lambda case: case.config.base.path, checks.base),
    ("suite", lambda case: case.config.suite, checks.suite),
    ("chat", lambda case: case.config.base.path, checks.chat),
    (
        "reading",
        lambda case: case.config.evaluate.agreement and case.config.base.path,
        checks.reading,
    ),
    ("questions", lambda case: case.config.base.path and case.config.suite, checks.questions),
    ("checkpoints", lambda case: case.config.train.checkpoints, checks.checkpoints),
    ("encoder", lambda case: case.config.suite or case.config.train.checkpoints, checks.encoder),
    ("generator", lambda case: case.generator, checks.generator),
    (
        "room",
        lambda case: (
            case.config.train.checkpoints
            or (not case.config.train.from_loras and case.config.base.path)
        ),
        checks.room,
    ),
    ("packages", lambda case: "always", checks.packages),
)


def examine(case: Case) -> list[Finding]:
    """What every check finds. A file that cannot be used is a finding in the words of the stage
    that would refuse it. Raises InputError where nothing is given to look at."""
    if not any(of(case) for name, of, _ in CHECKS if name != "packages"):
        raise InputError(
            "nothing to look at; give --base, --suite, --checkpoints, --generator or a run's "
            "--workdir"
        )
    found: list[Finding] = []
    for name, of, check in CHECKS:
        try:
            for state, text in check(case) if of(case) else ():
                found.append(Finding(name, state, text))
        except InputError as error:
            found.append(Finding(name, FAULT, str(error)))
    told: dict[str, Finding] = {}  # several checks read the same files
    for finding in found:
        told.setdefault(finding.text, finding)
    return list(told.values())


def table(found: Sequence[Finding]) -> str:
    """The findings as a person reads them, long ones over several lines."""
    widths = [max(len(getattr(f, field)) for f in found) for field in ("check", "state")]
    lines = []
    for finding in found:
        start = f"{finding.check:<{widths[0]}}  {finding.state:<{widths[1]}}  "
        lines += textwrap.wrap(
            finding.text,
            WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def case_of(given: Given) -> Case:
    """What a command line asks for: the flags, else the settings, else what lies in the workdir.

    Raises InputError for a flag that names no file or folder, and no model of the hub.
    """
    config, workdir = given.config, given.workdir
    base = given["base"] or config.base.path or _lies(workdir / paths.BASE / "config.json")
    checkpoints = given["checkpoints"] or config.train.checkpoints or _lies(workdir / paths.LORAS)
    suite = config.suite or _lies(workdir / paths.SUITE / "suite.json")
    generator = given["generator"] or _lies(workdir / paths.GENERATOR / DESCRIPTION)
    for flag in ("suite", "checkpoints", "generator"):
        if given[flag] and not os.path.exists(given[flag]):
            raise InputError(f"--{flag}={given[flag]}: no such file or folder")
    if given["base"]:
        resolve(given["base"], (CONFIG,))
    config = dataclasses.replace(
        config,
        suite=suite,
        base=dataclasses.replace(config.base, path=base),
        train=dataclasses.replace(config.train, checkpoints=checkpoints),
    )
    return Case(config, workdir, generator)


def _lies(path: pathlib.Path) -> str:
    """A folder of the run, by the file or folder in it that shows that it is there; else empty."""
    if not path.exists():
        return ""
    return str(path if path.is_dir() else path.parent)


def run(given: Given) -> None:
    """Runs the stage."""
    found = examine(case_of(given))
    print(table(found), flush=True)
    faults = sum(f.state == FAULT for f in found)
    if faults:
        raise CheckFailed(f"{faults} fault{'s' if faults > 1 else ''} found")
    print("\nnothing found that would stop a run")
