"""The tokens that end an answer: folders as they are met, against transformers' own generation with
each folder's own settings."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
import transformers
from small_models import random_qwen2

from dnd_jax.base.chat import ends_of, render, until_end
from dnd_jax.base.folder import load_base, load_tokenizer
from dnd_jax.base.greedy import make_greedy, pad_left
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset
from dnd_jax.scoring.answers import Scorer
from dnd_jax.scoring.lm_eval import score
from dnd_jax.scoring.lm_eval_tasks import Wanted, load_tasks, write_task

NEW = 8  # tokens of an answer
QUESTIONS = [Example(f"what is {'really ' * (i % 3)}number {i} ?", "yes") for i in range(8)]
END_OF_TURN = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}TURN{% else %}{{ '\\n' }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> pathlib.Path:
    """A base whose template and settings name no end but <end>, which it never says."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = build_tokenizer([e.prompt for e in QUESTIONS], 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    random_qwen2(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said(plain) -> list[list[int]]:
    """What it says when nothing ends it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(plain).eval()
    return generated(model, load_tokenizer(plain), eos_token_id=None)


@pytest.fixture(scope="module")
def met(said) -> list[int]:
    """Two tokens that its answers meet on their way."""
    counts = np.bincount(np.array(said)[:, 1:7].ravel())
    return [int(i) for i in np.argsort(-counts)[:2]]


def generated(model, tokenizer, **settings) -> list[list[int]]:
    """transformers' own answers, question by question."""
    rows = []
    for e in QUESTIONS:
        ids = tokenizer(render(tokenizer, e.prompt), add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **settings,
            )
        rows.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return rows


def change(file: pathlib.Path, **keys) -> None:
    """Sets keys of a JSON file, which may not be there yet; those given None go."""
    raw = json.loads(file.read_text()) if file.is_file() else {}
    raw |= keys
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def made_special(tokenizer, token: int) -> str:
    """One of the tokenizer's own tokens, from now on a special one."""
    text = tokenizer.convert_ids_to_tokens(token)
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    assert tokenizer.convert_tokens_to_ids(text) == token
    return text


def variant(plain: pathlib.Path, root: pathlib.Path, kind: str, met: list[int]) -> pathlib.Path:
    """A copy of the base in which `kind` says where its ends are named."""
    folder = shutil.copytree(plain, root / "base")
    one, two = met
    generation, config = folder / "generation_config.json", folder / "config.json"
    tokenizer = load_tokenizer(folder)
    if kind == "a list in generation_config.json":
        change(generation, eos_token_id=[2, one, two])
    elif kind == "one in generation_config.json, not the tokenizer's":
        change(generation, eos_token_id=one)
    elif kind == "config.json alone":
        generation.unlink(missing_ok=True)
        change(config, eos_token_id=[one, one])
    elif kind == "config.json, the other file names none":
        change(generation, eos_token_id=None, pad_token_id=0)
        change(config, eos_token_id=two)
    elif kind == "the tokenizer alone":
        change(generation, eos_token_id=None)
        tokenizer.eos_token = made_special(tokenizer, one)
        tokenizer.save_pretrained(folder)
    elif kind == "an end that pads":
        tokenizer.pad_token = tokenizer.eos_token = made_special(tokenizer, one)
        tokenizer.save_pretrained(folder)
        change(generation, eos_token_id=[one, two], pad_token_id=one)
    elif kind == "the template's end of turn":
        tokenizer.chat_template = END_OF_TURN.replace("TURN", made_special(tokenizer, one))
        tokenizer.save_pretrained(folder)
    else:
        raise AssertionError(kind)
    return folder


