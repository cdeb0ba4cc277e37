"""A description of another form is refused by name."""

import json

import pytest

from dnd_jax.core.errors import InputError
from dnd_jax.core.formats import read_numbered, write_numbered


def test_a_number_is_written_and_read(tmp_path):
    write_numbered(tmp_path / "a.json", 2, {"x": 1})
    assert read_numbered(tmp_path / "a.json", 2) == {"format": 2, "x": 1}
    (tmp_path / "old.json").write_text('{"x": 1}')
    assert read_numbered(tmp_path / "old.json", 2) == {"format": 0, "x": 1}


@pytest.mark.parametrize("number", [3, -1, "1", True, None, 1.5, [1]])
def test_another_number_is_refused_in_one_line(tmp_path, number):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"format": number}))
    with pytest.raises(InputError) as error:
        read_numbered(path, 2)
    assert str(error.value).startswith(
        f"{path}: format {number!r}, this version of dnd reads 0 to 2;"
    )
    assert "\n" not in str(error.value)


def test_what_is_no_object(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(InputError, match=r"a\.json: not a JSON object"):
        read_numbered(tmp_path / "a.json", 1)
