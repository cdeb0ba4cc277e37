"""A command line -> what a stage is called with: its flags, and settings from a file, a run's
memory and --config.KEY=VALUE."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dnd_jax.config.load import DEFAULTS, load_file, said, shipped
from dnd_jax.config.remembered import remembered_seeds
from dnd_jax.config.validate import freeze
from dnd_jax.core import stage as stages
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError, nearest
from dnd_jax.core.stage import Flag, Given, Stage

_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_KEY = "config."  # of --config.KEY=VALUE
_DEFINE = {
    str: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
    int: functools.partial(flags.DEFINE_integer, lower_bound=0),
    float: functools.partial(flags.DEFINE_float, lower_bound=0.0),
    list: flags.DEFINE_list,
}


def usage(name: str, stage: Stage, summary: str) -> str:
    """The text of `dnd STAGE --help`."""
    rows = [(flag.name, _meaning(flag)) for flag in stage.flags]
    if stage.settings != stages.NONE:
        else_ = [
            *([f"what WORKDIR/{paths.CONFIG} remembers"] if _has_workdir(stage) else []),
            *([stage.fallback] if stage.fallback else []),
            *(["configs/default.py"] if stage.settings == stages.DEFAULT else []),
        ]
        default = f" (default: {', else '.join(else_)})" if else_ else ""
        key = "any setting, such as --config.train.steps=500; dnd_jax/config/schema.py"
        rows += [
            ("config", f"a settings file, or the name of a shipped one{default}"),
            ("config.KEY", key),
        ]
    width = max((len(flag) for flag, _ in rows), default=0)
    argument = f" {stage.argument}" if stage.argument else ""
    lines = [f"usage: dnd {name}{argument} [--flag=value ...]", "", summary, ""]
    return "\n".join([*lines, *(f"  --{flag:<{width}}  {meaning}" for flag, meaning in rows)])


def _meaning(flag: Flag) -> str:
    """A flag's meaning, with its default where there is one and the meaning does not say it."""
    told = not flag.default or "(default" in flag.meaning
    return flag.meaning if told else f"{flag.meaning} (default: {flag.default})"


def parse(name: str, stage: Stage, words: Sequence[str]) -> Given:
    """What `dnd NAME WORDS` calls the stage with. Raises InputError, with the nearest name for an
    unknown flag or setting."""
    asked, arguments = _split(name, stage, words)
    argument = _argument(name, stage, arguments)
    values = _values(stage, asked)
    file = asked.get("config", "")
    if stage.settings == stages.NONE:
        if file or any(flag.startswith(_KEY) for flag in asked):
            raise InputError(f"--config: `dnd {name}` reads no settings")
        return Given(values, None, "", pathlib.Path("."), argument, tuple(words))
    file = _settings_file(stage, os.path.expanduser(file), values.get("workdir", ""))
    base = load_file(file)
    if values.get("suite"):
        base.suite = values["suite"]
    _override(base, asked, file)
    workdir = pathlib.Path(values.get("workdir") or _workdir_of(pathlib.Path(file)))
    if "workdir" in values:
        values["workdir"] = str(workdir)
    given = Given(values, freeze(base), file, workdir, argument, tuple(words))
    if "seeds" not in values:
        return given
    values["seeds"] = values["seeds"] or list(
        map(str, remembered_seeds(workdir, given.config.seed))
    )
    return dataclasses.replace(
        given, config=dataclasses.replace(given.config, seed=given.seeds()[0])
    )


