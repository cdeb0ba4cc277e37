"""`dnd ablate`: a configuration beside variants of it, all of them ordinary runs, in one table and
plot.

    dnd ablate --config=configs/ablate_pairing.py --workdir=runs/pairing [--seeds=0,1,2]

WORKDIR/default/seed_N is the run of the configuration itself, WORKDIR/VARIANT/seed_N that of a
variant: folders as those of `dnd quickstart`. What a variant's keys leave as it is (suite, base,
LoRA checkpoints with their scores, controls, cached embeddings and tokens and, where only
evaluation differs, the generator) is not made again: links lead to the default's. A finished run is
kept.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dnd_jax.base.hub import keep_revision, kept_revision, pinned
from dnd_jax.base.identity import base_digest
from dnd_jax.config.records import SAME_NUMBERS, check_same_run, is_named
from dnd_jax.config.remembered import remembering
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core import digests
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError, listed
from dnd_jax.core.formats import read_numbered, write_numbered
from dnd_jax.core.names import name_fault, twin_faults
from dnd_jax.core.stage import Given
from dnd_jax.core.stopping import stop
from dnd_jax.core.workdir import held
from dnd_jax.data.opened import open_suite
from dnd_jax.encoders.cache import identify
from dnd_jax.generator.folder import MODEL, find_generator
from dnd_jax.lora.controls import DONE as CONTROLS_DONE
from dnd_jax.scoring.evaluate import FORMAT as EVALUATION_FORMAT
from dnd_jax.scoring.evaluate import NOT_OF_A_SCORE, evaluation_settings
from dnd_jax.studies import ablate_report
from dnd_jax.studies.commands import needs as of_run
from dnd_jax.studies.quickstart import apart, run_seed

DEFAULT = "default"
FORMAT = 1  # of run.json and ablation.json
DONE = "run.json"  # of a finished run: its settings and what came out
BASE = "{base}"  # in a text value: the folder of the run's base
# What is in a run's folder, and the sections and keys of the configuration that it depends on.
SUITE_BY = {"suite", "embedded", "embedded_tasks"}
LORAS_BY = SUITE_BY | {"base", "pretrain", "lora"}
MADE_BY = {
    "suite": SUITE_BY,
    "base": SUITE_BY | {"base", "pretrain"},
    "loras": LORAS_BY,
    "controls": LORAS_BY
    | {"train.datasets", "controls.multi_task", "controls.learning_rates", "controls.few_shot"},
    # Targets and embeddings are caches, whose names say what they depend on.
    "targets": LORAS_BY,
    "embeddings": set(),
    "generator": LORAS_BY | {"condition", "generator", "train"},
}
SECTIONS = MADE_BY["generator"] | {"controls", "evaluate"}
# Of a run's record; earlier versions had none of these.
OLDER = dict.fromkeys(
    ("contents", "contents.controls", "embedded", "embedded_tasks"), lambda then: then is None
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """changes: {dotted key: value} beside the default's; none: the default itself, whatever its
    name."""

    name: str
    changes: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return self.name if self.changes else DEFAULT

    def touches(self, made_by: Collection[str]) -> bool:
        """Whether it changes one of these sections or keys."""
        return any(is_named(key, made_by) for key in self.changes)


def variants(config: Config) -> list[Variant]:
    """The variants of config.ablate, the default first unless one of them equals it.

    Raises InputError that lists every fault: of a name, a key, a value or the form of
    config.ablate.
    """
    named = []
    try:
        keys, values = (
            [key for key, _ in config.ablate.axes],
            [tuple(of_key) for _, of_key in config.ablate.axes],
        )
        if keys:
            combinations = itertools.product(*values)
            named = [
                (_name(changes), changes)
                for changes in (dict(zip(keys, c, strict=True)) for c in combinations)
            ]
        named += [(str(name), dict(changes)) for name, changes in config.ablate.variants]
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"config.ablate.axes = {config.ablate.axes!r}, config.ablate.variants = "
            f"{config.ablate.variants!r}: expected "
            "((key, (value, ...)), ...) and ((name, {key: value, ...}), ...) with keys such as "
            "'train.pairing'"
        ) from None
    if not named:
        raise InputError(
            "config.ablate lists nothing to compare; take one of configs/ablate_*.py or give "
            "\"--config.ablate.axes=(('train.pairing', ('random', 'fixed')),)\" (sharding "
            "layouts: dnd plan --sweep)"
        )
    faults, found = [], []
    for name, changes in named:
        if fault := name_fault(name, (DEFAULT, *paths.NAMES)):
            faults.append(fault)
        elif re.fullmatch(r"seed_\d+", name):
            faults.append(f"{name!r} cannot name a variant: it is the folder of a seed")
        elif name in (v.name for v in found):
            faults.append(f"{name} is there twice")
        try:
            new = with_changes(config, changes)
            changed = {
                key: value for key, value in changes.items() if _at(new, key) != _at(config, key)
            }
            found.append(Variant(name, changed))
        except InputError as error:
            faults.append(f"{name}: {error}")
    faults += twin_faults(v.name for v in found)
    if faults:
        raise listed("config.ablate", faults)
    return found if any(not v.changes for v in found) else [Variant(DEFAULT, {}), *found]


def _name(changes: Mapping[str, Any]) -> str:
    return ",".join(
        f"{key.split('.')[-1]}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', str(value))}"
        for key, value in changes.items()
    )


def _at(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values of some dotted keys. Raises InputError as `freeze`, and
    for keys that no score depends on."""
    raw = config.to_json()
    for key, value in changes.items():
        *sections, last = str(key).split(".")
        if key == "seed":
            raise InputError("seed is no ablation; give --seeds=0,1,2")
        if key in SUITE_BY - {"suite"} and (config.suite or "suite" in changes):
            raise InputError(f"{key} chooses among embedded suites, and suite gives another")
        if key not in SUITE_BY and (not sections or sections[0] in raw.keys() - SECTIONS):
            raise InputError(
                f"{key} changes no score; sharding layouts are compared by dnd plan --sweep"
            )
        section = raw
        for name in sections:
            section = section.setdefault(name, {}) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise InputError(f"config.{key} is unknown")
        section[last] = value
    return freeze(raw)


