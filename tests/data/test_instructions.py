"""Public little tasks as they come (the JSON files of instruction induction and function vectors),
asked in several wordings: one template a row, the same on every machine."""

import collections
import json
import pathlib
import shutil

import pytest

from dnd_jax.core.errors import InputError
from dnd_jax.data.report import findings
from dnd_jax.data.sources import Source, hold_out, read_source
from dnd_jax.data.suite import load_suite

TEMPLATES = [
    "What is the opposite of {{input}}?",
    "{{input}} means the contrary of which word?",
    "Give an antonym.\n{{input}}",
]
PAIRS = [{"input": f"word{i}", "output": f"drow{i}"} for i in range(40)]


def write(path: pathlib.Path, value: object) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def induction(pairs: list[dict]) -> dict:
    """A file of instruction induction: rows in an object, beside what is said of the task."""
    rows = {str(i): row for i, row in enumerate(pairs, start=1)}
    return {"metadata": {"num_examples": len(pairs)}, "examples": rows}


LAYOUTS = {
    "list": (PAIRS, ""),  # function vectors
    "object": (induction(PAIRS), "examples"),
    "list_in_object": ({"metadata": {}, "examples": PAIRS}, "examples"),
}


def source(path: pathlib.Path, **how) -> Source:
    return Source(str(path), **{"columns": {"response": "output"}, "templates": TEMPLATES} | how)


def prompts(path: pathlib.Path, **how) -> list[str]:
    return [e.prompt for e in read_source(source(path, **how)).examples]


def faults(suite) -> list[str]:
    """But for there being one dataset to train on."""
    found = [str(f) for f in findings(suite) if f.fault]
    return [text for text in found if "is the only training dataset" not in text]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, tmp_path):
    value, field = LAYOUTS[layout]
    examples = read_source(source(write(tmp_path / "a.json", value), field=field)).examples
    assert [e.response for e in examples] == [row["output"] for row in PAIRS]
    numbers = []
    for e, row in zip(examples, PAIRS, strict=True):
        asked = [text.replace("{{input}}", row["input"]) for text in TEMPLATES]
        numbers.append(asked.index(e.prompt))
        assert e.question == asked[0]
    assert all(8 <= count <= 20 for count in collections.Counter(numbers).values()), numbers
    assert "a.json: " in examples[0].where and examples[0].where.endswith(
        "row '1'" if layout == "object" else "row 1"
    )


def test_a_row_keeps_its_template(tmp_path):
    """Wherever the file lies, whichever rows `limit` keeps, for ever; another source draws
    others."""
    path = write(tmp_path / "one" / "a.json", PAIRS)
    drawn = prompts(path)
    asked = [[text.replace("{{input}}", row["input"]) for text in TEMPLATES] for row in PAIRS]
    numbers = [texts.index(prompt) for texts, prompt in zip(asked, drawn, strict=True)]
    assert numbers[:16] == [2, 1, 0, 2, 1, 0, 2, 2, 0, 0, 0, 1, 0, 0, 2, 1]
    (tmp_path / "two").mkdir()
    assert prompts(shutil.copy(path, tmp_path / "two" / "a.json")) == drawn
    kept = prompts(path, limit=9)
    assert kept == [prompt for prompt in drawn if prompt in kept] and len(kept) == 9
    assert prompts(write(tmp_path / "b.json", PAIRS)) != drawn


def test_a_row_in_two_wordings_is_one_question(tmp_path):
    """It is on one side of a holdout, in no pool where it is tested, and named by the report."""
    path = write(tmp_path / "a.json", PAIRS + PAIRS)
    examples = read_source(source(path)).examples
    twice = collections.Counter(e.question for e in examples)
    assert set(twice.values()) == {2} and len({e.prompt for e in examples}) > len(twice)
    kept, held = hold_out(examples, 10, "a.json")
    assert len(held) == 10 and not {e.question for e in held} & {e.question for e in kept}
    write(tmp_path / "test.json", PAIRS[:12])
    others = {"templates": ["Which word is the reverse of {{input}}?", "Not {{input}}, but what?"]}
    entries = [
        {"name": "a", "role": role, "source": name, **HOW, **how}
        for role, name, how in (("unseen", "a.json", {}), ("test", "test.json", others))
    ]
    entries.append({"name": "b", "role": "train", "source": "b.json", "holdout": 5, **HOW})
    write(tmp_path / "b.json", [{"input": f"b{i}", "output": f"c{i}"} for i in range(30)])
    suite = load_suite(write(tmp_path / "s.json", {"datasets": entries}))
    [a] = suite.unseen
    assert len(a.train) == 80 and len(a.pool) == 56
    found = faults(suite)
    assert found[0].startswith("a: 40 of 80 train examples are there before (")
    assert found[1].startswith("a: 12 of 12 test questions occur in a's train (")
    assert len(found) == 2


