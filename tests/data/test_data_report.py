"""The data report finds every fault that is put into a clean suite, by name and number, and none in
a clean one."""

import hashlib
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnd_jax.core.errors import InputError
from dnd_jax.data import report as hygiene
from dnd_jax.data.questions import alike, choices, normal, question, shape
from dnd_jax.data.report import findings
from dnd_jax.data.skills import write_skills
from dnd_jax.data.suite import load_suite
from dnd_jax.data.world import write_world
from dnd_jax.main import main

TOPICS = {
    "iron": "a metal",
    "oak": "a tree",
    "tea": "a drink",
    "jazz": "music",
    "ant": "an animal",
    "rain": "weather",
    "rye": "a crop",
}


def clean_rows(name: str, first: int, count: int) -> list[dict]:
    """Questions with four lettered choices, different in every dataset; all letters occur."""
    words = list(TOPICS)
    rows = []
    for i in range(first, first + count):
        listing = "\n".join(
            f"{letter}: {TOPICS[words[(i + j) % 7]]}" for j, letter in enumerate("ABCD")
        )
        prompt = (
            f"In {name} number {i}, what is {words[i % 7]} together with {words[i % 5]}?\n{listing}"
        )
        rows.append({"prompt": prompt, "response": f"[{'ABCD'[i % 4]}]"})
    return rows


