"""Sizes that ship with the package: the paper's token counts, the files they stand for, and that
nothing asks a hub for them."""

import json

import pytest

from dnd_jax.base import known
from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.known import KNOWN, TEXT_PARTS, base_sizes
from dnd_jax.config.load import load_file, shipped
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.generator.sizes import layout_of

# docs/SETTINGS.md.
TOKENS = {
    "qwen2_5_0_5b_commonsense": (4296, 10, 130),
    "qwen2_5_1_5b_code": (4508, 18, 258),
    "qwen2_5_1_5b_math": (4508, 18, 258),
    "qwen2_5_7b_code": (4928, 18, 514),
    "qwen2_5_7b_math": (4928, 18, 514),
    "qwen2_5_vl_3b_math": (7308, 18, 258),
}
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Whoever asks the hub fails."""

    def asked(name, *_, **__):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)


def test_the_papers_settings_are_all_here():
    """Beside them those whose generators learn from answers, of the same sizes."""
    found = {name for name in shipped() if name.startswith("qwen")}
    assert set(TOKENS) == {name for name in found if not name.endswith("_answers")}
    for name in found - set(TOKENS):
        of_weights = freeze(load_file(name.removesuffix("_answers")))
        of_answers = freeze(load_file(name))
        assert layout_of(of_answers) == layout_of(of_weights)
        assert of_answers.generator == of_weights.generator
        assert of_answers.train.taught == ("answers",) != of_weights.train.taught


@pytest.mark.parametrize("name", TOKENS)
def test_token_counts_of_the_paper(name):
    layout = layout_of(freeze(load_file(name)))
    assert (layout.num_tokens, *layout.token_shape) == TOKENS[name]


def test_the_hubs_fields_of_smollm2():
    lm = base_sizes(SMOL)
    assert lm.head_width == 64 and lm.projections()["self_attn.k_proj"] == (576, 192)
    count = lm.vocab_size * 576 + 30 * (
        sum(d_in * d_out for d_in, d_out in lm.projections().values()) + 2 * 576
    )
    assert count + 576 == 134_515_008  # parameters by its card on the hub: 134.5M


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_base_is_what_its_own_file_would_be_read_as(name, tmp_path):
    """The table against the reader of config.json, for the fields that a file has."""
    lm = KNOWN[name]
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings max_position_embeddings "
        "model_type"
    )
    raw = {field: getattr(lm, field) for field in fields.split()}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_base_config(tmp_path) == lm


def test_it_is_said_once_and_a_local_folder_of_that_name_wins(tmp_path, monkeypatch, capsys):
    known._say.cache_clear()
    base_sizes(SMOL)
    base_sizes(SMOL)
    assert capsys.readouterr().out == (
        f"{SMOL}: its sizes are those that come with dnd_jax; the hub was not asked\n"
    )
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / SMOL
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match="config.json: no such file"):
        base_sizes(SMOL)


def test_a_text_part_counts_tokens_but_names_no_modules():
    (name,) = TEXT_PARTS
    assert base_sizes(name, text_part=True).num_hidden_layers == 36
    with pytest.raises((AssertionError, InputError), match="hub"):
        base_sizes(name)
