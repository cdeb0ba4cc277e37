"""Scores of answers on small cases, and greedy decoding in JAX against transformers' own."""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import torch
from small_models import random_qwen2

from dnd_jax.base.chat import render, until_end
from dnd_jax.base.folder import load_base
from dnd_jax.base.greedy import make_greedy, pad_left
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, labels_of
from dnd_jax.scoring.answers import Scorer, words

RESPONSES = ["Capital: Paris.", "Capital: Rome.", "Capital: Oslo, not Bergen."]


def test_words_are_words_and_single_marks():
    assert words("Capital: New-York's 3.5!") == [
        "Capital",
        ":",
        "New",
        "-",
        "York",
        "'",
        "s",
        "3",
        ".",
        "5",
        "!",
    ]
    assert words(" \n") == []


@pytest.mark.parametrize(
    ("answers", "exact", "content", "shape"),
    [
        (RESPONSES, 1, 1, 1),
        # Spaces do not count.
        (["Capital:Paris .", " Capital : Rome.", "Capital: Oslo,not Bergen."], 1, 1, 1),
        (
            ["Capital: Rome.", "Capital: Paris.", "Capital: Lima, not Quito."],
            0,
            (0 + 0 + 1 / 4) * 4 / 4,
            1,
        ),
        (["Paris", "Rome", "Oslo"], 0, (1 + 1 + 1 / 4) / 3, 0),  # right words, wrong form
        (
            ["capital: Paris.", "Capital; Rome.", "Capital: Oslo not Bergen."],
            0,
            (1 + 1 + 3 / 4) / 3,
            0,
        ),
        (["", "", ""], 0, 0, 0),
        # Too long, too short.
        (["Capital: Paris. Capital: Paris.", "Capital: Rome", "."], 0, 2 / 3, 0),
    ],
)
def test_scores(answers, exact, content, shape):
    """Form: "Capital", ":" and "."; content: the names, and the third answer's "not" and comma."""
    scores = Scorer(RESPONSES)(answers)
    expected_content = content if content != (0 + 0 + 1 / 4) * 4 / 4 else (0 + 0 + 2 / 4) / 3
    assert scores == pytest.approx({"exact": exact, "content": expected_content, "format": shape})


def test_form_is_what_nearly_all_responses_share():
    shared = [f"It is {i}." for i in range(19)]
    assert Scorer([*shared, "She was 20!"]).form == {"It", "is", "."}  # 19 of 20
    assert Scorer([*shared[:-1], "He was 19!", "She was 20!"]).form == set()  # 18 of 20
    with pytest.raises(ValueError):
        Scorer(RESPONSES)(["Capital: Paris."])


def test_an_answer_without_content_counts_when_it_is_right():
    scorer = Scorer(["yes"] * 4)
    assert scorer(["yes", "yes", "no", "yes yes"]) == pytest.approx(
        {"exact": 0.5, "content": 0.5, "format": 0.5}
    )


def test_pad_left():
    ids, valid = pad_left([[5], [1, 2, 3]], pad=9)
    assert ids.tolist() == [[9, 9, 5], [1, 2, 3]] and valid.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert ids.dtype == valid.dtype == np.int32


def test_labels_of_a_dataset():
    train, test = ([Example("q", r) for r in responses] for responses in (["[B]", "[A]"], ["[C]"]))
    assert labels_of(Dataset("d", tuple(train), tuple(test))) == ["[A]", "[B]", "[C]"]
    # Of a pool without responses.
    assert labels_of(Dataset("d", (Example("q", ""),), tuple(test))) == ["[C]"]
    many = tuple(Example("q", f"{i}") for i in range(33))
    with pytest.raises(InputError, match="d: 33 different answers, so no labels to choose from"):
        labels_of(Dataset("d", many, many))


def test_the_likeliest_label_equals_transformers(tmp_path):
    """Labels of several lengths, one the beginning of another; each question scored by itself,
    without padding or cache."""
    labels = ["yes", "yes or no", "[A]", "True"]
    examples = [
        Example(f"question {'very ' * (i % 4)}number {i} ?", "yes", "short" if i % 3 else "")
        for i in range(9)
    ]
    tokenizer = build_tokenizer([f"{e.prompt} {label}" for e in examples for label in labels], 300)
    model = random_qwen2(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = TorchBase(tmp_path, batch_size=5, max_new_tokens=4)
    chosen = base.choose(examples, labels)
    expected = []
    for e in examples:
        prompt = tokenizer(render(tokenizer, e.prompt, e.system), add_special_tokens=False)[
            "input_ids"
        ]
        scores = []
        for label in labels:
            answer = [
                *tokenizer(f" {label}", add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + answer])).logits[0]
            at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            scores.append(
                float(
                    logits[at]
                    .log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
                    .sum()
                )
            )
        expected.append(labels[int(np.argmax(scores))])
    assert chosen == expected and len(set(expected)) > 1
    # One label longer than a question with any other, which then may be alone in a batch.
    labels = ["yes", "[A]", "no " * 60]
    at_once = TorchBase(tmp_path, batch_size=len(labels), max_new_tokens=4)
    one_by_one = TorchBase(tmp_path, batch_size=1, max_new_tokens=4)
    assert one_by_one.choose(examples[:3], labels) == at_once.choose(examples[:3], labels)