def test_a_prompt_in_any_wording_is_the_same_question(tmp_path):
    """Also where only one of the two files has templates, or the other calls its columns
    otherwise."""
    asked = [TEMPLATES[i % 3].replace("{{input}}", row["input"]) for i, row in enumerate(PAIRS)]
    pairs = zip(asked, PAIRS, strict=True)
    ready = [{"prompt": f"{prompt} ", "response": row["output"]} for prompt, row in pairs]
    renamed = [{"word": row["input"], "output": row["output"]} for row in PAIRS]
    word = {**HOW, "templates": [text.replace("input", "word") for text in TEMPLATES[1:]]}
    for train, test, how_train, how_test in (
        (PAIRS, ready[:12], HOW, {}),
        (ready, PAIRS[:12], {}, HOW),
        (PAIRS, renamed[:12], HOW, word),
    ):
        write(tmp_path / "a.json", train)
        write(tmp_path / "test.json", test)
        entries = [
            {"name": "a", "role": role, "source": name, **how}
            for role, name, how in (
                ("unseen", "a.json", how_train),
                ("test", "test.json", how_test),
            )
        ]
        entries.append({"name": "b", "role": "train", "source": "b.json", "holdout": 5, **HOW})
        write(tmp_path / "b.json", [{"input": f"b{i}", "output": f"c{i}"} for i in range(30)])
        suite = load_suite(write(tmp_path / "s.json", {"datasets": entries}))
        [a] = suite.unseen
        assert len(a.train) == 40 and len(a.pool) == 28, (how_train, how_test)
        [found] = faults(suite)
        assert found.startswith("a: 12 of 12 test questions occur in a's train (")


def test_the_suite_of_the_documentation(tmp_path):
    """docs/TRAIN.md's: two files of instruction induction a task, and one of function vectors."""
    blocks = pathlib.Path("docs/TRAIN.md").read_text().split("```json\n")[1:]
    text = next(b.split("```")[0] for b in blocks if b.startswith('{"name": "little tasks"'))
    for place, rows in (("induce", PAIRS[:30]), ("execute", PAIRS[30:])):
        write(tmp_path / "raw" / place / "antonyms.json", induction(rows))
    write(tmp_path / "abstractive" / "capitalize.json", PAIRS)
    (tmp_path / "little.json").write_text(text)
    suite = load_suite(tmp_path / "little.json", 8)
    assert [len(d.train) for d in suite.every] == [30, 30]
    assert [len(d.test) for d in suite.every] == [10, 10]
    for dataset in suite.every:
        assert len({e.prompt.replace(e.prompt.split()[-1], "") for e in dataset.train}) > 1
    assert not faults(suite)
    changed = json.loads(text)
    changed["datasets"][0]["templates"][0] += " Please."
    (tmp_path / "little.json").write_text(json.dumps(changed))
    assert load_suite(tmp_path / "little.json", 8).fingerprint != suite.fingerprint


HOW = {"columns": {"response": "output"}, "templates": TEMPLATES}
T = "datasets[0] (a).templates"


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"templates": []}, f"{T} is empty; give one template or more"),
        ({"templates": "Say {{input}}"}, f"{T} = 'Say {{{{input}}}}' is of the wrong type"),
        ({"templates": ["{{input}}", " \n"]}, f"{T}[1] has nothing in it"),
        ({"templates": ["{{input}}", 3]}, f"{T}[1] = 3 is no text"),
        ({"templates": ["{{input}} ?", "{{input}}", "{{input}}  ?"]}, f"{T}[0] and [2] are the"),
        ({"templates": ["Say the opposite."]}, f"{T}[0] = 'Say the opposite.' names no column"),
        ({"templates": ["{% if %}{{input}}"]}, f"{T}[0] is no Jinja template ("),
        (
            {"columns": {"prompt": "input", "response": "output"}},
            "datasets[0] (a) has templates and columns.prompt, and both say what a prompt is",
        ),
        (  # in the first row, whichever is drawn there
            {"templates": ["{{input}}", "{{input}} ?", "{{input}} {{kind}}", "Say {{input}}"]},
            "a.json: row 1: templates[2] cannot be filled in ('kind' is undefined); there are "
            "input, output",
        ),
        ({"columns": {}}, "a.json: row 1: response must be given as text (columns input, output,"),
        ({"field": "examples"}, "a.json: no field 'examples'; it is no object"),
        ({"source": "a.jsonl", "field": "x"}, "a.jsonl:2: not JSON (Extra data); a file with a fi"),
        ({"field": 3}, "datasets[0] (a).field = 3 is of the wrong type"),
        ({"source": "ii.json"}, "in 'examples': save a list of its values alone, or, in a suite"),
        ({"source": "ii.json", "columns": {}}, 'give the source "field": "examples")'),
        ({"source": "ii.json", "field": "data"}, "no field 'data'; there are metadata, examples"),
        ({"source": "ii.json", "field": "metadata"}, "'metadata' holds neither a list nor an obj"),
        ({"source": "rows.json"}, "(its values seem to be the rows: save a list of them)"),
        ({"source": "a.csv", "field": "x"}, "a.csv: only a JSON file has a field, here 'x'"),
        ({"source": "./folder", "field": "x"}, "folder: only a JSON file has a field, here 'x'"),
    ],
)
def test_faults_by_name(change, expected, tmp_path):
    write(tmp_path / "a.json", PAIRS)
    write(tmp_path / "ii.json", induction(PAIRS))
    write(tmp_path / "rows.json", induction(PAIRS)["examples"])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "a.csv").write_text("input,output\na,b\n")
    (tmp_path / "folder").mkdir()
    entry = {"name": "a", "role": "train", "source": "a.json", "holdout": 5, **HOW} | change
    write(tmp_path / "s.json", {"datasets": [entry]})
    with pytest.raises(InputError) as error:
        load_suite(tmp_path / "s.json")
    assert expected in str(error.value)
