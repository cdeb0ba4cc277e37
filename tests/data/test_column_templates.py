"""Columns and templates: what has no text of its own is a fault of its row, never a word."""

import datetime
import decimal
import json

import datasets
import pandas as pd
import pytest

from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Source, read_source
from dnd_jax.data.templates import column_reader, missing

ROW = {
    "text": "iron",
    "two": 2,
    "half": 0.5,
    "exact": decimal.Decimal("1.50"),
    "empty": "",
    "null": None,
    "nan": float("nan"),
    "yes": True,
    "no": False,
    "three": 3.0,
    "endless": float("inf"),
    "list": ["a", None],
    "words": ["a", "b"],
    "object": {"text": "wood", "none": None},
    "date": datetime.date(2020, 1, 2),
    "bytes": b"raw",
}


def said(expression, row=ROW):
    return column_reader({"prompt": expression}, "x")("x:1", row)["prompt"]


@pytest.mark.parametrize("name", [*ROW][5:])
@pytest.mark.parametrize(
    "how",
    [
        "{{ NAME }}",
        "a {{ NAME ~ '' }}",
        "{{ 'a' ~ NAME }}",
        "{{ NAME|string }}",
        "{{ [NAME]|join }}",
        "{{ '%s'|format(NAME) }}",
        "{{ NAME|upper }}",
        "{{ NAME|trim }}",
        "{{ NAME|replace('x', 'y') }}",
        "{% set x = NAME %}{{ x }}",
        "{{ NAME|default('') }}",
        "{% for x in [NAME] %}{{ x }}{% endfor %}",
        "{{ 'a' if text else '' }}{{ NAME }}",
    ],
)
def test_what_has_no_text_is_a_fault(name, how):
    if name == "date" and "|" in how and "default" not in how:
        return  # a filter says how
    with pytest.raises(InputError, match=r"^x:1: columns.prompt cannot be filled in \("):
        said(how.replace("NAME", name))


@pytest.mark.parametrize(
    "expression",
    [
        "{{ absent }}",
        "{{ absent ~ 'a' }}",
        "{{ object.absent }}",
        "{{ object.none }}",
        "{{ list[1] }}",
        "{{ list|join(', ') }}",
        "{{ list|tojson ~ null }}",
        "{{ [null, two]|string }}",
        "{{ [bytes]|pprint }}",
        "{{ null|int }}",
        "{{ nan|int }}",
        "{{ null|float }}",
        "{{ null + 'a' }}",
        "{{ null.text }}",
        "{{ null|length }}",
        "{% for x in null %}{{ x }}{% endfor %}",
        "{{ two == 2 }}",
        "{{ 'a' ~ (two == 2) }}",
        "{{ 'a' ~ words[:1] }}",
        "{{ object.values }}",
        "{{ three + 1 }}",
        "{% if absent %}a{% endif %}",
    ],
)
def test_nor_do_the_parts_of_a_value(expression):
    with pytest.raises(InputError, match=r"^x:1: columns.prompt cannot be filled in \("):
        said(expression)


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("{{ text }}{{ empty }}", "iron"),
        ("{{ two }} {{ half }} {{ exact }} {{ text ~ two }}", "2 0.5 1.50 iron2"),
        ("{{ null or '' }}{{ nan or '' }}.", "."),
        ("{{ null|default('x', true) }}{{ absent|default('y') }}", "xy"),
        ("{% if null %}a{% elif nan is none %}b{% endif %}", "b"),
        ("{% if null is not none or null != none %}a{% endif %}c", "c"),
        ("{{ 'y' if yes else 'n' }}{{ 'y' if no else 'n' }}{{ ['n', 'y'][yes] }}", "yny"),
        (
            "{% if yes is true and no is false and yes is boolean and yes == true %}a{% endif %}",
            "a",
        ),
        ("{% if three is true or two is boolean %}a{% endif %}b", "b"),
        ("{{ three|int }} {{ '%.1f'|format(three) }} {{ (three * 1.5) }}", "3 3.0 4.5"),
        ("{{ words|join(' ') }} {{ words[0] }} {{ words|length }} {{ words|last }}", "a b a 2 b"),
        ("{{ object.text }} {{ object['text'] }}", "wood wood"),
        ("{% for k, v in object.items() %}{{ k }}{% endfor %}", "textnone"),
        ("{% for a, b in zip(words, words) %}{{ a }}{{ b }}{% endfor %}", "aabb"),
        ("{{ [yes, null, three, object, list]|tojson }}", None),
        ("{{ date.year }}", "2020"),
        ("{{ bytes.decode()|upper }}", "RAW"),
        ("{{ list|select|join(', ') }}", "a"),
    ],
)
def test_what_a_template_says_on_purpose(expression, expected):
    values = [True, None, 3.0, {"text": "wood", "none": None}, ["a", None]]
    assert said(expression) == (expected or json.dumps(values, sort_keys=True))


