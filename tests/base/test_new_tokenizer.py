"""The tokenizer of a base that is pretrained here decodes what it encoded."""

import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest

from dnd_jax.base.chat import answer_text, render
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.data import world as world_suite
from dnd_jax.data.suite import load_suite


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "suite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_suite, "CORPUS_LINES", 500)
        world_suite.write_world(root)
    return load_suite(root)


@pytest.fixture(scope="module")
def tokenizer(world, tmp_path_factory):
    """As transformers reads it again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (f"{e.prompt} {e.response}" for e in world.corpus)
    build_tokenizer(texts, 512).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return load_tokenizer(folder)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_text_of_the_embedded_suite(world, tokenizer):
    examples = [e for d in world.every for split in (d.train, d.test) for e in split]
    texts = sorted({text for e in examples for text in (e.prompt, e.response)})
    assert len(texts) > 1000
    assert tokenizer.batch_decode([ids_of(tokenizer, text) for text in texts]) == texts
    for e in examples[::500]:
        whole = render(tokenizer, e.prompt) + answer_text(tokenizer, e.response)
        assert tokenizer.decode(ids_of(tokenizer, whole)) == whole


def test_a_word_is_the_same_tokens_wherever_it_stands(tokenizer):
    """At the beginning of a prompt, of an answer, of a system text, and inside them."""
    (word,) = ids_of(tokenizer, " what")
    prompt = render(tokenizer, "what is what", "what")
    assert ids_of(tokenizer, prompt + answer_text(tokenizer, "what what")).count(word) == 5


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.example("<end>x <user>  y\n\n\tz ")
@hypothesis.example("e\u0301 \u1100\u1161\u11a8 \x00\u200b\U0001f600")
def test_any_text(tokenizer, text):
    """In Unicode's composed form, which Qwen2's class brings every text to."""
    assert tokenizer.decode(ids_of(tokenizer, text)) == unicodedata.normalize("NFC", text)