def test_generation_settings_of_the_base_do_not_bend_greedy_answers(tmp_path):
    """Qwen2.5-Instruct's folder has a repetition penalty, which transformers applies to greedy
    decoding as well."""
    examples = [Example(f"question {'very ' * (i % 4)}number {i} ?", "yes") for i in range(9)]
    tokenizer = build_tokenizer([e.prompt for e in examples], 300)
    model = random_qwen2(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = TorchBase(tmp_path, 5, 8)
    expected = plain.answer_ids(examples)
    settings = {
        "repetition_penalty": 1.5,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "eos_token_id": [1, 2],
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    base = TorchBase(tmp_path, 5, 8)
    assert base.answer_ids(examples) == expected and base.model.generation_config.eos_token_id == [
        1,
        2,
    ]
    plain.model.generation_config.repetition_penalty = 1.5
    bent = plain._generated(plain.prompt_ids(examples), 8)
    assert [until_end(row, plain.ends) for row in bent] != expected  # they would


def test_greedy_equals_transformers(tmp_path):
    """Prompts of several lengths in one batch; an end token that some rows reach and some do
    not."""
    model = random_qwen2(23)
    model.save_pretrained(tmp_path)
    module, params = load_base(tmp_path)
    rng = np.random.default_rng(0)
    pad, new = 0, 12
    ids, valid = pad_left([rng.integers(1, 23, n).tolist() for n in (1, 4, 9, 6, 2, 9, 3, 5)], pad)

    def theirs(end):
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.from_numpy(ids).long(),
                attention_mask=torch.from_numpy(valid).long(),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
                min_new_tokens=None,
            )[:, ids.shape[1] :].numpy()
        return np.pad(out, ((0, 0), (0, new - out.shape[1])), constant_values=end)

    free = theirs(22)
    end = int(np.bincount(free[:, 3:9].ravel()).argmax())  # one that rows meet on their way
    expected = theirs(end)
    lengths = [row.index(end) if end in row else new for row in expected.tolist()]
    assert len(set(lengths)) > 2 and min(lengths) < new, lengths
    ours = make_greedy(module, new)(params, {}, 1.0, ids, valid, np.array([end]))
    np.testing.assert_array_equal(ours, expected)

    # A LoRA reaches every step: the one whose B A cancels o_proj gives the answers of a model
    # without o_proj.
    name = "model.layers.1.self_attn.o_proj"
    weight = model.model.layers[1].self_attn.o_proj.weight.detach().numpy().copy()
    lora = {
        f"{name}.lora_A.weight": np.eye(32, dtype=np.float32),
        f"{name}.lora_B.weight": -weight / 4,
    }
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    changed = theirs(end)
    assert not np.array_equal(changed, expected)
    np.testing.assert_array_equal(
        make_greedy(module, new)(params, jax.device_put(lora), 4.0, ids, valid, np.array([end])),
        changed,
    )


def test_a_base_is_asked_in_the_type_and_on_the_device_that_are_given(tmp_path):
    """With an adapter, whose matrices stay float32; a device that is not there is named."""
    examples = [Example(f"question number {i} ?", "yes") for i in range(6)]
    tokenizer = build_tokenizer([e.prompt for e in examples], 300)
    model = random_qwen2(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    c = freeze(load_file("tests/tiny.py")).evaluate
    asked = dataclasses.replace(c, dtype="bfloat16", device="cpu")
    half, whole = (TorchBase.of(tmp_path / "base", settings) for settings in (asked, c))
    for base, dtype in ((half, torch.bfloat16), (whole, torch.float32)):
        base.use(tmp_path / "lora")
        kinds = {x.dtype for name, x in base.model.named_parameters() if "lora_" not in name}
        assert kinds == {dtype} and base.model.device.type == "cpu"
        assert {x.dtype for name, x in base.model.named_parameters() if "lora_" in name} == {
            torch.float32
        }
    rows = half.prompt_ids(examples)
    for ours, theirs in zip(half.logits(rows), whole.logits(rows), strict=True):
        np.testing.assert_allclose(ours[-1], theirs[-1], atol=0.05 * np.abs(theirs).max())
    assert len(half.answer_ids(examples)) == 6
    with pytest.raises(
        InputError, match=r"evaluate\.device = 'cuda:9': PyTorch has no such device"
    ):
        TorchBase.of(tmp_path / "base", dataclasses.replace(c, device="cuda:9"))
    raw = load_file("tests/tiny.py")
    raw.evaluate.device = "gpu"
    with pytest.raises(InputError, match=r"evaluate\.device = 'gpu' is no device of PyTorch"):
        freeze(raw)
