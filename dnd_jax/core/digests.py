"""The one place that hashes: files, folders, texts and JSON."""

import functools
import hashlib
import pathlib


def digest_of(description: pathlib.Path, weights: pathlib.Path) -> str:
    """sha256 of a folder's JSON description and its safetensors file, as they are stored."""
    digest = hashlib.sha256(description.read_bytes())
    with open(weights, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@functools.cache
def program_digest() -> str:
    """sha256 of this program's own code."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
