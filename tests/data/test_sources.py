"""Examples from every kind of source, with real files, parquet and `datasets` folders; suites that
list them; faults by name."""

import json
import os
import pathlib

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnd_jax.core.errors import InputError
from dnd_jax.data import report as hygiene
from dnd_jax.data.sources import Source, hold_out, read_prompts, read_source
from dnd_jax.data.suite import load_suite
from dnd_jax.data.world import write_world

ROWS = [
    {"prompt": f"question {i}", "response": f"answer {i}", "system": "be brief"} for i in range(12)
]
RAW = [
    {
        "id": i,
        "q": {"text": f"question {i}"},
        "choices": {"label": ["A", "B"], "text": ["iron", "wood"]},
        "key": "AB"[i % 2],
    }
    for i in range(12)
]
COLUMNS = {
    "prompt": "{{q.text}}{% for l, t in zip(choices.label, choices.text) %}\n{{l}}: {{t}}{% "
    "endfor %}",
    "response": "[{{key}}]",
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def content(reading):
    return [(e.prompt, e.response, e.system) for e in reading.examples]


def test_the_same_rows_from_every_kind_of_source(tmp_path):
    expected = [(r["prompt"], r["response"], r["system"]) for r in ROWS]
    lines(tmp_path / "a.jsonl", ROWS)
    lines(tmp_path / "b.json", ROWS)  # one object a line, whatever the name says
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=2))  # one list: the original's files
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        tmp_path / "saved_splits"
    )
    (tmp_path / "folder").mkdir()
    lines(tmp_path / "folder" / "train.jsonl", ROWS)  # what load_dataset itself reads from a folder
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet", "saved", "saved_splits", "folder"):
        assert content(read_source(Source(str(tmp_path / name)))) == expected, name


def test_column_map_with_nested_columns_and_templates(tmp_path):
    expected = [(f"question {i}\nA: iron\nB: wood", f"[{'AB'[i % 2]}]", "pick") for i in range(12)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RAW), tmp_path / "raw.parquet")
    assert (
        content(read_source(Source(str(tmp_path / "raw.parquet"), columns=COLUMNS, system="pick")))
        == expected
    )
    plain = {"prompt": "q.text", "response": "id", "system": "choices.text.1"}
    read = content(read_source(Source(lines(tmp_path / "raw.jsonl", RAW), columns=plain)))
    assert read == [(f"question {i}", str(i), "wood") for i in range(12)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"prompt": "q.txt", "response": "key"},
            "raw.jsonl:1: no column 'q.txt' for prompt; there are id, q, choices, key",
        ),
        (
            {"prompt": "{{question}}", "response": "key"},
            "raw.jsonl:1: columns.prompt cannot be filled in ('question' is undefined)",
        ),
        (
            {"prompt": "{{q.text", "response": "key"},
            "raw.jsonl: columns.prompt is no Jinja template",
        ),
        ({"prompt": "q", "response": "key"}, "raw.jsonl:1: prompt must be given as text"),
        (
            {"prompt": "{{ q.text.__class__.__mro__ }}", "response": "key"},
            "raw.jsonl:1: columns.prompt cannot be filled in",
        ),
        (
            {},
            "raw.jsonl:1: prompt and response must be given as text (columns id, q, choices, key; "
            "name them in a column map)",
        ),
    ],
)
def test_column_map_faults(tmp_path, columns, expected):
    with pytest.raises(InputError) as error:
        read_source(Source(lines(tmp_path / "raw.jsonl", RAW), columns=columns))
    assert str(tmp_path / expected.split(":")[0]) in str(error.value) and expected.split("jsonl")[
        1
    ] in str(error.value)