@pytest.fixture
def files(tmp_path):
    """{"NAME_SPLIT": rows} of a clean suite, and what writes it: () -> suite file."""
    rows = {
        f"{n}_{split}": clean_rows(n, at, 20)
        for n in ("one", "two", "three")
        for split, at in (("train", 0), ("test", 20))
    }

    def write():
        entries = []
        for key, content in rows.items():
            name, split = key.split("_")
            (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
            role = "test" if split == "test" else "unseen" if name == "three" else "train"
            entries.append({"name": name, "role": role, "source": f"{key}.jsonl"})
        (tmp_path / "mine.json").write_text(json.dumps({"datasets": entries}))
        return tmp_path / "mine.json"

    return rows, write


def faults(write) -> list[str]:
    return [str(f) for f in findings(load_suite(write())) if f.fault]


def test_one_training_dataset_is_warned_of_and_none_refused(files, capsys):
    path = files[1]()
    described = json.loads(path.read_text())
    for role, name in (("unseen", "two"), ("unseen", "one")):
        for entry in described["datasets"]:
            entry["role"] = (
                role if entry["name"] == name and entry["role"] == "train" else entry["role"]
            )
        path.write_text(json.dumps(described))
        if name == "two":
            message = (
                "one: is the only training dataset: the generator cannot learn what prompts mean; "
                "wrong prompts will do as well"
            )
            assert (
                main(["data-report", f"--suite={path}"]) == 0 and message in capsys.readouterr().out
            )
            assert (
                main(["data-report", f"--suite={path}", "--strict"]) == 2
                and message in capsys.readouterr().err
            )
    with pytest.raises(
        InputError,
        match=r"mine.json: train names no dataset, so there is nothing to learn from; add one",
    ):
        load_suite(path)


def test_nothing_in_clean_suites(files):
    assert faults(files[1]) == []


@pytest.mark.parametrize("write", [write_world, write_skills])
def test_no_test_question_of_an_embedded_suite_stands_in_any_train_file(write, tmp_path):
    """And one that is put into the train file of an unseen task, with another answer, is found,
    wherever it is asked: a prompt that shows half of its task is a question of several."""
    write(tmp_path, seed=3)
    suite = load_suite(tmp_path)
    assert findings(suite) == []
    *_, asked, other = (d for d in suite.unseen if suite.kinds[d.name] == "halves")
    path, row = tmp_path / "datasets" / other.name / "train.jsonl", asked.test[4]
    with path.open("a") as file:
        file.write(json.dumps({"prompt": row.prompt.lower(), "response": "no"}) + "\n")
    found = {f.dataset: f.text for f in findings(load_suite(tmp_path)) if f.fault}
    assert asked.name in found and len(found) > 1
    for name, text in found.items():
        [dataset] = (d for d in suite.every if d.name == name)
        assert f"1 of {len(dataset.test)} test questions occur in {other.name}'s train (" in text
        assert row.prompt in {e.prompt for e in dataset.test}


def test_tasks_that_share_a_question_are_said_together(files):
    rows, write = files
    extra = {f"n{i}_train": clean_rows(f"n{i}", 0, 20) for i in range(5)}
    rows |= extra | {f"n{i}_test": clean_rows(f"n{i}", 20, 20) for i in range(5)}
    for its in extra.values():
        its[3]["prompt"] = rows["one_test"][7]["prompt"]
    [found] = [text for text in faults(write) if text.startswith("one: 1 of")]
    assert "occur in n0's, n1's, n2's and 2 more datasets' train (" in found


def test_one_label(files):
    """The original's PIQA_test.json: every label is [A]."""
    rows, write = files
    rows["three_test"] = [{**r, "response": "[A]"} for r in rows["three_test"]]
    assert faults(write) == [
        "three: every one of 20 test answers is '[A]': to answer always the same scores 1.00"
    ]
    rows["three_test"][0]["response"] = "[B]"
    assert faults(write) == []
    suite = load_suite(write())
    assert "19 of 20 test answers are '[A]'" in hygiene.report(suite, findings(suite))


def test_duplicates_and_contradictions(files):
    rows, write = files
    rows["one_train"] += [rows["one_train"][3], {**rows["one_train"][5], "response": "[D]"}]
    found = faults(write)
    assert len(found) == 2
    assert found[0].startswith("one: 1 of 22 train examples are there before (") and found[
        0
    ].endswith("one_train.jsonl:21)")
    assert (
        found[1].startswith("one: 1 train prompts are there before with another answer (")
        and "one_train.jsonl:22" in found[1]
    )


def test_test_questions_in_train(files):
    """The same question, or the same with other choices (22 of OBQA's 500), in the own train file
    or in that of a trained task."""
    rows, write = files
    stem, listing = rows["three_test"][0]["prompt"].split("\n", 1)
    rows["three_train"][0]["prompt"] = f"{stem}\n{listing.replace('A: ', 'A: quite ')}"
    rows["two_train"][7]["prompt"] = rows["three_test"][4]["prompt"].upper().replace("?", " ?")
    rows["two_train"][8]["prompt"] = rows["one_test"][2]["prompt"]
    found = faults(write)
    assert [f.split(" (")[0] for f in found] == [
        "one: 1 of 20 test questions occur in two's train",
        "three: 1 of 20 test questions occur in three's train, 1 of them with other choices",
        "three: 1 of 20 test questions occur in two's train",
    ]
    assert found[2].endswith("three_test.jsonl:5)")
    rows["two_train"][8]["prompt"] = "something else"
    rows["three_train"][9]["prompt"] = rows["one_test"][2]["prompt"]  # of a task never trained on
    assert faults(write)[0].startswith("one: 1 of 20 test questions occur in three's train (")


def test_one_dataset_under_two_names(files):
    """The original's Math-IIO-68K-Mini and Math-Plus."""
    rows, write = files
    rows["two_train"] = rows["one_train"][::-1]
    assert (
        faults(write)[0] == "two: its train examples are those of one: one dataset under two names"
    )
    rows["two_train"] = rows["one_train"][:14] + clean_rows("other", 0, 4)
    assert faults(write)[0] == "two: shares 14 of 18 train prompts with one"


def test_labels_that_never_match(files):
    rows, write = files
    for row in rows["one_test"][:6]:
        row["response"] = f"[{'ABCD'.index(row['response'][1]) + 1}]"
    found = faults(write)
    assert found[0].startswith(
        "one: 6 test answers name none of their choices, such as '[1]' of A, B, C, D ("
    )
    assert found[1].startswith(
        "one: 6 of 20 test answers look like '[1]', but no train answer does (those look like "
        "'[A]')"
    )
    rows["one_test"] = clean_rows("one", 20, 20)
    rows["two_test"] = [{**r, "response": r["response"].strip("[]")} for r in rows["two_test"]]
    assert faults(write)[0].startswith(
        "two: 20 of 20 test answers look like 'A', but no train answer does"
    )


def test_numbers_and_names_are_no_labels(files):
    """Free answers may look as none before them did."""
    rows, write = files
    for key in ("one_train", "one_test"):
        rows[key] = [
            {"prompt": r["prompt"].split("\n")[0], "response": f"{i}"}
            for i, r in enumerate(rows[key])
        ]
    rows["one_test"][3]["response"] = "-7"
    assert faults(write) == []


def test_an_unseen_form_of_label(files):
    rows, write = files
    for key in ("three_train", "three_test"):
        rows[key] = [
            {"prompt": r["prompt"].split("\n")[0], "response": f"[{i % 2 == 0}]"}
            for i, r in enumerate(rows[key])
        ]
    assert faults(write) == [
        "three: 20 of 20 test answers look like '[True]', as none of any training dataset"
    ]


def test_parts_of_a_prompt():
    assert question("Why?\nA: iron\nB: wood") == question("why ?\n(A) gold\n(B) tin") == "why"
    # Nothing precedes the choices: all of it is the question.
    assert question("A. iron\nB. wood") == "a iron b wood"
    assert choices("Why?\n1. iron\n2. wood") == ["1", "2"] and choices(
        "Why?\nA: iron"
    ) == [] == choices("I: am")
    assert question("What is 3 + 4 ?") != question("What is 3 - 4 ?") and question(
        "Is x<y?"
    ) != question("Is x>y?")
    code = "def f(\n  x: int,\n  y: int):\n  return x"
    assert choices(code) == [] and question(code).endswith("return x")
    assert [shape(s) for s in ("[A]", "(b)", "[12]", "True", "YES", "no.")] == [
        "[X]",
        "(x)",
        "[0]",
        "Word",
        "WORD",
        "word.",
    ]


TEXTS = [
    "What is it?",
    "what  is IT",
    "whatis it",
    "3 + 4",
    "3+4",
    "3 - 4",
    "ſtop",
    "stop",
    "K",
    "k",
]
TEXTS += [
    "“Hi” there",
    "Hi there",
    "été",
    "Été!",
    "日本 語",
    "日本語",
    "",
    "!",
    "\0",
    "a\0b",
    "a b",
    "ﬁn",
    "fin",
]


@given(st.lists(st.sampled_from(TEXTS) | st.text("aA b+\0.é\n", max_size=6), max_size=30))
def test_alike_is_equality_of_normal_texts(texts):
    values, expected = alike(texts), [normal(text) for text in texts]
    for i in range(len(texts)):
        for j in range(i):
            assert (values[i] == values[j]) == (expected[i] == expected[j]), (texts[i], texts[j])


def test_a_suite_is_checked_once(files, capsys, tmp_path, monkeypatch):
    """Later stages print the faults that the first one kept, until the suite changes or moves."""
    rows, write = files
    rows["three_test"] = [{**r, "response": "[A]"} for r in rows["three_test"]]
    kept, calls, real = tmp_path / "w" / "suite_faults.json", [], hygiene.findings
    monkeypatch.setattr(hygiene, "findings", lambda suite: calls.append(suite.name) or real(suite))

    def said(suite) -> str:
        hygiene.check(suite, kept=kept)
        return capsys.readouterr().err

    first = said(load_suite(write()))
    assert "three: every one of 20 test answers" in first and calls == ["mine"]
    assert said(load_suite(write())) == first and len(calls) == 1
    with pytest.raises(InputError, match="three: every one of 20"):
        hygiene.check(load_suite(write()), strict=True, kept=kept)
    assert len(calls) == 1
    kept.write_text("[]")  # damaged: found anew
    assert said(load_suite(write())) == first and len(calls) == 2
    rows["three_test"][0]["response"] = "[B]"
    assert said(load_suite(write())) == "" and len(calls) == 3
    assert said(load_suite(write())) == "" and len(calls) == 3
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}_moved")
    assert said(load_suite(moved / "mine.json")) == "" and len(calls) == 4