def run_variant(
    config: Config,
    variant: Variant,
    workdir: pathlib.Path,
    seed: int,
    suite: str,
    strict: bool = False,
    allowed: Collection[str] = (),
) -> dict:
    """The run of a variant with one seed, as `quickstart.run_seed` returns it; a finished one is
    read. suite: its fingerprint.

    The default of the seed must have been run. Raises InputError, which names the variant, as the
    stages do and for a run that was made with other settings.
    """
    own = with_changes(dataclasses.replace(config, seed=seed), variant.changes)
    folder, default = (workdir / name / f"seed_{seed}" for name in (variant.folder, DEFAULT))
    for name in (own.base.path, own.condition.encoder):
        keep_revision(name, kept_revision(name, default), folder)
    settings = {
        name: value for name, value in own.to_json().items() if name in SECTIONS | {"seed"}
    } | {"fingerprint": suite, "contents": contents(own, folder)}
    try:
        if (folder / DONE).is_file():
            stored = read_numbered(folder / DONE, FORMAT)
            how = allowed, OLDER, (*SAME_NUMBERS, "suite", "train.init_from", "controls.folder")
            if check_same_run(folder / DONE, stored["settings"], settings, *how):
                return stored["run"]
        if variant.changes:
            shared = link(folder, default, variant)
            base = own.base.path or str((default if "base" in shared else folder) / "base")
            changes = {
                key: v.replace(BASE, base) if isinstance(v, str) else v
                for key, v in variant.changes.items()
            }
            # The adapters name the base by its path, so that must be the one they were made with.
            changes |= {"base.path": base} if "base" in shared else {}
            own = with_changes(dataclasses.replace(config, seed=seed), changes)
            if not variant.touches(LORAS_BY):
                share_scores(own, folder, default, suite)
        own = apart(own, f"{variant.folder}/seed_{seed}")
        with remembering(folder, own):
            # what else could be measured is the same
            result, _ = run_seed(own, folder, strict, allowed)
    except InputError as error:
        raise type(error)(f"variant {variant.name}: {error}") from None
    write_numbered(folder / DONE, FORMAT, {"settings": settings, "run": result})
    return result