@pytest.mark.parametrize("value", [None, float("nan"), pd.NA, pd.NaT])
def test_nothing_of_every_library(value):
    assert missing(value)
    assert said("column", {"column": value}) is None
    with pytest.raises(InputError, match="a value is missing"):
        said("{{ column }}", {"column": value})


@pytest.mark.parametrize(
    "name, expected",
    [("text", "iron"), ("two", "2"), ("half", "0.5"), ("yes", "True"), ("exact", "1.50")],
)
def test_a_column_by_its_name(name, expected):
    assert said(name) == expected


def columns(*names):
    return dict(zip(("prompt", "response"), names, strict=True))


def test_the_columns_of_pandas(tmp_path):
    """Whole numbers beside a null become floats in pandas: 3.0 is none of the answers."""
    table = pd.DataFrame({"q": ["a", "b"], "n": [3, None], "d": pd.to_datetime(["2020", "2021"])})
    table.to_parquet(tmp_path / "x.parquet")
    pd.DataFrame({"q": ["a", "b"], "n": pd.array([3, None], "Int64")}).to_parquet(
        tmp_path / "y.parquet"
    )
    for file, column, expected in (
        ("x", "n", "x.parquet: row 1: .*3.0 may stand for a whole number.*row 2: response must"),
        ("x", "{{ d }}", "x.parquet: row 1: .*a (Timestamp|datetime) is no text"),
        ("y", "n", "y.parquet: row 2: response must be given as text .there is nothing in it"),
        ("y", "{{ n }}", "y.parquet: row 2: columns.response .*a value is missing"),
    ):
        with pytest.raises(InputError, match=expected):
            read_source(Source(str(tmp_path / f"{file}.parquet"), columns=columns("q", column)))
    asked = columns("q", "{{ n|int if n is not none else 'none' }}")
    for file in "xy":
        found = read_source(Source(str(tmp_path / f"{file}.parquet"), columns=asked)).examples
        assert [e.response for e in found] == ["3", "none"]


def test_the_label_that_is_none(tmp_path):
    """`datasets` gives -1 for an unlabelled row, as in the test splits of many of the hub's."""
    features = datasets.Features(
        {"q": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    made = datasets.Dataset.from_list(
        [{"q": "a", "label": 1}, {"q": "b", "label": -1}], features=features
    )
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "x.parquet")
    assert made[1]["label"] == -1
    for name in ("saved", "x.parquet", next((tmp_path / "saved").glob("*.arrow"))):
        for column in ("label", "{{ label }}", "{{ ['no', 'yes'][label] }}"):
            with pytest.raises(InputError, match=r"row 2: ") as error:
                read_source(Source(str(tmp_path / name), columns=columns("q", column)))
            assert "row 1" not in str(error.value)


@pytest.mark.parametrize("response", [0, False, [], {}, 1.5, ["a"]])
def test_what_is_false_is_not_an_absent_answer(response, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": response}) + "\n")
    with pytest.raises(InputError, match="x.jsonl:1: response must be given as text"):
        read_source(Source(str(path)), answers=False)
    path.write_text(json.dumps({"prompt": "a", "response": "b", "system": response}) + "\n")
    with pytest.raises(InputError, match="x.jsonl:1: system must be given as text"):
        read_source(Source(str(path)))