ONE, BOTH = (0,), (0, 1)
KINDS = {  # which of the two tokens end an answer
    "a list in generation_config.json": BOTH,
    "one in generation_config.json, not the tokenizer's": ONE,
    "config.json alone": ONE,
    "config.json, the other file names none": (1,),
    "the tokenizer alone": ONE,
    "an end that pads": BOTH,
    "the template's end of turn": ONE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_where_transformers_ends_them(plain, said, met, tmp_path, kind):
    folder = variant(plain, tmp_path, kind, met)
    tokenizer = load_tokenizer(folder)
    ends = {tokenizer.eos_token_id, *(met[i] for i in KINDS[kind])}
    ends |= {2} if kind.startswith("a list") else set()
    expected = [until_end(row, ends) for row in said]
    assert len({len(row) for row in expected}) > 2 and min(map(len, expected)) < NEW
    base = TorchBase(folder, 4, NEW)
    assert set(base.ends) == ends and base.answer_ids(QUESTIONS) == expected
    own = transformers.GenerationConfig.from_pretrained  # what the folder itself makes of it
    named = [
        name for name in ("generation_config.json", "config.json") if (folder / name).is_file()
    ]
    base.model.generation_config = own(folder, config_file_name=named[0])
    if base.model.generation_config.eos_token_id is not None:
        theirs = generated(base.model, tokenizer)
        assert [until_end(row, ends) for row in theirs] == expected


@pytest.mark.parametrize("kind", ["a list in generation_config.json", "an end that pads"])
def test_jax_and_the_harness_end_them_there_too(plain, said, met, tmp_path, kind):
    """In padded batches; the harness gives our scores."""
    folder = variant(plain, tmp_path, kind, met)
    base = TorchBase(folder, 4, NEW)
    expected = [until_end(row, base.ends) for row in said]
    module, params = load_base(folder)
    ids, valid = pad_left(base.prompt_ids(QUESTIONS), base.tokenizer.pad_token_id)
    ours = make_greedy(module, NEW)(params, {}, 1.0, ids, valid, np.array(base.ends))
    assert [until_end(row, base.ends) for row in np.asarray(ours).tolist()] == expected

    texts = base.decode(expected)
    right = [t.strip() or "nothing" if i % 2 else "wrong" for i, t in enumerate(texts)]
    asked = [e._replace(response=r) for e, r in zip(QUESTIONS, right, strict=True)]
    raw = load_file("tests/tiny.py")
    raw.evaluate.max_new_tokens = NEW
    dataset = Dataset("mine", (), tuple(asked))
    write_task(tmp_path, dataset, base.tokenizer, base.ends, freeze(raw))
    tasks = load_tasks([Wanted("mine", "")], tmp_path, unsafe_code=False)
    _, values = score(base, tasks, {"mine"}, 4, 0, False)["mine"]
    assert values == Scorer(right).each(texts)["exact"] and 0 < sum(values) < len(values)


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("2", "names '2'"),
        ([2, "<end>"], "names '<end>'"),
        (True, "names True"),
        (1.5, "names 1.5"),
        (-1, "names -1"),
        ([0, 100000], r"names 100000, which is no token of the model \(0 to \d+\)"),
        ({"a": 1}, "names {'a': 1}"),
    ],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_what_is_no_token_is_refused_by_name(plain, tmp_path, name, named, why):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / file, tmp_path)
    change(tmp_path / name, eos_token_id=named)
    with pytest.raises(InputError, match=f"{name}: eos_token_id .* {why}"):
        ends_of(tmp_path, load_tokenizer(plain))


def test_an_answer_cut_off_has_met_no_end():
    assert until_end([5, 6, 7], (8, 9)) == [5, 6, 7]
    assert until_end([5, 9, 8], (8, 9)) == [5] and until_end([8], (8,)) == []


@pytest.mark.parametrize("how", ["split_special_tokens", "single_word"])
def test_an_end_that_the_tokenizer_reads_as_plain_text(plain, tmp_path, how):
    """Its last letter would end every answer."""
    shutil.copy(plain / "config.json", tmp_path)
    tokenizer = load_tokenizer(plain)
    if how == "single_word":
        token = transformers.AddedToken("<stop>", special=True, single_word=True)
        tokenizer.add_tokens([token])
        tokenizer.chat_template = END_OF_TURN.replace("TURN", "<stop>")
    tokenizer.save_pretrained(tmp_path)
    change(tmp_path / "config.json", vocab_size=len(tokenizer))
    if how == "split_special_tokens":
        change(tmp_path / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(InputError, match=r"the end in .Markananswer<\w+>. as plain text"):
        ends_of(tmp_path, load_tokenizer(tmp_path))
