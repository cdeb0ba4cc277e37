"""`dnd ask`: the answers of a base without and with an adapter."""

import pytest
from pipeline import tiny_generator
from small_models import write_qwen

from dnd_jax.base.torch_base import TorchBase
from dnd_jax.data.sources import Example
from dnd_jax.generator.generate import generate_adapter
from dnd_jax.main import main

PROMPTS = [f"where is town {i} ?" for i in range(6)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a trained generator's workdir, a base that its adapters fit, a file of prompts)."""
    root = tmp_path_factory.mktemp("ask")
    run = tiny_generator(root / "run")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = write_qwen(root / "base", hidden_size=32, intermediate_size=64, **heads)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return run, base, root / "prompts.txt"


def asked(made, question: str, *more: str) -> int:
    run, base, prompts = made
    words = f"--generator={run}", f"--prompts={prompts}", f"--base={base}", "--max-tokens=5"
    return main(["ask", question, *words, *more])


def test_both_answers_are_the_models_own(made, tmp_path, capsys):
    run, base, prompts = made
    assert asked(made, "where is the bird ?", "--seed=3") == 0
    said = capsys.readouterr().out
    model, question = TorchBase(base, 1, 5), [Example("where is the bird ?", "")]
    answers = []
    for adapter in (None, generate_adapter(run, prompts, tmp_path / "a", seed=3)):
        model.use(adapter)
        answers.append(model.decode(model.answer_ids(question))[0].strip())
    assert said.split("\nbase\n")[1].split("\n\nadapter\n")[0] == answers[0]
    assert said.rstrip("\n").split("\nadapter\n")[1] == answers[1] != answers[0]
    assert "closest training tasks: " in said


@pytest.mark.parametrize(
    ("question", "more", "says"),
    [
        (" ", [], "QUESTION: is empty"),
        ("what ?", ["--max-tokens=0"], "--max-tokens"),
        ("what ?", ["--strength=0"], "--strength"),
        ("what ?", ["--prompts=nowhere.txt"], "nowhere.txt"),
        ("what ?", ["--base=nowhere"], "nowhere"),
    ],
)
def test_words_that_cannot_be(made, capsys, question, more, says):
    run, base, prompts = made
    given = {word.split("=")[0] for word in more}
    words = [f"--generator={run}", f"--prompts={prompts}", f"--base={base}"]
    words = [word for word in words if word.split("=")[0] not in given]
    assert main(["ask", question, *words, *more]) == 2
    assert says in capsys.readouterr().err


def test_the_question_is_needed(made, capsys):
    assert main(["ask", f"--generator={made[0]}"]) == 2
    assert "QUESTION is needed" in capsys.readouterr().err


def test_an_adapter_of_more_strength_does_more(made, capsys):
    """At a strength of next to nothing the adapter answers as the base does."""
    assert asked(made, "where is the bird ?", "--strength=1e-6") == 0
    said = capsys.readouterr().out
    base, adapter = said.split("\nbase\n")[1].rstrip("\n").split("\n\nadapter\n")
    assert base == adapter
