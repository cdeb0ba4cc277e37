"""Names that become folders: one rule, in both forms of a suite and in an ablation."""

import json

import pytest

from dnd_jax.core import workdir
from dnd_jax.core.errors import InputError
from dnd_jax.core.names import LONGEST, name_fault, twin_faults
from dnd_jax.data.suite import load_suite

BAD = [
    "",
    ".",
    "..",
    "...",
    "../x",
    "a/b",
    "/etc",
    "a\\b",
    "a:b",
    "a@b",
    ".hidden",
    "-rf",
    "--out",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "a\u200bb",
    "a\u202eb",
    "a\ud800b",
    " a",
    "a ",
    "x" * (LONGEST + 1),
    "é" * (LONGEST // 2 + 1),
    "collect.json",
    "statistics-0.safetensors",
    "a.JSON",
    None,
    7,
    ["a"],
]
GOOD = [
    "arc_easy",
    "ARC-e",
    "größe",
    "数学",
    "GSM8K",
    "a.b",
    "a b",
    "lr=0.001,clip=1",
    "x" * LONGEST,
]


def suites(names: list) -> list[dict]:
    """Both forms of a suite whose unseen datasets have these names."""
    entry = {"role": "unseen", "source": "x.jsonl", "holdout": 5}
    listed = [{"name": "t", "role": "train", "source": "x.jsonl", "holdout": 5}]
    return [
        {"train": ["t"], "unseen": names},
        {"datasets": [*listed, *({**entry, "name": name} for name in names)]},
    ]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_are_no_folders_are_refused_everywhere(name, tmp_path):
    fault = name_fault(name)
    assert "cannot name a folder: " in fault and fault.isprintable() and len(fault) < 200
    for suite in suites([name]):
        (tmp_path / "suite.json").write_text(json.dumps(suite))
        with pytest.raises(InputError) as error:
            load_suite(tmp_path)
        assert str(error.value).startswith(f"{tmp_path}/suite.json: ") and fault in str(error.value)


@pytest.mark.parametrize("name", GOOD)
def test_names_in_use_are_folders(name, tmp_path):
    assert not name_fault(name)
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "one, other", [("Birds", "birds"), ("é", "e\u0301"), ("STRASSE", "straße")]
)
def test_names_that_share_a_folder_on_some_systems_are_refused(one, other, tmp_path):
    assert len(twin_faults([one, other, "x"])) == 1 and not twin_faults([one, one, "x"])
    for suite in suites([one, other]):
        (tmp_path / "suite.json").write_text(json.dumps(suite))
        with pytest.raises(InputError, match="are one folder on some systems"):
            load_suite(tmp_path)


def test_names_of_a_run_are_taken():
    folders = {value for key, value in vars(workdir).items() if key.isupper() and key != "NAMES"}
    for name in folders:
        assert name_fault(name, workdir.NAMES), name
    assert "something else" in name_fault("Base", workdir.NAMES) and not name_fault("Base")