def contents(config: Config, folder: pathlib.Path) -> dict:
    """Digests of what the settings lead to by paths, of those that are given; a hub id means the
    commit that the run of this folder took."""
    base, start, loras = config.base.path, config.train.init_from, config.train.checkpoints
    encoder, controls = config.condition.encoder, config.controls.folder
    return {
        "base": base_digest(pinned(base, folder)) if base and BASE not in base else "",
        "encoder": ""
        if BASE in encoder
        else identify(dataclasses.replace(config.condition, encoder=pinned(encoder, folder))),
        "init_from": digests.of_file(find_generator(start) / MODEL) if start else "",
        "checkpoints": os.path.realpath(loras) if loras else "",
        "controls": digests.of_file(pathlib.Path(controls) / CONTROLS_DONE) if controls else "",
    }


def link(folder: pathlib.Path, default: pathlib.Path, variant: Variant) -> list[str]:
    """Links what the variant shares with the default's run into its folder; returns the names of it
    all."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = [
        name
        for name, made_by in MADE_BY.items()
        if not variant.touches(made_by) and (default / name).is_dir()
    ]
    for name in shared:
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(
                os.path.relpath(default / name, folder), target_is_directory=True
            )
    return shared


def share_scores(config: Config, folder: pathlib.Path, default: pathlib.Path, suite: str) -> None:
    """Begins a variant's scoring with the default's scores, of the base and of adapters by their
    content, if asked alike."""
    path, settings = folder / paths.EVALUATION, evaluation_settings(config, suite)
    stored = read_numbered(default / paths.EVALUATION, EVALUATION_FORMAT)
    where = default / paths.EVALUATION
    try:
        check_same_run(where, stored["settings"], settings, free=NOT_OF_A_SCORE)
    except InputError:  # it was asked otherwise
        return
    if not path.is_file():
        scores = {"settings": settings, "scores": stored["scores"]}
        scores |= {"engines": stored["engines"]} if "engines" in stored else {}
        write_numbered(path, stored["format"], scores)


def ablate(
    config: Config,
    workdir: pathlib.Path,
    seeds: Sequence[int],
    strict: bool = False,
    allowed: Collection[str] = (),
) -> dict:
    """Runs what is not finished, the default first, and returns ablation.json's content; prints the
    table.

    The report is written anew after each variant, so that a stopped ablation leaves one of what it
    has.
    """
    every = variants(config)
    default = next(v for v in every if not v.changes)
    fingerprints = {}
    for seed in seeds:
        folder = workdir / DEFAULT / f"seed_{seed}"
        fingerprints[seed] = open_suite(
            dataclasses.replace(config, seed=seed), folder, strict
        ).fingerprint
    runs: dict[str, dict[int, dict]] = {}
    for i, variant in enumerate([default, *(v for v in every if v is not default)]):
        for seed in seeds:
            stop.check()
            what = (
                ", ".join(f"{key} = {value}" for key, value in variant.changes.items())
                or "the configuration as it is"
            )
            print(f"{i + 1} of {len(every)}: {variant.name} ({what}), seed {seed}", flush=True)
            folder, shared = (workdir / v.folder / f"seed_{seed}" for v in (variant, default))
            with held(shared, "ablate"), held(folder, "ablate"):  # links lead from one to the other
                runs.setdefault(variant.name, {})[seed] = run_variant(
                    config, variant, workdir, seed, fingerprints[seed], strict, allowed
                )
        rows = [
            ablate_report.row(
                v.name, with_changes(config, v.changes), _differs(config, v), v.folder, runs[v.name]
            )
            for v in every
            if v.name in runs
        ]
        report = ablate_report.write(rows, seeds, workdir)
    print(
        f"\n{ablate_report.as_markdown(report)}\n\nablation: "
        f"{workdir.absolute()}/ablation.{{json,md,png}}",
        flush=True,
    )
    return report


def _differs(config: Config, variant: Variant) -> dict[str, list]:
    """{key: [the default's value, the variant's]}."""
    return {key: [_at(config, key), value] for key, value in variant.changes.items()}


def run(given: Given) -> None:
    """Runs the stage."""
    ablate(given.config, given.workdir, given.seeds(), given["strict"], given["allow"])


def needs(given: Given) -> tuple[str, ...]:
    """The modules beyond a plain install that the variants need."""
    own = [with_changes(given.config, v.changes) for v in variants(given.config)]
    return tuple(name for config in own for name in of_run(config))