@pytest.mark.parametrize("nothing", [None, float("nan"), ["iron"], {"text": "iron"}])
def test_nothing_becomes_no_word(tmp_path, nothing):
    """null, NaN and lists in a template or a column are faults of their row, not the text
    "None"."""
    path = lines(tmp_path / "raw.jsonl", [{"q": "a", "more": "b"}, {"q": "c", "more": nothing}])
    for expression in ("{{q}} {{more}}", "more"):
        with pytest.raises(InputError, match="raw.jsonl:2: .*prompt"):
            read_source(Source(path, columns={"prompt": expression, "response": "q"}))
    asked = {"prompt": "{{q}}{{ (more or '') if more is none else 'x' }}", "response": "q"}
    assert read_source(Source(path, columns=asked)).examples[0].prompt == "ax"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "a \\ud83d", "response": "b"}', "holds half of a character"),
        (
            '{"prompt": "a", "response": "b", "n": ' + "7" * 5000 + "}",
            "not JSON .Exceeds the limit",
        ),
        ('{"prompt": "a", "n": ' + "[" * 50000 + "]" * 50000 + "}", "not JSON .nested too deep"),
        ('{"prompt": "a", "response": "b"} {}', "not JSON .Extra data at column 34"),
        ('{"prompt": "a", "response": "b"', "not JSON .Expecting"),
    ],
)
def test_text_that_is_no_text(tmp_path, line, why):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n")
    with pytest.raises(InputError, match=f"x.jsonl:3: .*{why}"):
        read_source(Source(str(path)))
    with pytest.raises(InputError, match="x.jsonl:3: "):
        read_prompts(path)


