"""What a suite's file says: where each dataset lies, before any of them is read."""

import dataclasses
import os
import pathlib
import typing
from collections.abc import Mapping

from dnd_jax.core.errors import InputError, listed, nearest
from dnd_jax.core.files import json_of, read_text
from dnd_jax.core.names import name_fault, twin_faults
from dnd_jax.data.instructions import check_templates
from dnd_jax.data.rows import kind_of
from dnd_jax.data.sources import FIELDS, Source

SPLITS = ("train", "test")
POOLS = ("train", "unseen")
ROLES = (*POOLS, "test")
JSON_TYPES = {"columns": dict, "templates": list}  # of a source's keys that are no text or number
OWN = {"name", "role", "holdout"}  # keys of a listed dataset beside those of its source


@dataclasses.dataclass(frozen=True)
class Entry:
    """A dataset's files. holdout: examples that `pool` gives away where there is no `test`."""

    name: str
    role: str  # one of POOLS
    pool: Source
    test: Source | None
    holdout: int = 0


SUITE = "suite.json"  # in a suite's folder


def find_suite(root: pathlib.Path) -> pathlib.Path:
    """The file that describes a suite: itself, or the one in its folder. Raises InputError that
    says what is there instead."""
    if root.is_file():
        if root.suffix.lower() != ".json":
            raise InputError(
                f"{root}: no suite, which is a folder with {SUITE}, or a JSON file that lists the "
                "files of its datasets"
            )
        return root
    path = root if root.suffix.lower() == ".json" and not root.is_dir() else root / SUITE
    if not path.is_file():
        raise InputError(f"{path}: no such file{_instead(root)}")
    return path


