"""Folders to the Hugging Face hub."""

import os
import pathlib
import re

from dnd_jax.errors import InputError, first_line


def check_repo_id(repo: str) -> None:
    """Raises InputError unless `repo` is USER/NAME: asked before anything is computed for it."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"--push-to-hub={repo}: expected USER/NAME")


def push(folder: str | os.PathLike, repo: str) -> str:
    """Uploads the files of a folder to the hub's model USER/NAME, made if there is none, and returns its address.

    Raises InputError in one line for whatever keeps the hub from taking it: no network, no login, no rights, a refused card.
    """
    check_repo_id(repo)
    from huggingface_hub import HfApi

    folder = pathlib.Path(folder)
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Made by dnd_jax")
    except Exception as error:  # the hub client raises its own, httpx's and OS errors alike
        reason = first_line(error)
        raise InputError(
            f"{repo}: the hub did not take it ({reason}); the files are in {folder}; log in with `hf auth login`, then "
            f"`hf upload {repo} {folder}`"
        ) from None
    return str(url)