def test_conversations(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "c"},
                {"from": "gpt", "value": "d"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "e"},
                {"from": "gpt", "value": "f"},
                {"from": "human", "value": "g"},
            ],
            "system": "t",
        },
        {
            "messages": [
                {"role": "system", "content": "u"},
                {"role": "user", "content": "h"},
                {"role": "assistant", "content": "i"},
            ]
        },
    ]
    reading = read_source(Source(lines(tmp_path / "x.jsonl", rows)))
    assert content(reading) == [("a", "b", ""), ("c", "d", "s"), ("e", "f", "t"), ("h", "i", "u")]
    assert reading.longer_conversations == 1
    bad = [
        {"conversations": [{"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "tool", "value": "b"}]},
        {"conversations": "hello"},
        {"conversations": [{"from": "human", "value": "b"}]},
    ]
    with pytest.raises(InputError) as error:
        read_source(Source(lines(tmp_path / "y.jsonl", bad)))
    for part in (
        ":1: a conversation must begin",
        ":2: speaker 'tool'",
        ":3: a conversation must be a list",
        ":4: response must be",
    ):
        assert f"{tmp_path}/y.jsonl{part}" in str(error.value)


def documented(page: str, name: str) -> str:
    """The suite of that name in docs/PAGE."""
    blocks = (
        block.split("```")[0]
        for block in pathlib.Path("docs", page).read_text().split("```json\n")[1:]
    )
    return next(block for block in blocks if f'"name": "{name}' in block)


def test_no_test_question_is_in_the_pool(tmp_path):
    """docs/METHOD.md section 7: what generation draws from and what is scored are disjoint,
    whatever the files are."""
    for name, prompts in (("own", "abcdef"), ("pool", ["a", "b ", "c", "d", "e"]), ("test", "bxd")):
        lines(
            tmp_path / f"{name}.jsonl", [{"prompt": prompt, "response": "r"} for prompt in prompts]
        )
    entries = [
        {"name": "one", "role": "train", "source": "own.jsonl", "holdout": 1},
        {"name": "two", "role": "unseen", "source": "pool.jsonl"},
        {"name": "two", "role": "test", "source": "test.jsonl"},
    ]
    (tmp_path / "s.json").write_text(json.dumps({"datasets": entries}))
    (dataset,) = load_suite(tmp_path / "s.json", 3).unseen
    assert [e.prompt for e in dataset.pool] == ["a", "c", "e"] and len(dataset.train) == 5
    with pytest.raises(
        InputError,
        match=r"pool.jsonl: 3 example\(s\) beside the test questions in it, at least 4 needed",
    ):
        load_suite(tmp_path / "s.json", 4)


def test_the_suite_of_real_text(tmp_path):
    """docs/REAL_TEXT.md's, on files of its format: questions alone for the base, no system text
    anywhere."""
    for name in (
        "ARC-c_train",
        "ARC-c_test",
        "ARC-e_train",
        "ARC-e_test",
        "BoolQ_train",
        "BoolQ_validation",
        "OBQA_train",
        "OBQA_test",
    ):
        lines(
            tmp_path / f"{name}.jsonl",
            [{**row, "prompt": f"{name} {row['prompt']}"} for row in ROWS],
        )
    (tmp_path / "common_sense.json").write_text(documented("REAL_TEXT.md", "common sense"))
    suite = load_suite(tmp_path / "common_sense.json")
    assert [d.name for d in suite.train] == ["BoolQ", "ARC-c", "ARC-e"] and [
        d.name for d in suite.unseen
    ] == ["OBQA"]
    assert len(suite.corpus) == 36 and not any(e.response for e in suite.corpus)
    assert (
        not any(e.system for d in suite.datasets for e in d.train + d.test)
        and suite.unseen[0].labeled
    )


def test_the_suite_of_the_walk_through(tmp_path):
    """docs/TRAIN.md's first one, on the embedded suite's files: none of its faults can be the
    reader's."""
    write_world(tmp_path / "example", 0)
    (tmp_path / "suite.json").write_text(documented("TRAIN.md", "people"))
    suite = load_suite(tmp_path / "suite.json", 8)
    assert [d.name for d in suite.train] == ["home_letter", "pet_letter", "pet_digit"] and len(
        suite.unseen
    ) == 2
    assert (
        suite.corpus
        and all(len(d.test) == 20 for d in suite.datasets)
        and not [f for f in hygiene.findings(suite) if f.fault]
    )


def test_the_suite_of_the_documentation(tmp_path):
    """docs/TRAIN.md's example as it is, its files beside it; the hub's dataset in a folder of its
    name, with its configuration."""
    (tmp_path / "science.json").write_text(documented("TRAIN.md", "science"))
    (tmp_path / "ARC-e_train.json").write_text(json.dumps(ROWS))
    (tmp_path / "ARC-e_test.json").write_text(json.dumps(ROWS[:3]))
    chats = [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]}
        for i in range(203)
    ]
    lines(tmp_path / "chats.jsonl", chats)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": f"p{i}", "response": "r"} for i in range(55)]),
        tmp_path / "prompts.parquet",
    )
    hub = tmp_path / "allenai" / "openbookqa"
    (hub / "main").mkdir(parents=True)
    stems = [
        {"question_stem": f"s{i}", "choices": RAW[0]["choices"], "answerKey": "A"} for i in range(6)
    ]
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(stems), hub / "main" / f"{split}.parquet"
        )
    files = "".join(
        f"  - split: {split}\n    path: main/{split}.parquet\n" for split in ("train", "test")
    )
    (hub / "README.md").write_text(
        f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}- config_name: other\n  "
        "data_files: x.csv\n---\n"
    )
    suite = load_suite(tmp_path / "science.json")
    assert suite.name == "science" and [d.name for d in suite.train + suite.unseen] == [
        "arc_e",
        "piqa",
        "obqa",
        "mine",
    ]
    assert suite.unseen[0].train[1].prompt == "s1\nA: iron\nB: wood" and suite.unseen[0].train[
        1
    ].system.startswith("Answer by")
    assert [len(d.test) for d in suite.train + suite.unseen] == [3, 200, 6, 50]
    with pytest.raises(
        InputError, match="openbookqa: no dataset to be had here or on the hub .*nope"
    ):
        read_source(Source(str(hub), config="nope"))


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="x.parquet: not a readable parquet file"):
        read_source(Source(str(tmp_path / "x.parquet")))
    (tmp_path / "x.json").write_text('[{"prompt": "a",\n "response": }]')
    with pytest.raises(InputError, match="x.json:2: not JSON"):
        read_source(Source(str(tmp_path / "x.json")))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        tmp_path / "saved"
    )
    with pytest.raises(InputError, match="saved: no split 'test'; there are train"):
        read_source(Source(str(tmp_path / "saved")), split="test")
    with pytest.raises(InputError, match="nobody/nothing: no dataset to be had here or on the hub"):
        read_source(Source("nobody/nothing"))  # the tests are offline


