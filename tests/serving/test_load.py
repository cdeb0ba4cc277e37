"""Mixed requests for a while: none lost, memory flat."""

import pytest
import serve_load
from pipeline import tiny_generator


@pytest.mark.slow
def test_nothing_is_lost_and_memory_does_not_grow(tmp_path):
    run = tiny_generator(tmp_path / "run")
    load, memory = serve_load.run(run, 40, 8, "--cache-gb=0.001")
    assert not load.lost
    assert all(len(load.seconds[kind]) > 5 for kind in serve_load.MIX)
    assert max(memory) < 1.1 * memory[0] + 2e7
