"""The embedded suites: what a prompt tells of its task, and what none of them tells."""

import collections
import json

import pytest

from dnd_jax.data import skills, skills_wordings, world
from dnd_jax.data.composed import HELD_PHRASES, TRAIN_PHRASES
from dnd_jax.data.questions import normal
from dnd_jax.data.report import findings
from dnd_jax.data.skills_large import EVERY, write_skills_large
from dnd_jax.data.suite import load_suite

WRITERS = {"world": world.write_world, "skills": skills.write_skills}
MORE = skills_wordings.OPERATIONS, skills_wordings.FORMS
KINDS = ["halves", "halves_reworded", "combination", "paraphrase"]


@pytest.fixture(scope="module", params=WRITERS)
def suite(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites") / request.param
    WRITERS[request.param](folder, 3)
    return load_suite(folder, 8)


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def parts(name: str) -> str:
    return name.removesuffix("_reworded").removesuffix("_halves")


def test_no_test_question_stands_in_any_train_file(suite):
    taught = {e.prompt for dataset in suite.every for e in dataset.train}
    asked = {e.prompt for dataset in suite.every for e in dataset.test}
    assert taught and asked and not taught & asked


def test_enough_questions(suite):
    for dataset in suite.every:
        prompts = [e.prompt for e in dataset.test]
        assert len(set(prompts)) == len(prompts) >= 48, dataset.name
        assert len({e.prompt for e in dataset.train}) == len(dataset.train) >= 64


def test_kinds(suite):
    by_kind = collections.defaultdict(set)
    for name, kind in suite.kinds.items():
        by_kind[kind].add(parts(name))
    trained = {dataset.name for dataset in suite.train}
    assert list(by_kind)[:4] == KINDS
    for kind, known in zip(KINDS, (False, True, False, True), strict=True):
        assert all((name in trained) == known for name in by_kind[kind]), kind
    assert by_kind["halves"] == by_kind["combination"]
    assert by_kind["halves_reworded"] == by_kind["paraphrase"]


def test_no_prompt_of_halves_tells_the_task(suite):
    """Each of its prompts is asked, with other answers, by other tasks of the suite or could be: it
    shows the one part or the other."""
    unsaid = {
        "world": (world.NO_SOURCE, world.NO_CUE),
        "skills": (skills.NO_OPERATION, skills.NO_FORM),
    }[suite.name.split("-")[0]]
    for dataset in suite.every:
        shown = [sum(text in e.prompt for text in unsaid) for e in dataset.train + dataset.test]
        halves = suite.kinds.get(dataset.name, "") in KINDS[:2]
        if dataset in suite.train:
            assert set(shown) == {0, 1} and 0.6 < sum(shown) / len(shown) < 0.7
        else:
            assert set(shown) == {1 if halves else 0}, dataset.name
        if halves:
            each = [sum(text in e.prompt for e in dataset.train) for text in unsaid]
            assert each[0] == each[1]


def test_wrong_prompts_are_of_another_operation_and_form(suite):
    forms = skills.FORMS | skills.NEW_FORMS if suite.name.startswith("skills") else world.FORMS
    assert set(suite.wrong) == {dataset.name for dataset in suite.unseen}
    for name, other in suite.wrong.items():
        one, two = (
            next((parts(n)[: -len(f) - 1], f) for f in forms if parts(n).endswith(f"_{f}"))
            for n in (name, other)
        )
        assert one[0] != two[0] and one[1] != two[1], (name, other)
        assert suite.kinds[name].startswith("halves") == suite.kinds[other].startswith("halves")


def test_held_phrases_are_in_reworded_tasks_alone(suite):
    if suite.name.startswith("world"):
        lists = [*world.SOURCES.values(), *world.CUES.values()]
    else:
        every = [*skills.OPERATIONS.values(), *skills.FORMS.values()]
        lists = [item.wordings for item in every]
    assert all(len(set(x)) == len(x) == TRAIN_PHRASES + HELD_PHRASES for x in lists)
    held = {phrase for x in lists for phrase in x[TRAIN_PHRASES:]}
    usual = {phrase for x in lists for phrase in x[:TRAIN_PHRASES]}
    for dataset in suite.every:
        reworded = dataset.name.endswith("_reworded")
        for e in dataset.train + dataset.test:
            assert not any(phrase in e.prompt for phrase in (usual if reworded else held)), e


def test_operations_and_forms_say_what_they_do(tmp_path):
    words = "mouse", "box", "leaf"
    made = {name: op.of(*words) for name, op in (skills.OPERATIONS | skills.NEW_OPERATIONS).items()}
    assert made == {
        "first": "mouse",
        "second": "box",
        "last": "leaf",
        "ends": "mouse leaf",
        "opening": "mouse box",
        "closing": "box leaf",
        "plural_first": "mice",
        "plural_last": "leaves",
        "initial_first": "m",
        "initial_last": "l",
        "plural_second": "boxes",
        "initial_second": "b",
    }
    answers = {form.answer.format(x="cat") for form in (skills.FORMS | skills.NEW_FORMS).values()}
    assert len(answers) == len(skills.FORMS | skills.NEW_FORMS)


def test_no_wording_says_two_things():
    """Of whatever parts, held or not: else a held one would be known, or a prompt tell nothing."""
    parts = [skills.OPERATIONS, skills.NEW_OPERATIONS, skills.FORMS, skills.NEW_FORMS]
    wordings = [text for table in parts for part in table.values() for text in part.wordings]
    wordings += [text for table in MORE for more in table.values() for text in lines(more)]
    phrases = sum([*world.SOURCES.values(), *world.CUES.values()], [])
    for texts in (wordings, phrases):
        assert len(set(map(normal, texts))) == len(texts)


def test_every_part_has_as_many_wordings_more():
    assert [[*of] for of in MORE] == [[*skills.OPERATIONS], [*skills.FORMS]]
    assert {len(lines(more)) for of in MORE for more in of.values()} == {7}


def test_words_have_one_plural_each():
    assert len(skills.PLURALS) == len(set(skills.PLURALS.values())) > 150
    assert not set(skills.PLURALS) & set(skills.PLURALS.values())
    assert all(
        word.isalpha() and word.islower() for pair in skills.PLURALS.items() for word in pair
    )
    for word, ending in (("bus", "es"), ("cherry", "ies"), ("key", "s"), ("knife", "ves")):
        assert skills.PLURALS[word].endswith(ending)


def test_the_suite_file_is_complete(suite):
    described = json.loads((suite.root / "suite.json").read_text())
    names = {path.name for path in (suite.root / "datasets").iterdir()}
    assert set(described["train"]) | set(described["unseen"]) == names


def test_the_large_form_has_the_same_unseen_tasks(tmp_path, monkeypatch):
    """And others on a domain of their own; no pair that stays apart in one domain is together in
    another; nothing is left to one LoRA by a question that stands in a train file."""
    monkeypatch.setattr(skills, "ROWS", {"train": 36, "test": 12})
    for name, write in (("small", skills.write_skills), ("large", write_skills_large)):
        write(tmp_path / name, 0)
    small, large = (load_suite(tmp_path / name) for name in ("small", "large"))
    assert len(large.train) > 300 and not [f for f in findings(large) if f.fault]
    asked_of = {d.name: [e[:3] for e in d.train + d.test] for d in large.every}
    for dataset in small.unseen:
        assert asked_of[dataset.name] == [e[:3] for e in dataset.train + dataset.test]
    for dataset in small.train:  # the same in more wordings
        here, there = dataset.train + dataset.test, asked_of[dataset.name]
        assert [(e[0].splitlines()[1:], e[1]) for e in there] == [
            (e.prompt.splitlines()[1:], e.response) for e in here
        ]
    said = {e.prompt.splitlines()[0] for d in large.train for e in d.train}
    kept = {e.prompt.splitlines()[0] for d in small.every for e in d.train}
    more = [wording for of in MORE for wording in sum(map(lines, of.values()), [])]
    assert not any(wording in text for text in kept for wording in more)
    assert sum(any(wording in text for text in said) for wording in more) > len(more) / 2
    assert {*large.kinds.items()} > {*small.kinds.items()}
    new = [name for name, kind in large.kinds.items() if kind == "domain"]
    assert len(new) == 4 and all(name.startswith("countries_") for name in new)
    apart = {parts(name) for name, kind in small.kinds.items() if kind == "halves"}
    trained = {d.name for d in large.train}
    assert not trained & {f"{domain}_{name}" for domain in EVERY for name in apart}
    asked = [e.prompt for d in large.every if d.name == "cities_ends_twice" for e in d.train]
    assert any("city" in text or "cities" in text for text in asked)
    assert not any(" word" in text for text in asked)


def test_items_of_a_domain_are_different():
    for domain in EVERY.values():
        assert len(set(domain.items)) == len(domain.items) >= 40


@pytest.mark.parametrize("most", [1, 2, 0])
def test_tasks_of_each_kind(tmp_path, most):
    """As many as were asked for; a wrong one differs in both parts, from training if need be."""
    for name, write in WRITERS.items():
        write(tmp_path / name, 0, most)
        description = json.loads((tmp_path / name / "suite.json").read_text())
        count = collections.Counter(description["kinds"].values())
        assert all(n == most for n in count.values()) if most else min(count.values()) >= 2
        assert set(description["wrong"]) == set(description["unseen"])
        for task, wrong in description["wrong"].items():
            ours, theirs = (parts(n).rpartition("_")[::2] for n in (task, wrong))
            assert ours[0] != theirs[0] and ours[1] != theirs[1], (task, wrong)