def _instead(root: pathlib.Path) -> str:
    """What there is in place of a suite's file."""
    if not root.is_dir():
        return nearest(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
    near = [*sorted(root.iterdir()), *root.absolute().parents[:2]]
    if found := [folder for folder in near if (folder / SUITE).is_file()]:
        return f"; it is in {found[0]}: give --suite={found[0]}"
    if files := sorted(path.name for path in root.iterdir() if path.suffix.lower() == ".json"):
        return f"; there is {', '.join(files[:5])}: give the one that describes the suite"
    if (root / "datasets").is_dir():
        return "; it names those of datasets/ to train on, and the unseen ones"
    return ""


def read_description(path: pathlib.Path) -> dict:
    """The JSON object of a suite's file. Raises InputError for an unknown key."""
    raw = json_of(read_text(path), path, once=True)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object")
    own = {"datasets"} if "datasets" in raw else {"train", "unseen"}
    unknown = sorted(raw.keys() - {"name", "corpus", "kinds", "wrong"} - own)
    if unknown:
        raise InputError(
            f"{path}: unknown key(s) {', '.join(unknown)}; expected name, corpus, train, "
            "unseen, kinds and wrong, or name, corpus, datasets, kinds and wrong"
        )
    return raw


def read_entries(path: pathlib.Path, raw: Mapping) -> list[Entry]:
    """The datasets of a suite's description. Raises InputError that lists what is wrong in it, and
    where it has none to train on."""
    entries = (_listed if "datasets" in raw else _in_places)(path, raw)
    if not any(entry.role == "train" for entry in entries):
        raise InputError(
            f"{path}: train names no dataset, so there is nothing to learn from; add one"
        )
    return entries


def _in_places(path: pathlib.Path, raw: Mapping) -> list[Entry]:
    """The datasets of "train" and "unseen", under datasets/NAME."""
    for key in POOLS:
        names = raw.get(key)
        if not isinstance(names, list):
            raise InputError(
                f"{path}: {key} must be a list of dataset names (folders under datasets/)"
            )
        faults = [fault for name in names if (fault := name_fault(name))]
        if faults:
            raise listed(f"{path}: {key}", faults)
    names = raw["train"] + raw["unseen"]
    if faults := twin_faults(names):
        raise listed(f"{path}", faults)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(
            f"{path}: dataset(s) named twice: {', '.join(twice)}; an unseen one must not be "
            "trained on"
        )
    folder = path.parent / "datasets"
    return [
        Entry(name, role, *(Source(os.fspath(folder / name / f"{s}.jsonl")) for s in SPLITS))
        for role in POOLS
        for name in raw[role]
    ]


def _listed(path: pathlib.Path, raw: Mapping) -> list[Entry]:
    """The datasets of the list "datasets". Raises InputError that lists every fault of it."""
    if not isinstance(raw["datasets"], list) or not all(
        isinstance(entry, dict) for entry in raw["datasets"]
    ):
        raise InputError(f"{path}: datasets must be a list of objects")
    pools: dict[str, Entry] = {}
    tests: dict[str, Source] = {}
    faults = []
    for i, entry in enumerate(raw["datasets"]):
        try:
            what, source = _listed_source(path, f"datasets[{i}]", entry)
        except InputError as error:
            faults.append(str(error).removeprefix(f"{path}: "))
            continue
        name, role = entry["name"], entry["role"]
        if name in (tests if role == "test" else pools):
            faults.append(f"{what} is there twice; an unseen dataset must not be trained on")
        elif role == "test":
            tests[name] = source
        else:
            pools[name] = Entry(name, role, source, None, entry.get("holdout", 0))
    faults += [
        f"{name} needs either an entry of role test or a holdout"
        for name, entry in pools.items()
        if bool(entry.holdout) == (name in tests)
    ]
    faults += [
        f"{name} has a test, but no entry of role train or unseen"
        for name in tests.keys() - pools.keys()
    ]
    faults += twin_faults(pools)
    if faults:
        raise listed(f"{path}", faults)
    return [dataclasses.replace(entry, test=tests.get(name)) for name, entry in pools.items()]


def _listed_source(path: pathlib.Path, what: str, entry: Mapping) -> tuple[str, Source]:
    """(what messages call an entry of the list, its source). Raises InputError for its first
    fault."""
    name, role, holdout = entry.get("name"), entry.get("role"), entry.get("holdout", 0)
    if fault := name_fault(name):
        raise InputError(f"{what}.name = {fault}")
    what += f" ({name})"
    if role not in ROLES:
        raise InputError(f"{what}.role = {role!r} is none of {', '.join(ROLES)}")
    if type(holdout) is not int or holdout < 0 or (holdout and role == "test"):
        raise InputError(
            f"{what}.holdout = {holdout!r} must be a number of examples, of a train or unseen "
            "dataset"
        )
    own = {key: value for key, value in entry.items() if key not in OWN}
    return what, read_described(path, what, own)


def read_described(path: pathlib.Path, what: str, raw: object) -> Source:
    """The source that a suite file describes: a path or id, or an object. Raises InputError naming
    the file and the key."""
    raw = {"source": raw} if isinstance(raw, str) else raw
    types = typing.get_type_hints(Source)
    if not isinstance(raw, dict) or not isinstance(raw.get("source"), str) or not raw["source"]:
        raise InputError(
            f"{path}: {what} needs a source: a file, a folder or the id of a dataset on the hub"
        )
    for key, value in raw.items():
        if key not in types:
            raise InputError(f"{path}: {what}.{key} is unknown{nearest(key, [*types, *OWN])}")
        if type(value) is not JSON_TYPES.get(key, types[key]):
            raise InputError(f"{path}: {what}.{key} = {value!r} is of the wrong type")
    if raw.get("limit", 0) < 0:
        raise InputError(f"{path}: {what}.limit = {raw['limit']} must be 0 (all) or more")
    if "\0" in raw["source"]:
        raise InputError(f"{path}: {what}.source = {raw['source']!r} holds a NUL character")
    if "templates" in raw:
        check_templates(raw["templates"], f"{path}: {what}.templates")
    columns = raw.get("columns", {})
    if not all(key in FIELDS and isinstance(value, str) for key, value in columns.items()) or (
        columns and "prompt" not in columns and "templates" not in raw
    ):
        raise InputError(
            f"{path}: {what}.columns must map prompt, response and system to names of columns or "
            "templates"
        )
    if "prompt" in columns and "templates" in raw:
        raise InputError(
            f"{path}: {what} has templates and columns.prompt, and both say what a prompt is; "
            "leave one out"
        )
    source = os.path.expanduser(raw["source"])
    if source.startswith("~"):
        raise InputError(
            f"{path}: {what}.source = {source!r} begins with a home folder that does not exist"
        )
    local = path.parent / source
    is_local = kind_of(source)[0] or source.startswith(("/", "./", "../")) or local.exists()
    return Source(**{**raw, "source": os.fspath(local) if is_local else source})
