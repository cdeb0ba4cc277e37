"""Questions as a base sees them: chat templates of the usual kinds against transformers' own
rendering; condition forms."""

import json

import jax
import numpy as np
import pytest
from pipeline import tiny_suite

from dnd_jax.base.architecture import BaseLM, sizes_to_pretrain
from dnd_jax.base.chat import render
from dnd_jax.base.folder import load_base, load_tokenizer
from dnd_jax.base.loss import answer_loss
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.pretrain import pretrain
from dnd_jax.base.sequences import encode, encode_packed
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import load_suite

# The usual kinds, cut down: ChatML with a system text of its own (Qwen2.5), one that can think
# (Qwen3), a begin token and headers (Llama 3), no system role and another name for the assistant
# (Gemma).
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "thinking": CHATML.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ),
    "llama": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | "
    "trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role "
    "not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ "
    "m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
}
EXAMPLES = [
    Example("What is iron?\nA: metal\nB: wood", "[A]", "Answer by a letter."),
    Example("Why?", "[B]"),
]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """kind of template (or None) -> a small tokenizer of Qwen's class with it, read from its
    folder."""
    texts = [f"{e.system} {e.prompt} {e.response}" for e in EXAMPLES]

    def make(kind):
        tokenizer = build_tokenizer(texts, 300)
        special = ["<|im_start|>", "<|im_end|>", "<begin>"]
        tokenizer.add_special_tokens(
            {
                "bos_token": "<begin>",
                "eos_token": "<|im_end|>",
                "additional_special_tokens": special,
            }
        )
        tokenizer.chat_template = TEMPLATES.get(kind)
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "qwen2"}')
        return load_tokenizer(folder)

    return make


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_base_is_trained_on_its_own_template(tokenizer_of, kind):
    """Ids up to the answer are transformers' own, and with the answer and its end token a beginning
    of the whole conversation."""
    tokenizer = tokenizer_of(kind)
    data = encode(tokenizer, EXAMPLES, 200)
    for i, e in enumerate(EXAMPLES):
        messages = [{"role": "user", "content": e.prompt}]
        if e.system and kind == "gemma":
            messages[0]["content"] = f"{e.system}\n\n{e.prompt}"
        elif e.system:
            messages.insert(0, {"role": "system", "content": e.system})
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
        row = data.ids[i, : data.end[i]].tolist()
        assert row[: data.start[i]] == asked, kind
        answer = tokenizer(e.response, add_special_tokens=False)["input_ids"]
        assert row[data.start[i] :] == [*answer, tokenizer.eos_token_id]
        if kind != "thinking":  # whose whole conversations leave the empty thought out
            whole = tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": e.response}], tokenize=False
            )
            assert whole.startswith(
                render(tokenizer, e.prompt, e.system) + e.response + tokenizer.eos_token
            )
    if kind == "thinking":
        assert render(tokenizer, "Why?").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    if kind == "chatml":
        assert render(tokenizer, "Why?").startswith(
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWhy?"
        )


@pytest.mark.parametrize("system", ["", "Answer by a letter."])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_turns_before_a_question_are_those_of_transformers(tokenizer_of, kind, system):
    tokenizer = tokenizer_of(kind)
    before = [("One?", "[A]"), ("Two?", "[B]")]
    shown = render(tokenizer, "Three?", system, before)
    first = f"{system}\n\nOne?" if system and kind == "gemma" else "One?"
    messages = [{"role": "system", "content": system}] * bool(system and kind != "gemma")
    for asked, said in ((first, "[A]"), ("Two?", "[B]")):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages.append({"role": "user", "content": "Three?"})
    assert shown == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def test_turns_before_a_question_without_a_template(tokenizer_of):
    """As the base was taught: prompt, answer, its end."""
    tokenizer = tokenizer_of(None)
    shown = render(tokenizer, "Two?", "Help.", [("One?", "[A]")])
    assert shown == f"Help.\nOne?\n[A]{tokenizer.eos_token}Two?\n"


def test_a_template_that_leaves_turns_out_is_refused(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ messages[-1].content }}:"
    assert render(tokenizer, "Two?") == "Two?:"
    with pytest.raises(InputError, match="the chat template changes the turn before 'One\\?'"):
        render(tokenizer, "Two?", "", [("One?", "[A]")])


