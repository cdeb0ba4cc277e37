"""Programs that are started here."""

import pytest

from dnd_jax.core.processes import finished, of_module


@pytest.mark.parametrize("name", ["random", "json", "dnd_jax"])
def test_a_users_file_is_not_run_in_the_place_of_a_module(tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text("open('ran', 'w')\nraise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code, out, err = finished(of_module("dnd_jax", "--version"))
    assert (code, err) == (0, "") and out.startswith("dnd-jax ")
    assert not (tmp_path / "ran").exists()