def _split(name: str, stage: Stage, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({flag or config.KEY: its text}, the words that belong to none). A switch alone is "true",
    --noSWITCH "false"; any other flag without = takes the next word.

    Raises InputError for an unknown flag, one without a value, and one that is there twice: which
    one counts would be a guess.
    """
    switches, known = _switches(stage), {flag.name for flag in stage.flags} | {"config"}
    asked: dict[str, str] = {}
    rest, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        match = _FLAG.fullmatch(word)
        if not match:
            rest.append(word)
            continue
        flag, value = match.groups()
        if flag.startswith("no") and flag not in known and flag[2:] in switches and value is None:
            flag, value = flag[2:], "false"
        if flag not in known and not flag.startswith(_KEY):
            raise InputError(
                f"--{flag}: no flag of `dnd {name}`{nearest(flag, known)}; `dnd {name} --help` "
                "lists its flags"
            )
        if value is None and flag in switches:
            value = "true"
        elif value is None:
            following = _FLAG.fullmatch(queue[0]) if queue else None
            if not queue or following and (following[1] in known or following[1][:7] == _KEY):
                raise InputError(f"--{flag} needs a value: --{flag}=VALUE")
            value = queue.pop(0)
        if flag in asked:
            raise InputError(f"--{flag} is given twice; give it once")
        asked[flag] = value
    _check_read(name, stage, asked)
    return asked, rest


def _check_read(name: str, stage: Stage, asked: Mapping[str, str]) -> None:
    """Raises InputError for a setting that is given by a flag too, or that the stage passes
    over."""
    for key in (key.removeprefix(_KEY) for key in asked if key.startswith(_KEY) and stage.reads):
        if not any(key == read or key.startswith(f"{read}.") for read in stage.reads):
            reads = " and ".join(_KEY + read for read in stage.reads)
            raise InputError(
                f"--{_KEY}{key}: `dnd {name}` reads {reads} alone; `dnd {name} --help` lists "
                "its flags"
            )
    for flag in stage.flags:
        if flag.name in asked and f"{_KEY}{flag.setting}" in asked:
            raise InputError(f"--{flag.name} and --{_KEY}{flag.setting} say the same; give one")


def _switches(stage: Stage) -> set[str]:
    """The flags and config.KEYs that are true or false."""
    ours = {flag.name for flag in stage.flags if flag.kind is bool}
    leaves = load_file(DEFAULTS).to_dict()
    sections = {key: of for key, of in leaves.items() if isinstance(of, Mapping)}
    return ours | {
        f"{_KEY}{section}.{key}"
        for section, of in sections.items()
        for key, value in of.items()
        if isinstance(value, bool)
    }


def _argument(name: str, stage: Stage, arguments: list[str]) -> str:
    """What stands behind the stage's name, of a stage that takes one."""
    most = 1 if stage.argument else 0
    if len(arguments) > most:
        raise InputError(f"unexpected argument {arguments[most]!r}; options are --name=value")
    if len(arguments) < most:
        raise InputError(f"{stage.argument} is needed: dnd {name} {stage.argument}")
    return os.path.expanduser(arguments[0]) if arguments else ""


def _values(stage: Stage, asked: Mapping[str, str]) -> dict[str, Any]:
    """{flag: its value, or its default}; a text that begins with ~ is a path."""
    values = flags.FlagValues()
    for flag in stage.flags:
        _DEFINE[flag.kind](flag.name, flag.default, "", flag_values=values)
    given = [f"--{flag.name}={asked[flag.name]}" for flag in stage.flags if flag.name in asked]
    try:
        values(["dnd", *given])
    except (flags.Error, ValueError) as error:
        raise InputError(said(error)) from None
    found = {flag.name: values[flag.name].value for flag in stage.flags}
    return {
        name: os.path.expanduser(value) if isinstance(value, str) else value
        for name, value in found.items()
    }


def _has_workdir(stage: Stage) -> bool:
    return any(flag.name == stages.WORKDIR.name for flag in stage.flags)


def _workdir_of(file: pathlib.Path) -> pathlib.Path:
    """The workdir where none is given: of a run's memory that run's, else one by the file's
    name."""
    return file.parent if file.name == paths.CONFIG else pathlib.Path("runs", file.stem)


def _fallback(stage: Stage) -> str:
    """The settings of a stage without --config and without remembered ones; empty: that is
    refused."""
    return DEFAULTS if stage.settings == stages.DEFAULT else stage.fallback


def _settings_file(stage: Stage, file: str, workdir: str) -> str:
    """The file that the settings are read from. Raises InputError where none is named."""
    memory = pathlib.Path(workdir, paths.CONFIG)
    if file:
        return file
    if workdir and memory.is_file():
        return str(memory)
    if stage.fallback:
        print(f"settings: {stage.fallback} (no --config was given)", flush=True)
    if _fallback(stage):
        return _fallback(stage)
    where = f", and there is no {memory}" if workdir else ""
    raise InputError(
        f"--config is needed{where}: a settings file, or one of {', '.join(shipped())} (mini: the "
        "embedded suite)"
    )


def _override(base: ml_collections.ConfigDict, asked: Mapping[str, str], file: str) -> None:
    """Puts the values of --config.KEY=VALUE into the settings. Raises InputError for a key that
    there is none of, or a value of another type."""
    keys = [flag for flag in asked if flag.startswith(_KEY)]
    for key in keys:
        _known(base, key)
    words = ["dnd", *(f"--{key}={asked[key]}" for key in keys)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=words)
        values(words)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{said(error)} (configuration {file})") from None


def _known(base: ml_collections.ConfigDict, key: str) -> None:
    """Raises InputError, with the nearest name, unless the settings have config.KEY."""
    section: Any = base
    for name in key.split(".")[1:]:
        if not isinstance(section, ml_collections.ConfigDict) or name not in section:
            known = section if isinstance(section, ml_collections.ConfigDict) else ()
            raise InputError(f"--{key}: there is no setting {name!r} here{nearest(name, known)}")
        section = section[name]