def test_a_base_without_a_template(tokenizer_of):
    """Plain lines; the begin token only where the tokenizer itself sets one."""
    tokenizer = tokenizer_of(None)
    assert [render(tokenizer, e.prompt, e.system) for e in EXAMPLES] == [
        "Answer by a letter.\nWhat is iron?\nA: metal\nB: wood\n",
        "Why?\n",
    ]
    from tokenizers import processors

    begin = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<begin> $A", special_tokens=[("<begin>", begin)]
    )
    assert (
        tokenizer("Why?\n")["input_ids"]
        == encode(tokenizer, EXAMPLES[1:], 99)
        .ids[0, : encode(tokenizer, EXAMPLES[1:], 99).start[0]]
        .tolist()
    )
    assert render(tokenizer, "Why?") == "<begin>Why?\n"


def test_a_tokenizer_without_pad_or_end(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("llama")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "qwen2"}')
    read = load_tokenizer(tmp_path / "llama")
    assert read.pad_token_id == read.eos_token_id is not None
    data = encode(read, EXAMPLES, 200)
    assert (data.batch([0, 1], data.response_width)["labels"] >= 0).sum(axis=1).tolist() == (
        data.end - data.start
    ).tolist()
    read.eos_token = read.chat_template = None
    with pytest.raises(InputError, match="llama: its tokenizer has no eos_token"):
        encode(read, EXAMPLES, 200)


def test_condition_forms():
    examples = [Example(f"p{i}", f"r{i}", "system", f"file:{i}") for i in range(400)]
    assert condition_texts(examples, "prompt")[:2] == ["p0", "p1"]
    assert condition_texts(examples, "response")[:2] == ["r0", "r1"]
    assert condition_texts(examples, "both")[:2] == ["p0\nanswer: r0", "p1\nanswer: r1"]
    mixed = condition_texts(examples, "mix", 1)
    assert mixed == condition_texts(examples, "mix", 1) != condition_texts(examples, "mix", 2)
    kept = [
        text
        for text, both in zip(mixed, condition_texts(examples, "both"), strict=True)
        if text == both
    ]
    assert all(text in (f"p{i}", f"p{i}\nanswer: r{i}") for i, text in enumerate(mixed))
    assert 50 < len(kept) < 110  # a fifth of 400, give or take four standard deviations
    with pytest.raises(
        InputError, match="file:7: no response, which config.condition.form = 'mix' reads"
    ):
        condition_texts([*examples[:7], Example("p", "", where="file:7")], "mix")
    assert condition_texts([Example("p", "")], "prompt") == ["p"]


def test_texts_in_full_rows(tokenizer_of):
    """Packed, every token of every text is learned once, in order; a question without an answer
    ends where that would start."""
    tokenizer = tokenizer_of(None)
    examples = [*EXAMPLES, Example("How much?", "")]
    data = encode(tokenizer, examples, 200)
    texts = [
        tokenizer(render(tokenizer, e.prompt, e.system), add_special_tokens=False)["input_ids"]
        for e in examples
    ]
    assert data.ids[2, : data.end[2]].tolist() == texts[2] and data.start[2] == data.end[2]
    assert max(data.end) > 9  # longer than a row, and not left out for that
    stream = np.concatenate([row[:end] for row, end in zip(data.ids, data.end, strict=True)])
    packed = encode_packed(tokenizer, examples, 9)
    assert len(packed) == len(stream) // 9 > 2
    np.testing.assert_array_equal(packed.ids.ravel(), stream[: packed.ids.size])
    batch = packed.batch(np.arange(len(packed)), packed.response_width)
    np.testing.assert_array_equal(batch["labels"], packed.ids[:, 1:])
    np.testing.assert_array_equal(batch["at"], np.broadcast_to(np.arange(8), (len(packed), 8)))
    with pytest.raises(InputError, match="fewer than base.max_length=500"):
        encode_packed(tokenizer, examples, 500)


