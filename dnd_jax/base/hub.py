"""The Hugging Face hub: where a model's name leads, and folders that are pushed."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dnd_jax.base.gguf.file import as_folder, is_gguf
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.core.files import read_json, read_object, write_json
from dnd_jax.core.packages import PACKAGE
from dnd_jax.core.whereabouts import not_a_folder
from dnd_jax.core.workdir import REVISIONS

huggingface_hub = packages.deferred("huggingface_hub")


def is_repo_id(name: str) -> bool:
    """Whether a name is USER/NAME, as the hub has them."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def check_repo_id(repo: str, flag: str = "--push-to-hub") -> None:
    """Raises InputError unless `repo` is USER/NAME: asked before anything is computed for it."""
    if not is_repo_id(repo):
        raise InputError(f"{flag}={repo}: expected USER/NAME")


def push(folder: str | os.PathLike, repo: str, public: bool = False) -> str:
    """Uploads the files of a folder to the hub's model USER/NAME, made if there is none, and
    returns its address. It is private unless `public`.

    Raises InputError in one line for a file that names a local path, for a model that is public
    already without `public`, and for whatever keeps the hub from taking it: no network, no login,
    no rights, a refused card.
    """
    check_repo_id(repo)
    folder = pathlib.Path(folder)
    _check_names_no_path(folder)
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and api.model_info(repo).private is False:
            raise InputError(
                f"{repo}: it is there and public; give --public, or another name; the files are "
                f"in {folder}"
            )
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Made by dnd_jax")
    except InputError:  # its advice must not be to upload there
        raise
    except Exception as error:  # the hub client raises its own, httpx's and OS errors alike
        reason = first_line(error)
        raise InputError(
            f"{repo}: the hub did not take it ({reason}); the files are in {folder}; log in with "
            "`hf auth login`, then "
            f"`hf upload {repo} {folder}`" + ("" if public else " --private")
        ) from None
    return str(url)


def _check_names_no_path(folder: pathlib.Path) -> None:
    """Raises InputError when a setting in a JSON file of the folder is a path of this machine."""
    for path in sorted(folder.glob("*.json")):
        if path.stem not in VOCABULARIES:
            for key, text in _texts(read_json(path)):
                if os.path.isabs(text) and os.path.exists(text):
                    raise InputError(
                        f"{path}: {key} is {text!r}, a path of this machine, so it is not "
                        "uploaded; remove it"
                    )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a JSON value, at any depth; key: as a.b[0]."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{key}[{i}]")


FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # of a model on the hub
VOCABULARIES = ("tokenizer", "vocab", "added_tokens")  # JSON files whose keys are any text
NO_PATH = "(empty path): no such model folder"


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether a model is asked of the hub by this name: it is no folder, file or package here."""
    name = os.fspath(name)
    local = name.startswith((".", "/", PACKAGE)) or pathlib.Path(name).exists()
    local = local or is_gguf(name)
    return bool(name) and name.count("/") <= 1 and not local


def kept_revision(name: str | os.PathLike, workdir: pathlib.Path) -> str:
    """The commit of a hub id that a run took before, which it goes on with; empty for none."""
    path = workdir / REVISIONS
    known = read_object(path) if is_hub_id(name) and path.is_file() else {}
    return str(known.get(os.fspath(name), ""))


def keep_revision(name: str | os.PathLike, revision: str, workdir: pathlib.Path) -> None:
    """Records the commit of a hub id that a run takes, the first time."""
    if revision and is_hub_id(name) and not kept_revision(name, workdir):
        path = workdir / REVISIONS
        known = read_object(path) if path.is_file() else {}
        write_json(path, known | {os.fspath(name): revision})


def revision_of(folder: pathlib.Path) -> str:
    """The commit of a folder in the hub's cache; empty for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and hub_id(folder) else ""


def hub_id(folder: pathlib.Path) -> str:
    """USER/NAME of a folder in the hub's cache, models--USER--NAME/snapshots/COMMIT; empty for any
    other folder."""
    found = re.search(r"models--(.+?)--(.+)/snapshots/[0-9a-f]{40}/?$", str(folder.absolute()))
    return f"{found[1]}/{found[2]}" if found else ""


def cached(name: str, file: str) -> pathlib.Path | None:
    """The folder of a hub id in the hub's cache that has this file; None where there is none.
    Nothing is asked of the hub."""
    try:
        found = huggingface_hub.try_to_load_from_cache(name, file)
    except ValueError:  # what is no name there
        return None
    return pathlib.Path(found).parent if isinstance(found, str) else None


def in_package(name: str) -> pathlib.Path:
    """The path that "package:NAME/REST" means, inside an installed package that is not imported.
    Raises InputError where it is not installed."""
    package, _, rest = name.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    # ImportError: of a package inside one that is absent; ValueError: of no name at all.
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{name}: the package is not installed; {packages.how_to_install([package])}"
        )
    return pathlib.Path(next(iter(spec.submodule_search_locations)), rest)


def gguf_of(name: str | os.PathLike) -> pathlib.Path | None:
    """The GGUF file that a name means, there or not; None where it means none."""
    name = os.fspath(name)
    try:
        file = in_package(name) if name.startswith(PACKAGE) else pathlib.Path(name)
    except InputError:
        return None
    return file if is_gguf(file) else None


def resolve(
    path: str | os.PathLike, files: Sequence[str] = FILES, revision: str = ""
) -> pathlib.Path:
    """The local folder of a model: a folder, a GGUF file (written as one), "package:NAME/FOLDER" or
    "package:NAME/FILE.gguf" inside an installed package, or a hub id, of which `files` are
    downloaded. revision: of a hub id, the commit; empty: the newest.

    Raises InputError when it cannot be had.
    """
    name = os.fspath(path)
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    local = in_package(name) if name.startswith(PACKAGE) else pathlib.Path(name)
    if is_gguf(local):
        return as_folder(local)
    if name.startswith(PACKAGE):
        return local
    if name.startswith((".", "/")) or name.count("/") > 1 or not name or os.path.exists(name):
        raise InputError(f"{name}: {not_a_folder(pathlib.Path(name))}" if name else NO_PATH)
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(files)
        )
        return pathlib.Path(found)
    except Exception as error:  # the hub client raises its own, requests' and OS errors alike
        reason = first_line(error)
        raise InputError(
            f"{name}: neither a folder here nor reachable on the hub ({reason})"
        ) from None


def pinned(name: str, workdir: pathlib.Path) -> str:
    """A hub id's folder, of the commit that this run took first, which is recorded; any other name
    as it is. Raises InputError as `resolve`."""
    if not is_hub_id(name):
        return name
    found = resolve(name, revision=kept_revision(name, workdir))
    keep_revision(name, revision_of(found), workdir)
    return str(found)