def test_a_saved_dataset_that_names_no_split_is_any(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "a")
    for split in ("train", "test"):
        assert content(read_source(Source(str(tmp_path / "a"), split=split)))
    datasets.Dataset.from_list(ROWS, split="train").save_to_disk(tmp_path / "b")
    assert content(read_source(Source(str(tmp_path / "b"))))
    with pytest.raises(InputError, match="b: no split 'test'; there are train"):
        read_source(Source(str(tmp_path / "b"), split="test"))


@pytest.mark.parametrize("kind", [datasets.Image, datasets.Audio, datasets.Video])
def test_columns_of_pictures_and_sounds_are_not_decoded(kind, tmp_path):
    damaged = {"bytes": b"none", "path": None}
    held = datasets.Dataset.from_list([{"prompt": "q", "response": "a", "seen": damaged}])
    features = datasets.Features({**held.features, "seen": kind()})
    held.cast(features).save_to_disk(tmp_path / "saved")
    assert content(read_source(Source(str(tmp_path / "saved")))) == [("q", "a", "")]


def test_rows_that_cannot_be_decoded(tmp_path):
    """Pictures in lists are; a damaged one is said."""
    damaged = [{"bytes": b"none", "path": None}]
    held = datasets.Dataset.from_list([{"prompt": "q", "response": "a", "seen": damaged}])
    features = datasets.Features({**held.features, "seen": datasets.List(datasets.Image())})
    held.cast(features).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="saved: a row cannot be read .*image"):
        read_source(Source(str(tmp_path / "saved")))


def test_limit_and_prompts_without_responses(tmp_path):
    path = lines(tmp_path / "a.jsonl", ROWS)
    some = content(read_source(Source(path, limit=5)))
    assert len(some) == 5 and some == content(read_source(Source(path, limit=5)))
    assert sorted(some, key=lambda row: int(row[0].split()[1])) == some
    assert len(content(read_source(Source(path, limit=50)))) == 12
    bare = [{"prompt": r["prompt"]} for r in ROWS]
    unlabeled = read_source(Source(lines(tmp_path / "b.jsonl", bare)), answers=False)
    assert {e.response for e in unlabeled.examples} == {""}
    with pytest.raises(InputError, match=":1: response must be given"):
        read_source(Source(str(tmp_path / "b.jsonl")))
    lines(tmp_path / "c.jsonl", ROWS[:2] + bare[2:])
    with pytest.raises(InputError, match="c.jsonl:3: no response, but others of the file have one"):
        read_source(Source(str(tmp_path / "c.jsonl")), answers=False)


def test_prompts_of_a_list(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    assert read_prompts(tmp_path / "p.json") == [r["prompt"] for r in ROWS]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=3, max_size=40), st.integers(1, 7))
def test_held_out_questions_are_in_no_train(prompts, count):
    from dnd_jax.data.sources import Example

    examples = [Example(p, str(i)) for i, p in enumerate(prompts)]
    if count >= len(set(prompts)):
        with pytest.raises(
            InputError,
            match=f"holdout = {count} of {len(set(prompts))} different prompts leaves none",
        ):
            hold_out(examples, count, "x")
        return
    kept, test = hold_out(examples, count, "x")
    assert len(test) == len({e.prompt for e in test}) == count
    assert not {e.prompt for e in kept} & {e.prompt for e in test}
    assert {e.prompt for e in kept} | {e.prompt for e in test} == set(prompts)
    assert list(kept) == [e for e in examples if e in kept] and list(test) == [
        e for e in examples if e in test
    ]


