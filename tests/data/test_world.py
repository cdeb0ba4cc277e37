"""The embedded suites are the same bytes for the same seed, for ever: their numbers stand in the
README."""

import hashlib

import pytest

from dnd_jax.data.skills import write_skills
from dnd_jax.data.world import write_world

FOLDERS = {
    (write_world, 0): "9a09170b2d3f2ca2c843ae515320bffa4b8e23a26a459812ccea786b107040fb",
    (write_world, 100): "ae9cea14505f95a05db8a4e5a2e570026d8f7fa7b0f116da783427dfcc17cbee",
    (write_skills, 0): "969a9c70c1c5d0e4ba182c4b1ce0b68cde1c5648a94f93bff30702c8e1b4be48",
    (write_skills, 1): "e9d9cbff4ae439c995c4bfc8f2e5ff5f4eba0ff13b829e4b5918c40f594c575b",
}


@pytest.mark.parametrize("write, seed", FOLDERS)
def test_every_byte_of_the_embedded_suites_stays(tmp_path, write, seed):
    write(tmp_path / "suite", seed)
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "suite").rglob("*")):
        if path.is_file():
            name = str(path.relative_to(tmp_path / "suite")).encode()
            digest.update(name + b"\0" + path.read_bytes())
    assert digest.hexdigest() == FOLDERS[write, seed]
