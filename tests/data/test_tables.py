"""Files of every kind: each read as `datasets` or pandas reads it, or refused by name."""

import bz2
import gzip
import json
import lzma
import pathlib

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from dnd_jax.core.errors import InputError
from dnd_jax.data.rows import FILES, file_rows
from dnd_jax.data.sources import Source, read_prompts, read_source
from dnd_jax.data.suite import load_suite

ROWS = [
    {"prompt": f'where, and "how" does {i} live ?\nA: iron\r\nB: größe', "response": f"{i}, Turin"}
    for i in range(5)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def written(folder: pathlib.Path, name: str) -> pathlib.Path:
    """ROWS in a file of this name, by the library that writes such files."""
    path, table = folder / name, pd.DataFrame(ROWS)
    kind, *packed = [suffix.lower() for suffix in path.suffixes]
    content = {
        ".jsonl": JSONL,
        ".ndjson": JSONL,
        ".json": json.dumps(ROWS, indent=1),
        ".csv": table.to_csv(index=False),
        ".tsv": table.to_csv(index=False, sep="\t"),
    }
    if kind in content:
        raw = content[kind].encode()
        path.write_bytes(PACK[packed[0]](raw) if packed else raw)
    elif kind == ".parquet":
        table.to_parquet(path)
    elif kind == ".feather":
        table.to_feather(path)
    else:
        with pyarrow.ipc.new_file(path, (made := pyarrow.Table.from_pandas(table)).schema) as file:
            file.write(made)
    return path


NAMES = [f"x{kind}" for kind in FILES] + ["x.JSONL", "x.Csv", "x.PARQUET"]
NAMES += [f"x{kind}{packing}" for kind in FILES[:5] for packing in PACK] + ["x.CSV.GZ"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_holds_the_same(name, tmp_path):
    path = written(tmp_path, name)
    found = read_source(Source(str(path))).examples
    assert [{"prompt": e.prompt, "response": e.response} for e in found] == ROWS
    assert read_prompts(path) == [row["prompt"] for row in ROWS]
    path.rename(broken := tmp_path / f"broken_{name}")
    broken.write_bytes(broken.read_bytes()[:-20])
    if name not in ("x.jsonl", "x.ndjson", "x.JSONL", "x.tsv", "x.csv", "x.Csv"):
        with pytest.raises(InputError, match=f"broken_{name}.*: (not|cannot) "):
            read_source(Source(str(broken)))


def test_a_stream_of_arrow(tmp_path):
    """The form of the files in `datasets`' own folders."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert [row for _, row in file_rows(file, [])] == ROWS


@pytest.mark.parametrize("features", [None, [], "x", 3])
def test_features_that_are_none(features, tmp_path):
    kept = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pyarrow.Table.from_pylist(ROWS).replace_schema_metadata(kept)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert [row for _, row in file_rows(tmp_path / "x.parquet", [])] == ROWS


CSVS = {
    "quotes": 'prompt,response\n"a, ""b""\nc",d\n',
    "crlf": "prompt,response\r\na,b\r\nc,d\r\n",
    "cr": "prompt,response\ra,b\rc,d\r",
    "mark": "\ufeffprompt,response\na,b\n",
    "blank lines": "prompt,response\n\na,b\n\n",
    "no end": "prompt,response\na,b",
    "index": ",prompt,response\n0,a,b\n1,c,d\n",
    "nothing": "prompt,response,more\na,b,\nc,d,NA\ne,f,null\ng,h,None\ni,j,nan\n",
    "spaces": "prompt,response, more\n a ,b, c\n",
    "numbers": "prompt,response,more\n1,2,1.5\n007,1.50,x\n",
}


@pytest.mark.parametrize("name", CSVS)
def test_csv_is_read_as_pandas_reads_it(name, tmp_path):
    """Cells as they stand: 007 is no 7."""
    path = tmp_path / "x.csv"
    path.write_text(CSVS[name], newline="")
    theirs = pd.read_csv(path, dtype=str, encoding="utf-8-sig")
    theirs = theirs.astype(object).where(theirs.notna(), None).to_dict("records")
    faults = []
    assert [row for _, row in file_rows(path, faults)] == theirs and not faults and theirs


def test_csv_of_numbers_is_read_as_datasets_reads_it(tmp_path):
    path = tmp_path / "x.csv"
    pd.DataFrame({"prompt": ["a", "b", "c"], "response": [1, 22, -3]}).to_csv(path, index=False)
    theirs = datasets.load_dataset("csv", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    ours = read_source(Source(str(path))).examples
    assert [e.response for e in ours] == list(map(str, theirs["train"]["response"]))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "0 example"),
        ("prompt,response\n", "0 example"),
        ("prompt;response\na;b\n", "x.csv:1: one column, .* separated by ';'"),
        ("prompt\tresponse\na\tb\n", "x.csv:1: one column, .* separated by '.t'"),
        ("prompt,prompt,response\na,b,c\n", "x.csv: columns with one name: prompt; rename one"),
        ("prompt,response\na,b\nc,d,e\n", "x.csv:3: 3 cells, but the first line has 2 names"),
        ("prompt,response\na,b\nc\n", "x.csv:3: 1 cells, but the first line has 2 names"),
        ('prompt,response\na,"b\nc,d\n', "x.csv:3: not a table .unexpected end of data"),
        ('prompt,response\na,"b" c\n', "x.csv:2: not a table"),
        ("prompt,response\na\0,b\n", "x.csv:2: 'a.x00' ... holds a NUL character"),
        ("prompt,response\na,\n", "x.csv:2: response must be given as text .there is nothing"),
        ("prompt,response\na, \n", "x.csv:2: response must be given as text"),
        ("prompt,response\nNA,b\n", "x.csv:2: prompt must be given as text .there is nothing"),
        ('q,a\n"b\nc",d\ne,f\n', "x.csv:2: prompt and .*columns q, a; name them in a column map"),
        ("question,answer\na,b\n", "x.csv:2: prompt and .*columns question, answer; name them"),
    ],
)
def test_tables_that_would_be_read_wrongly(text, expected, tmp_path):
    (tmp_path / "x.csv").write_text(text, newline="")
    with pytest.raises(InputError, match=expected):
        read_source(Source(str(tmp_path / "x.csv")))
    if "question" in text:
        with pytest.raises(
            InputError, match='x.csv:2: .*"prompt" text .columns question, answer; call the one'
        ):
            read_prompts(tmp_path / "x.csv")


def test_a_long_cell(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,response\n{'why ' * 100_000},b\n")
    assert len(read_source(Source(str(tmp_path / "x.csv"))).examples[0].prompt) == 400_000


def test_columns_with_one_name(tmp_path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "response", "response"])
    with pyarrow.ipc.new_file(tmp_path / "x.arrow", table.schema) as file:
        file.write(table)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for name, expected in (
        ("x.arrow", "x.arrow: columns with one name: response; rename one"),
        ("x.parquet", "x.parquet: not a readable parquet file .Multiple matches"),
    ):
        with pytest.raises(InputError, match=expected):
            read_source(Source(str(tmp_path / name)))


UNKNOWN = (
    "x.xlsx x.docx x.pdf x.yaml x.zip x.tar.gz x.gz x x.jsonl.zst x.parquet.gz x.md x.py x.pkl"
)


@pytest.mark.parametrize("name", UNKNOWN.split())
def test_other_kinds_are_refused_with_the_list_of_those_that_are_read(name, tmp_path):
    (tmp_path / name).write_text("one\ntwo\n")
    with pytest.raises(InputError, match=r"are not read; save it as one of \.jsonl, .*\.feather"):
        read_source(Source(str(tmp_path / name)))
    with pytest.raises(InputError, match=r"are not read; save it as one of \.txt, \.jsonl"):
        read_prompts(tmp_path / name)


def test_lines_of_text_are_prompts(tmp_path):
    raw = "\ufeffa b\r\n\r\n  c,d\ne\u2028f\n".encode()
    for name, content in (("x.txt", raw), ("x.TXT", raw), ("x.txt.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        assert read_prompts(tmp_path / name) == ["a b", "c,d", "e\u2028f"]
    with pytest.raises(InputError, match="files of .txt are not read"):
        read_source(Source(str(tmp_path / "x.txt")))
    (tmp_path / "x.txt").write_text(JSONL)
    with pytest.raises(InputError, match="x.txt: its lines are JSON objects, not prompts; call it"):
        read_prompts(tmp_path / "x.txt")


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("a\nb".encode("utf-16"), "x.jsonl: is UTF-16; save the file as UTF-8"),
        (b'{"prompt": "a\\u0000b", "response": "c"}', "x.jsonl:1: 'a.x00b' ... holds a NUL"),
        (b'{"prompt": "a\0b", "response": "c"}', "x.jsonl:1: not JSON .Invalid control"),
        (b"3\n", "x.jsonl:1: expected an object"),
        (b"null\n", "x.jsonl:1: expected an object"),
        (b'"text"\n', "x.jsonl:1: expected an object"),
        (
            b'{"prompt": "a", "response": "b", "prompt": "c"}',
            "x.jsonl:1: .*'prompt' is there twice",
        ),
        (b'{"prompt": "a", "prompt" : "b"}', "x.jsonl:1: .*'prompt' is there twice"),
        (b'{"prompt": "a", "prompt"\t: "b"}', "x.jsonl:1: .*'prompt' is there twice"),
        (b'{"\\u0070rompt": "a", "prompt": "b"}', "x.jsonl:1: .*'prompt' is there twice"),
        (
            b'{"messages": [{"role": "user", "content": "Q", "content": "Z"}]}',
            "x.jsonl:1: .*'content' is there twice",
        ),
        (b'{"prompt": "a", "response": Infinity}', "x.jsonl:1: response must be given as text"),
        (b'{"prompt": "a", "response": NaN}', "x.jsonl:1: response .* .there is nothing in it"),
        (b"\xff\xfea", "x.jsonl: is UTF-16"),
        (b"PK\x03\x04\xff", "x.jsonl:1: not UTF-8 at byte 4"),
    ],
)
def test_lines_that_are_no_rows(raw, expected, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(raw)
    with pytest.raises(InputError, match=expected):
        read_source(Source(str(tmp_path / "x.jsonl")))


@pytest.mark.parametrize("how", [{"indent": 1}, {}])
@pytest.mark.parametrize("more", [{}, {"version": "1.1"}])
def test_rows_wrapped_in_an_object(how, more, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({**more, "data": ROWS}, **how))
    with pytest.raises(InputError, match="the rows seem to lie in 'data': save that list alone"):
        read_source(Source(str(tmp_path / "x.json")))
    with pytest.raises(InputError, match="the rows seem to lie in 'data': save that list alone"):
        read_prompts(tmp_path / "x.json")


def test_one_object_over_several_lines(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(ROWS[0], indent=2))
    assert [row for _, row in file_rows(tmp_path / "x.json", [])] == ROWS[:1]


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n")
    (tmp_path / "b.jsonl").mkdir()
    (tmp_path / "c").write_text("x")
    for source, expected in (
        ("a.jsonl", r"a.jsonl: cannot be read .No such file or directory.; there is a.csv"),
        ("b.jsonl", "b.jsonl: is a folder, not a file"),
        ("none/x", "none/x: no such file or folder"),
        ("c", "c: files without a suffix are not read"),
    ):
        with pytest.raises(InputError, match=expected):
            read_source(Source(str(tmp_path / source)))
    for key in ({"config": "main"}, {"split": "test"}, {"revision": "abc"}):
        with pytest.raises(InputError, match="a.csv: a file has no config, revision or split"):
            read_source(Source(str(tmp_path / "a.csv"), **key))


def test_what_there_is_in_place_of_a_suite(tmp_path):
    suite = tmp_path / "outer" / "mine"
    (suite / "datasets" / "one").mkdir(parents=True)
    (suite / "mine.json").write_text("{}")
    (tmp_path / "bare" / "datasets").mkdir(parents=True)
    (tmp_path / "x.jsonl").write_text(JSONL)
    for root, expected in (
        (suite, "mine/suite.json: no such file; there is mine.json: give the one that describes"),
        (tmp_path / "bare", "bare/suite.json: no such file; it names those of datasets/"),
        (tmp_path / "x.jsonl", "x.jsonl: no suite, which is a folder with suite.json"),
        (tmp_path / "otter", "otter/suite.json: no such file; did you mean outer"),
    ):
        with pytest.raises(InputError, match=expected):
            load_suite(root)
    (suite / "suite.json").write_text("{}")
    for root in (tmp_path / "outer", suite / "datasets", suite / "datasets" / "one"):
        with pytest.raises(InputError, match=f"no such file; it is in {suite}: give --suite="):
            load_suite(root)


def test_special_characters_in_every_path(tmp_path):
    """No name is taken for a pattern, nor is another folder that such a pattern finds."""
    root = tmp_path / "a [1] {b} 50% é*? #c"
    for other in (tmp_path / "a 1 b 50% éx #c", root):
        (other / "folder").mkdir(parents=True)
        (other / "folder" / "train.jsonl").write_text(
            JSONL if other == root else JSONL.replace("Turin", "Rome")
        )
        written(other, "x.csv"), written(other, "x.parquet"), written(other, "x.arrow")
        datasets.Dataset.from_list(ROWS).save_to_disk(other / "saved")
    for name in ("folder", "saved", "x.csv", "x.parquet", "x.arrow", "folder/train.jsonl"):
        found = read_source(Source(str(root / name))).examples
        assert [e.response for e in found] == [row["response"] for row in ROWS], name


def test_a_home_folder_in_a_suite(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    written(tmp_path / "home", "x.csv")
    entries = [
        {"name": name, "role": role, "source": "~/x.csv", "holdout": 1}
        for name, role in (("one", "train"), ("two", "unseen"))
    ]
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"corpus": "~/x.csv", "datasets": entries}))
    assert len(load_suite(path).corpus) == 5 and len(load_suite(path).train[0].train) == 4
    path.write_text(path.read_text().replace("~/", "~nobody_of_this_name/"))
    with pytest.raises(InputError, match="begins with a home folder that does not exist"):
        load_suite(path)


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "content, expected",
    [
        ([{"type": "text", "text": "q"}], "q"),
        ([{"type": "text", "text": "q"}, {"type": "text", "text": " r"}], "q r"),
        ([{"text": "q", "type": "text", "image": None}], "q"),
        (["q"], "q"),
        ([{"type": "image", "image": "x.png"}, {"type": "text", "text": "q"}], "of type image"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "of type image_url"),
        ([{"type": "text", "text": None}], "of type text without one"),
        ([], "prompt must be given"),
        (None, "prompt must be given"),
        ({"text": "q"}, "prompt must be given"),
    ],
)
def test_parts_of_a_conversation(content, expected, tmp_path):
    row = {"messages": [{"role": "user", "content": content}, TURNS[1]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    if expected.startswith("q"):
        assert read_source(Source(str(tmp_path / "x.jsonl"))).examples[0].prompt == expected
        assert read_prompts(tmp_path / "x.jsonl") == [expected]
        return
    with pytest.raises(InputError, match=f"x.jsonl:1: .*{expected}"):
        read_source(Source(str(tmp_path / "x.jsonl")))


@pytest.mark.parametrize("role", [["user"], {"name": "user"}, 3, True])
def test_a_speaker_that_is_no_text(role, tmp_path):
    row = {"messages": [{"role": role, "content": "q"}, TURNS[1]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="x.jsonl:1: speaker .* is none of"):
        read_source(Source(str(tmp_path / "x.jsonl")))


def test_calls_of_tools_are_no_answers(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [TURNS[0], call]}))
    with pytest.raises(InputError, match="x.jsonl:1: the conversation has tool_calls"):
        read_source(Source(str(tmp_path / "x.jsonl")))


def test_conversations_in_columns(tmp_path):
    """As `datasets` keeps them: keys of other turns are null, a sequence of objects is an object of
    sequences, and a column that others of the table fill is null."""
    turns = [{**turn, "tool_calls": None, "from": None, "value": None} for turn in TURNS]
    rows = [{"prompt": None, "messages": turns, "system": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    columns = {"messages": {key: [turn[key] for turn in TURNS] for key in TURNS[0]}}
    (tmp_path / "x.jsonl").write_text(json.dumps(columns))
    for name in ("x.parquet", "x.jsonl"):
        (example,) = read_source(Source(str(tmp_path / name))).examples
        assert example[:3] == ("q", "a", "")


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_numbers_of_fewer_bits_are_what_was_written(kind, tmp_path):
    frame = pd.DataFrame({"prompt": ["a", "b", "c"], "n": np.array([0.1, 2.75, 7.5], kind)})
    frame.to_parquet(tmp_path / "x.parquet")
    made = datasets.Dataset.from_pandas(frame, preserve_index=False)
    made.save_to_disk(tmp_path / "saved")
    for name in ("x.parquet", "saved"):
        found = read_source(
            Source(str(tmp_path / name), columns={"prompt": "prompt", "response": "n"})
        )
        assert [e.response for e in found.examples] == ["0.1", "2.75", "7.5"], name


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_an_answer_that_is_not_to_be_learnt(flag, tmp_path):
    """As OpenAI's files and trainers say it of a turn."""

    def rows(*flags: dict) -> Source:
        turns = [{"role": ("user", "assistant")[i % 2], "content": f"t{i}"} for i in range(4)]
        for turn, its in zip(turns[1::2], flags, strict=True):
            turn.update(its)
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        return Source(str(tmp_path / "x.jsonl"))

    with pytest.raises(InputError, match=f"x.jsonl:1: the first answer has {next(iter(flag))} = "):
        read_source(rows(flag, {}))
    taught = dict.fromkeys(flag, True)
    for flags in (({}, flag), (taught, flag), (dict.fromkeys(flag), {})):
        assert read_source(rows(*flags)).examples[0].response == "t1"
