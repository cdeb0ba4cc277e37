"""Answers from drafts against transformers' own greedy generation, of tiny models of many families,
and of models that cannot have them."""

import numpy as np
import peft
import pytest
import torch
import transformers
from small_models import fill

from dnd_jax.base import drafts
from dnd_jax.base.chat import until_end
from dnd_jax.base.drafts import Asked, Drafted, passes, tree_of
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.sequences import plain_pairs
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.data.sources import Example

VOCABULARY, NEW = 97, 9
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Mistral": {"sliding_window": 100},
    "Gemma": {},
    "Gemma2": {"sliding_window": 100},
    "Gemma3Text": {"sliding_window": 100},
    "Phi3": {},
    "Olmo2": {},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "Cohere": {},
}
# A window shorter than a row, no positions, a state, a bias by distance that reads the mask.
OTHERS = {
    "Mistral": {"sliding_window": 8},
    "Bloom": {"n_head": 4, "n_layer": 2},
    "Mamba": {},
    "Falcon": {"alibi": True, "ffn_hidden_size": 48, "head_dim": None},
}


def model_of(family: str, **settings) -> torch.nn.Module:
    torch.manual_seed(3)
    sizes = {key: value for key, value in (SIZES | settings).items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**sizes)
    return fill(transformers.AutoModelForCausalLM.from_config(config)).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of several lengths; most begin alike, two are the same, one is the beginning of another."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, VOCABULARY, n).tolist()
    template, shots, tail = draw(12), draw(7), draw(3)
    rows = [template + draw(n) + tail for n in (1, 9, 4, 4)]
    rows += [template + shots + draw(n) + tail for n in (2, 5)]
    return [*rows, rows[1], rows[2][:14], draw(3), draw(1)]


def generated(model, prompts, ends) -> list[list[int]]:
    """Row by row, up to and with the end."""
    found = []
    for row in prompts:
        out = model.generate(
            input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)),
            max_new_tokens=NEW, do_sample=False, eos_token_id=list(ends), pad_token_id=0,
        )  # fmt: skip
        found.append(out[0, len(row) :].tolist())
    return found


def ends_met(free) -> list[int]:
    """The two tokens that answers meet on their way at the most different places."""
    places = {}
    for row in free:
        for token in row:
            places.setdefault(token, set()).add(row.index(token))
    return sorted(places, key=lambda token: -len(places[token]))[:2]