def test_what_is_too_long_is_skipped_cut_or_refused(tokenizer_of):
    """A cut prompt loses its beginning alone: system text, template and answer stay whole."""
    tokenizer, room = tokenizer_of(None), 60
    long = Example(
        f"{'It is told that rain is wet. ' * 40}Why is iron hard?", "[B]", "Be brief.", "f:3"
    )
    hopeless = Example("Why?", "[B] " * 200, "", "f:4")
    examples = [*EXAMPLES, long, hopeless]
    with pytest.raises(InputError, match=r"^f:3: \d+ tokens .* more than base.max_length=60"):
        encode(tokenizer, examples, room)
    whole, skipped = encode(tokenizer, EXAMPLES, room), encode(tokenizer, examples, room, "skip")
    np.testing.assert_array_equal(skipped.ids, whole.ids)
    assert (skipped.skipped, skipped.cut, whole.lost("x", room)) == (2, 0, "")
    assert skipped.lost("a's train", room) == (
        "a's train: 2 of 4 examples have more than base.max_length=60 tokens: 2 skipped"
    )

    data = encode(tokenizer, examples, room, "cut")
    assert (len(data), data.skipped, data.cut) == (3, 1, 1)

    def packed(text: str) -> str:  # this tokenizer puts a space before each piece
        return text.replace(" ", "")

    text = packed(tokenizer.decode(data.ids[2, : data.end[2]]))
    answer = f"[B]{tokenizer.eos_token}"
    before, after = map(packed, render(tokenizer, "PROMPT", long.system).split("PROMPT"))
    assert text.startswith(before) and text.endswith(f"{after}{answer}")
    assert packed(tokenizer.decode(data.ids[2, data.start[2] : data.end[2]])) == answer
    kept = text.removeprefix(before).removesuffix(f"{after}{answer}")
    assert packed(long.prompt).endswith(kept) and len(kept) > len("Whyisironhard?")
    assert room - 3 <= data.end[2] <= room
    with pytest.raises(InputError, match="f:4: all 1 examples have more than base.max_length=60"):
        encode(tokenizer, [hopeless], room, "cut")


def test_a_batch_is_as_long_as_its_longest_row_needs(tokenizer_of):
    """One long question costs its own batch alone; the loss is that of rows padded to it."""
    tokenizer = tokenizer_of(None)
    data = encode(tokenizer, [*EXAMPLES, Example("Why? " * 200, "[B]")], 2000)
    assert data.ids.shape[1] > 256
    short, long = data.batch(np.array([0, 1]), 6), data.batch(np.array([1, 2]), 6)
    assert short["ids"].shape[1] <= 64 and long["ids"].shape[1] == data.ids.shape[1]
    module = BaseLM(sizes_to_pretrain(freeze(load_file("tests/tiny.py")).base, len(tokenizer)))
    params = module.init(jax.random.key(0), short["ids"])["params"]
    whole = short | {"ids": data.ids[:2]}
    np.testing.assert_allclose(
        answer_loss(module, params, short), answer_loss(module, params, whole), rtol=1e-5
    )


@pytest.mark.slow
def test_a_base_from_questions_alone(tmp_path, capsys):
    """Two sources without responses: the whole text is learned, however long; answers, which there
    are none of, are not."""
    root = tiny_suite(tmp_path / "suite")
    suite = json.loads((root / "suite.json").read_text())
    lines = (root / "corpus.jsonl").read_text().splitlines()
    lines.append(json.dumps({"prompt": "Why is iron hard? " * 100}))  # beyond base.max_length
    for name, part in (("one", lines[:90]), ("two", lines[90:])):
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": json.loads(line)["prompt"]}) + "\n" for line in part)
        )
    (root / "suite.json").write_text(
        json.dumps(suite | {"corpus": ["one.jsonl", {"source": "two.jsonl"}]})
    )
    suite = load_suite(root)
    assert len(suite.corpus) == len(lines)
    raw = load_file("tests/tiny.py")
    with pytest.raises(
        InputError, match=r"one.jsonl:1: no response to learn; .*config.pretrain.loss=text"
    ):
        pretrain(freeze(raw), suite, tmp_path / "run")
    raw.pretrain.update(loss="text", steps=40)
    config = freeze(raw)
    folder = pretrain(config, suite, tmp_path / "run")
    assert "skipped" not in capsys.readouterr().out
    module, params = load_base(folder)
    texts = encode_packed(load_tokenizer(folder), suite.corpus, 64)
    loss, _ = answer_loss(module, params, texts.batch(np.arange(len(texts)), texts.response_width))
    assert float(loss) < 0.6 * np.log(module.config.vocab_size)
