"""The embedded suite is the same bytes for the same seed, for ever: its numbers stand in the
README."""

import hashlib

import pytest

from dnd_jax.data.world import write_world

FOLDERS = {
    0: "9a09170b2d3f2ca2c843ae515320bffa4b8e23a26a459812ccea786b107040fb",
    100: "ae9cea14505f95a05db8a4e5a2e570026d8f7fa7b0f116da783427dfcc17cbee",
}


@pytest.mark.parametrize("seed", FOLDERS)
def test_every_byte_of_the_embedded_suite_stays(tmp_path, seed):
    write_world(tmp_path / "world", seed)
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "world").rglob("*")):
        if path.is_file():
            name = str(path.relative_to(tmp_path / "world")).encode()
            digest.update(name + b"\0" + path.read_bytes())
    assert digest.hexdigest() == FOLDERS[seed]