def test_fingerprint_stays(tmp_path):
    """The one that runs of cfc09d1 recorded: sha256 over json.dumps of names and examples. Which
    prompts are wrong counts too, where the suite says it."""
    write_world(tmp_path, seed=3)
    description = json.loads((tmp_path / "suite.json").read_text())
    with_wrong = load_suite(tmp_path).fingerprint
    del description["wrong"]
    (tmp_path / "suite.json").write_text(json.dumps(description))
    suite = load_suite(tmp_path)
    names = [[d.name for d in its] for its in (suite.train, suite.unseen)]
    digest = hashlib.sha256(json.dumps([*names, suite.kinds]).encode())
    for part in (suite.corpus, *(its for d in suite.every for its in (d.train, d.test))):
        digest.update(json.dumps([(e.prompt, e.response, e.system) for e in part]).encode())
    assert with_wrong != suite.fingerprint == digest.hexdigest()


def test_strict_looks_through_the_data_once(files, monkeypatch):
    _, write = files
    suites, find = [], hygiene.findings
    monkeypatch.setattr(hygiene, "findings", lambda suite: suites.append(suite) or find(suite))
    main(["data-report", f"--suite={write()}", "--strict"])
    assert len(suites) == 1


def test_command_warns_reports_and_refuses(files, capsys, tmp_path):
    rows, write = files
    rows["three_test"] = [{**r, "response": "[A]"} for r in rows["three_test"]]
    suite = f"--suite={write()}"
    assert main(["data-report", suite]) == 0
    out, err = capsys.readouterr()
    assert (
        "three    unseen  20     20    1        100% '[A]'" in out
        and "faults: 1\n  three: every one" in out
        and err == ""
    )
    assert main(["data-report", suite, "--strict"]) == 2
    out, err = capsys.readouterr()
    assert "faults: 1" in out and err.startswith(
        "dnd: mine: faults in the data (--strict): three: every one of 20"
    )
    assert main(["quickstart", "--strict", suite, f"--workdir={tmp_path / 'w'}"]) == 2
    assert "three: every one of 20" in capsys.readouterr().err
    likely = ["--config.evaluate.answers=likelihood", "--config.condition.form=both"]
    rows["three_test"] = [
        {**r, "response": f"{i} {r['response']}"} for i, r in enumerate(rows["three_test"] * 2)
    ]
    rows["three_train"] = [{"prompt": r["prompt"]} for r in rows["three_train"]]
    write()
    assert main(["quickstart", suite, f"--workdir={tmp_path / 'w'}", likely[0]]) == 2
    assert "three: 40 different answers, so no labels to choose from" in capsys.readouterr().err
    assert main(["quickstart", suite, f"--workdir={tmp_path / 'w'}", likely[1]]) == 2
    assert (
        "three_train.jsonl:1: no response, which config.condition.form = 'both' reads"
        in capsys.readouterr().err
    )
    rows["three_test"] = [
        {"prompt": r["prompt"], "response": "[A]"} for r in clean_rows("three", 20, 20)
    ]
    write()
    # What it stops at is that there is no corpus.
    assert main(["pretrain", "--config=mini", suite, f"--workdir={tmp_path / 'w'}"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert (
        err[0].startswith("warning: three: every one")
        and "no corpus to pretrain a base on" in err[1]
    )
