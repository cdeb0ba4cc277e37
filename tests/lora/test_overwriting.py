"""Only what was made here is replaced or removed."""

import json
import pathlib

import numpy as np
import pytest

from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.lora import collect
from dnd_jax.lora.adapter import check_called, is_ours, save_adapter
from dnd_jax.lora.found import CONFIG, WEIGHTS
from dnd_jax.lora.peft_settings import AdapterConfig

LAYER = "model.layers.0.self_attn.q_proj"
TENSORS = {f"{LAYER}.lora_A.weight": np.ones((2, 8)), f"{LAYER}.lora_B.weight": np.ones((8, 2))}


def ours(folder: pathlib.Path, card: str = "") -> pathlib.Path:
    return save_adapter(folder, TENSORS, AdapterConfig("org/base", 2, 4.0, ("q_proj",)), card)


def theirs(folder: pathlib.Path) -> pathlib.Path:
    """As PEFT writes it, with more settings."""
    raw = json.loads((ours(folder) / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | {"peft_version": "0.21.2"}))
    return folder


def with_a_note(folder: pathlib.Path) -> pathlib.Path:
    (ours(folder) / "notes.txt").write_text("mine")
    return folder


def of_other_files(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("make", [theirs, with_a_note, of_other_files])
def test_what_is_anothers_is_not_replaced(tmp_path, make):
    folder = make(tmp_path / "a")
    before = contents(folder)
    assert not is_ours(folder)
    with pytest.raises(InputError, match="holds what dnd_jax did not make; move it"):
        ours(folder)
    assert contents(folder) == before


def test_what_is_ours_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    for card in ("", "One (sha256 00).", "Another (sha256 11)."):
        assert is_ours(ours(tmp_path / "a", card))


def test_files_of_systems_are_nobodys(tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / ".DS_Store").touch()
    folder = ours(tmp_path / "birds")
    for name in (".DS_Store", f"._{CONFIG}", ".nfs0000001"):
        (folder / name).touch()
        assert is_ours(folder)
    assert set(contents(ours(folder))) == {WEIGHTS, CONFIG}
    (folder / ".notes").touch()
    assert not is_ours(folder)


def suite(root: pathlib.Path) -> Suite:
    return Suite("s", root, (), (Dataset("birds", (), ()),), (), {}, "")


def test_collect_refuses_others_loras_where_it_writes(tmp_path):
    ours(tmp_path / "birds" / "step_000004")
    collect._check_own(tmp_path, suite(tmp_path))
    (tmp_path / "birds" / "step_000004" / ".DS_Store").touch()
    collect._check_own(tmp_path, suite(tmp_path))
    theirs(tmp_path / "birds" / "checkpoint-3")
    with pytest.raises(InputError, match="did not make; use another --workdir.*checkpoint-3"):
        collect._check_own(tmp_path, suite(tmp_path))


def test_finished_adapters_keep_the_name_of_their_base(tmp_path):
    folders = [ours(tmp_path / "a"), ours(tmp_path / "b")]
    check_called(folders, "")
    check_called(folders, "org/base")
    with pytest.raises(InputError, match="a: is finished, and calls its base 'org/base'; give --b"):
        check_called(folders, "org/other")
