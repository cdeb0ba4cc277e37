"""The embedded suite is the same bytes for the same seed, for ever: its numbers stand in the
README."""

import hashlib

import pytest

from dnd_jax.data.world import write_world

FOLDERS = {
    0: "28c1e14fb9122436fa4d7216e9bc1a583ccb181ba9fd19360dfabc1d27b42370",
    100: "be509e41b5b63765ffed000e953e9976c332dd428aeaa5646393c9186edf68c6",
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