def drafts_of(answers) -> list[list[int]]:
    """Right ones, wrong ones from some token on, one too long, one too short, and none."""
    found = []
    for i, row in enumerate(answers):
        wrong = row[: i // 2] + [(row[min(i // 2, len(row) - 1)] + 1) % VOCABULARY, 5]
        found.append((row, wrong, row + [7, 8], [], row[:-1])[i % 5])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_what_transformers_generates(family, prompts, monkeypatch):
    """In trees and batches of any size."""
    model = model_of(family, **FAMILIES[family])
    assert Drafted(model).is_exact((prompts[1] * 4)[:40])
    ends = ends_met(generated(model, prompts, [2]))
    expected = generated(model, prompts, ends)
    lengths = set(map(len, expected))
    assert len(lengths) > 1 and min(lengths) < NEW, lengths
    asked = list(map(Asked, prompts, drafts_of(expected)))
    for size, batch in ((512, 64), (30, 3), (1, 2)):
        monkeypatch.setitem(drafts.TREE, "cpu", size)
        assert Drafted(model, ends).answers(asked, NEW, batch) == expected
    cut = [row[:2] for row in expected]
    assert Drafted(model, ends).answers(asked, 2, 3) == cut


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_that_computes_them_otherwise_is_noticed(family, prompts):
    assert not Drafted(model_of(family, **OTHERS[family])).is_exact((prompts[1] * 4)[:40])


def test_few_logits_are_computed_to_try_a_model(prompts, monkeypatch):
    """Those of all tokens of a long prompt need gigabytes. Without room even for them it generates
    as it did."""
    model, sizes = model_of("Llama"), []
    forward = model.forward

    def counted(*args, **kwargs):
        out = forward(*args, **kwargs)
        sizes.append(out.logits.shape[1])
        return out

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(model, "forward", counted)
    assert Drafted(model).is_exact((prompts[1] * 9)[:120])
    assert len(sizes) == 4 and max(sizes) < 90, sizes
    monkeypatch.setattr(model, "forward", full)
    assert not Drafted(model).is_exact(prompts[1])


def test_a_tree_has_every_token_once():
    rows = [[1, 2], [1, 2, 3], [1, 2, 3], [1, 5], [7]]
    tree = tree_of(rows)
    assert tree.ids.tolist() == [1, 2, 3, 5, 7] and tree.depth.tolist() == [0, 1, 2, 1, 0]
    assert [tree.ids[way].tolist() for way in tree.ways] == rows
    assert tree.sees.sum(axis=1).tolist() == [1, 2, 3, 2, 1] and not tree.sees[3, 1]
    for limits, groups in (((5, 9), [5]), ((5, 2), [2, 2, 1]), ((3, 9), [3, 2]), ((1, 9), 5 * [1])):
        found = list(passes(rows[::-1], *limits))
        order = [rows[::-1][i] for group in found for i in group]
        assert order == sorted(rows)
        limited = [len(tree_of([rows[::-1][i] for i in group]).ids) for group in found]
        assert all(n <= limits[0] or len(g) == 1 for n, g in zip(limited, found, strict=True))
        assert list(map(len, found)) == groups, (limits, found)


QUESTIONS = [Example(f"what is {'really ' * (i % 3)}number {i % 7} ?", "yes") for i in range(11)]
SHOTS = [Example("what is it ?", "yes number"), Example("what ?", "no")]


def base_of(folder, family: str, **settings) -> TorchBase:
    """Of questions of these words, with a LoRA in folder/lora that changes its answers."""
    tokenizer = build_tokenizer([e.prompt for e in QUESTIONS], 300)
    model = model_of(family, vocab_size=len(tokenizer), **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "lora")
    return TorchBase(folder, 4, NEW)


def asked_with_right(base: TorchBase, ids) -> list[Example]:
    """The questions, every second with what the base answers as its expected answer."""
    texts = base.decode(ids)
    return [
        e._replace(response=text) if i % 2 and text == text.strip() else e
        for i, (e, text) in enumerate(zip(QUESTIONS, texts, strict=True))
    ]


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_base_answers_as_it_generates(tmp_path, family, adapter, monkeypatch):
    """With and without an adapter, answered examples before the questions, several ends."""
    base = base_of(tmp_path, family)
    base.use(tmp_path / "lora" if adapter else None)
    plain = lambda shots=(): base._generated(base.prompt_ids(QUESTIONS, shots), NEW)
    base.ends = (*base.ends, *ends_met(plain()))
    for shots in ((), SHOTS):
        expected = [until_end(row, base.ends) for row in plain(shots)]
        asked = asked_with_right(base, expected)
        assert base.answer_ids(asked, shots=shots) == expected
        assert len(set(map(len, expected))) > 1
    assert base._tried[1]


def test_right_answers_are_not_generated(tmp_path, monkeypatch):
    """And each of the tokens that they share is computed once."""
    base = base_of(tmp_path, "Llama")
    ends = {*base.ends, *(row[2] for row in base.answer_ids(QUESTIONS))}  # some answers end there
    base.ends = base.model.generation_config.eos_token_id = sorted(ends)
    found = base.answer_ids(QUESTIONS)
    asked = [
        e._replace(response=text) for e, text in zip(QUESTIONS, base.decode(found), strict=True)
    ]
    drafts = [draft for _, draft in plain_pairs(base.tokenizer, asked)]
    right = [i for i, row in enumerate(found) if len(row) < NEW and drafts[i] == row]
    assert right
    asked = [asked[i] for i in right]
    monkeypatch.setattr(Drafted, "_step", None)
    assert base.answer_ids(asked) == [found[i] for i in right]


def test_a_base_without_drafts_generates(tmp_path, monkeypatch):
    """Also where only a longer row than the tried ones has a window over its end."""
    base = base_of(tmp_path, "Mistral", sliding_window=30)
    for shots in ((), SHOTS):
        expected = base._generated(base.prompt_ids(QUESTIONS, shots), NEW)
        expected = [until_end(row, base.ends) for row in expected]
        assert base.answer_ids(asked_with_right(base, expected), shots=shots) == expected
        assert base._tried[1] == (not shots), base._tried
