"""The tokenizer and the chat template of a base that is pretrained here; a given base brings its
own."""

import json
from collections.abc import Iterable

import tokenizers

from dnd_jax.core import packages

transformers = packages.deferred("transformers")
VERSION = 2  # of what is below: texts become other tokens by another; 1 put a space at every piece
# A space follows every role, so that a word has one before it wherever it stands in a line, and is
# the same tokens there.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
ROLES = ("<system>", "<user>", "<assistant>")


def build_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer of Qwen2's own class, trained on `texts`: at most vocab_size
    tokens, the 256 bytes included.

    It decodes what it encoded, whatever the text, to Unicode's composed form (NFC).
    """
    backend = transformers.Qwen2Tokenizer(**SPECIAL)._tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((f" {text}" for text in texts), trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        extra_special_tokens=list(ROLES),
        **SPECIAL,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
