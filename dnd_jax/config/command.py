"""A command line -> what a stage is called with: its flags, and settings from a file, a run's
memory and --config.KEY=VALUE."""

import functools
import pathlib
import re
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from dnd_jax.config.load import load_file, said, shipped
from dnd_jax.config.remembered import remembered
from dnd_jax.config.validate import freeze
from dnd_jax.core import stage as stages
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError, nearest
from dnd_jax.core.stage import Given, Stage

DEFAULT_FILE = "configs/default.py"
_DEFINE = {
    str: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
    int: functools.partial(flags.DEFINE_integer, lower_bound=0),
    float: functools.partial(flags.DEFINE_float, lower_bound=0.0),
    list: flags.DEFINE_list,
}


def usage(name: str, stage: Stage, summary: str) -> str:
    """The text of `dnd STAGE --help`."""
    lines = [
        f"usage: dnd {name}{f' {stage.argument}' if stage.argument else ''} [--flag=value ...]",
        "",
        summary,
        "",
    ]
    rows = [(flag.name, flag.meaning) for flag in stage.flags]
    if stage.settings != stages.NONE:
        where = {
            stages.RUN: "a settings file, or the name of a shipped one (default: what "
            f"WORKDIR/{paths.CONFIG} remembers)",
            stages.FILE: "a settings file, or the name of a shipped one",
            stages.DEFAULT: "a settings file, or the name of a shipped one (default: "
            f"{DEFAULT_FILE})",
        }[stage.settings]
        if stage.fallback:
            where = f"{where[:-1]}, else {stage.fallback})"
        rows += [
            ("config", where),
            (
                "config.KEY",
                "any setting, such as --config.train.steps=500; dnd_jax/config/schema.py",
            ),
        ]
    width = max((len(flag) for flag, _ in rows), default=0)
    return "\n".join(
        [*lines, *(f"  --{flag:<{width}}  {meaning}" for flag, meaning in rows)]
    ).rstrip()


def parse(name: str, stage: Stage, words: Sequence[str]) -> Given:
    """What `dnd NAME WORDS` calls the stage with. Raises InputError, with the nearest name for an
    unknown flag or setting."""
    _once(words)
    values, rest = _flags(name, stage, words)
    given = {flag.name: values[flag.name].value for flag in stage.flags}
    file, base, source = _settings(name, stage, values, given)
    if base is not None and given.get("suite"):
        base.suite = given["suite"]
    rest = _overrides(base, rest, source)
    argument = rest.pop(0) if rest and stage.argument else ""
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; options are --name=value")
    if stage.argument and not argument:
        raise InputError(f"{stage.argument} is needed: dnd {name} {stage.argument}")
    config = None if base is None else freeze(base)
    if "workdir" in given and not given["workdir"]:
        given["workdir"] = f"runs/{pathlib.Path(file).stem}"
    workdir = pathlib.Path(given.get("workdir") or ".")
    return Given(given, config, file, workdir, argument, tuple(words))


def _once(words: Sequence[str]) -> None:
    """Raises InputError when a flag is there twice: which one counts would be a guess."""
    names = [match[1] for word in words if (match := re.match(r"--?([A-Za-z][\w.-]*)", word))]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--{twice} is given twice; give it once")


def _flags(name: str, stage: Stage, words: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """(the stage's flags and --config, the words that are none of them)."""
    values = flags.FlagValues()
    for flag in stage.flags:
        _DEFINE[flag.kind](flag.name, flag.default, "", flag_values=values)
    flags.DEFINE_string("config", "", "", flag_values=values)
    try:
        rest = values(["dnd", *words], known_only=True)[1:]
    except (flags.Error, ValueError) as error:
        raise InputError(said(error)) from None
    unknown = next((w for w in rest if w.startswith("-") and not re.match(r"--?config\.", w)), None)
    if unknown:
        flag = re.match(r"-*([^=]*)", unknown)[1]
        near = nearest(flag, [flag.name for flag in stage.flags] + ["config"])
        raise InputError(
            f"--{flag}: no flag of `dnd {name}`{near}; `dnd {name} --help` lists its flags"
        )
    return values, rest


def _settings(
    name: str, stage: Stage, values, given
) -> tuple[str, ml_collections.ConfigDict | None, str]:
    """(the settings' file, the settings before --config.KEY, where they were read). Raises
    InputError where none are named."""
    file = values["config"].value
    if stage.settings == stages.NONE:
        if file:
            raise InputError(f"--config: `dnd {name}` reads no settings")
        return "", None, ""
    memory = pathlib.Path(given.get("workdir") or "", paths.CONFIG)
    if not file and stage.settings == stages.RUN and given.get("workdir") and memory.is_file():
        return str(memory), remembered(memory), str(memory)
    if not file and stage.settings == stages.DEFAULT:
        file = DEFAULT_FILE
    if not file and stage.fallback:
        file = stage.fallback
        print(f"settings: {file} (no --config was given)", flush=True)
    if not file:
        where = f", and {memory} remembers none" if given.get("workdir") else ""
        raise InputError(
            f"--config is needed{where}: a settings file, or one of {', '.join(shipped())}"
        )
    return file, load_file(file), file


def _overrides(base: ml_collections.ConfigDict | None, rest: list[str], source: str) -> list[str]:
    """Applies --config.KEY=VALUE to the settings; returns the other words."""
    if base is None:
        return rest
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=["dnd", *rest])
        return values(["dnd", *rest])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{said(error)} (configuration {source})") from None
