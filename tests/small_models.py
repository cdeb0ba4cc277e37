"""Small real models in the hub's format, with random weights: what the tests of whole formats
share."""

import pathlib

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.config.schema import Condition

WORDS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "where",
    "what",
    "who",
    "is",
    "the",
    "bird",
    "?",
)
VECTORS = "the 1 2 3\n, -1 0 0.5\nSea 4 5 6\nsea 7 8 9\n. . . 1e-2 0 0\nnaïve 0 1 0\nthe 9 9 9\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[END]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )


def write_encoder(folder: pathlib.Path, width: int = 8) -> pathlib.Path:
    """A BERT of one layer."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_qwen(
    folder: pathlib.Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes
) -> pathlib.Path:
    """A Qwen2 of two layers, hidden 16, key-value 8, intermediate 24: chunks of 8. shard: largest
    file of weights."""
    torch.manual_seed(5)
    words = build_tokenizer([" ".join(WORDS)], 300)
    settings = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    } | changes
    model = Qwen2ForCausalLM(Qwen2Config(**settings))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    words.save_pretrained(folder)
    return folder


def random_qwen2(vocab_size: int) -> Qwen2ForCausalLM:
    """Two layers whose answers depend on every token."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocab_size, **sizes, tie_word_embeddings=False)
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.3)
    return model


def write_vectors(folder: pathlib.Path) -> pathlib.Path:
    """A file of word vectors."""
    (folder / "vectors.txt").write_text(VECTORS, encoding="utf-8")
    return folder / "vectors.txt"


def condition_by(encoder: pathlib.Path, **changes) -> Condition:
    """The settings of a condition that this encoder makes, of 3 prompts of at most 9 tokens."""
    return Condition(
        **{
            "encoder": str(encoder),
            "layer": -1,
            "form": "prompt",
            "num_prompts": 3,
            "max_text_length": 9,
            "in_graph": False,
        }
        | changes
    )


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in every tensor: transformers starts norms at one and biases at zero, which
    would hide a mix-up."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def logits_of(model: torch.nn.Module, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """A causal LM's logits (B, L, vocabulary)."""
    with torch.inference_mode():
        return (
            model(
                input_ids=torch.from_numpy(ids).long(),
                attention_mask=torch.from_numpy(valid).long(),
            )
            .logits.float()
            .numpy()
        )