@pytest.fixture
def listed(tmp_path):
    """A suite that lists sources of every kind."""
    lines(tmp_path / "a_train.jsonl", ROWS[:8])
    lines(tmp_path / "a_test.jsonl", ROWS[8:])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RAW), tmp_path / "raw.parquet")
    splits = {
        "train": datasets.Dataset.from_list(RAW[:6]),
        "test": datasets.Dataset.from_list(RAW[6:]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hub")
    lines(tmp_path / "pool.jsonl", [{"prompt": f"try {i}"} for i in range(5)])
    description = {
        "datasets": [
            {"name": "a", "role": "train", "source": "a_train.jsonl"},
            {"name": "a", "role": "test", "source": "a_test.jsonl"},
            {
                "name": "b",
                "role": "train",
                "source": "raw.parquet",
                "columns": COLUMNS,
                "holdout": 4,
            },
            {"name": "c", "role": "unseen", "source": "hub", "columns": COLUMNS},
            {"name": "c", "role": "test", "source": "hub", "columns": COLUMNS, "split": "test"},
            {"name": "d", "role": "unseen", "source": "pool.jsonl"},
            {"name": "d", "role": "test", "source": "a_test.jsonl", "limit": 2},
        ]
    }
    (tmp_path / "mine.json").write_text(json.dumps(description))
    return tmp_path / "mine.json", description


def test_listed_suite(listed):
    path, _ = listed
    suite = load_suite(path)
    assert suite.name == "mine" and suite.kinds == {"c": "unseen", "d": "unseen"}
    sizes = {d.name: (len(d.train), len(d.test)) for d in suite.train + suite.unseen}
    assert sizes == {"a": (8, 4), "b": (8, 4), "c": (6, 6), "d": (5, 2)}
    assert [d.name for d in suite.datasets] == ["a", "b", "c"]  # d has no responses to tune on
    assert (
        suite.unseen[0].train[1].prompt == "question 1\nA: iron\nB: wood"
        and suite.unseen[0].train[1].response == "[B]"
    )


@pytest.mark.parametrize(
    ("at", "change", "expected"),
    [
        (0, {"role": "trian"}, "datasets[0] (a).role = 'trian' is none of train, unseen, test"),
        (0, {"soruce": "x"}, "datasets[0] (a).soruce is unknown; did you mean source?"),
        (0, {"name": "../a"}, "datasets[0].name = '../a' cannot name a folder: it has a /"),
        (0, {"limit": "5"}, "datasets[0] (a).limit = '5' is of the wrong type"),
        (0, {"limit": -3}, "datasets[0] (a).limit = -3 must be 0 (all) or more"),
        (0, {"source": ""}, "datasets[0] (a) needs a source"),
        (
            0,
            {"source": "a\0.jsonl"},
            "datasets[0] (a).source = 'a\\x00.jsonl' holds a NUL character",
        ),
        (
            0,
            {"columns": {"question": "q"}},
            "datasets[0] (a).columns must map prompt, response and system",
        ),
        (2, {"holdout": 0}, "b needs either an entry of role test or a holdout"),
        (2, {"holdout": 12}, "holdout = 12 of 12 different prompts leaves none"),
        (2, {"holdout": 11}, "1 example(s) beside the 11 held out, at least 2 needed"),
        (3, {"name": "a"}, "datasets[3] (a) is there twice"),
        (6, {"name": "e"}, "e has a test, but no entry of role train or unseen"),
        (6, {"source": "pool.jsonl"}, "pool.jsonl:4: response must be given"),
        (1, {"source": "none.jsonl"}, "none.jsonl: cannot be read"),
    ],
)
def test_listed_suite_faults(listed, at, change, expected):
    path, description = listed
    description["datasets"][at] |= change
    path.write_text(json.dumps(description))
    with pytest.raises(InputError) as error:
        load_suite(path)
    assert expected in str(error.value)


def test_a_folder_whose_files_were_replaced_under_the_same_time(tmp_path):
    """`datasets` keeps what it made of a folder by the files' times alone."""
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "train.jsonl"
    for prompt in ("old ?", "new ?", "old ?"):
        lines(file, [{"prompt": prompt, "response": "1"}])
        os.utime(file, (1e9, 1e9))
        assert read_source(Source(str(tmp_path / "d"))).examples[0].prompt == prompt
