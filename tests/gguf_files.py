"""Small GGUF files as llama.cpp's converter writes them, of transformers models with random
weights; written with the package gguf."""

import pathlib

import gguf
import numpy as np
import tokenizers
import torch
from small_models import fill
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
MISTRAL = {"mistral": (MistralConfig, MistralForCausalLM)}  # which llama.cpp calls a llama
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHOLE = "xyz"  # a token that no merges make
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "i n", "e r"]
NAMES = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
]
# Kinds of quantisation, one after the other over a file's matrices.
MIXED = ("Q8_0", "Q4_0", "Q4_1", "F16", "F32", "BF16", "Q5_0")


def tokens_of(rows: int) -> tuple[list[str], list[int]]:
    """A vocabulary of so many rows: special tokens first, the bytes, what the merges make, unused
    ones at the end."""
    special = {
        "<|endoftext|>": CONTROL,
        "<|im_start|>": CONTROL,
        "<|im_end|>": CONTROL,
        "<think>": USER_DEFINED,
    }
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(merge.replace(" ", "") for merge in MERGES), WHOLE]
    tokens, kinds = [*special, *words], [*special.values(), *[1] * len(words)]
    spare = rows - len(tokens)
    return tokens + [f"[PAD{i}]" for i in range(spare)], kinds + [UNUSED] * spare


def sentencepiece(rows: int) -> dict:
    """The keys of a SentencePiece vocabulary, as Llama 2 has one: words of it are in no way made by
    the best of their parts alone."""
    special = {"<unk>": 2, "<s>": CONTROL, "</s>": CONTROL}
    special |= {f"<0x{byte:02X}>": 6 for byte in range(256)}
    words = ("\u2581t", "he", "\u2581the", "in", "er", "her", "re", "\u2581\u2581", "aa", "aaa")
    words += tuple("\u2581theinra12")
    tokens = [*special, *dict.fromkeys(words)]
    kinds = [*special.values(), *[1] * (len(tokens) - len(special))]
    scores = [0.0] * len(special) + [-float(i) for i in range(len(tokens) - len(special))]
    spare = rows - len(tokens)
    return {
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.tokens": ("array", tokens + [f"[PAD{i}]" for i in range(spare)]),
        "tokenizer.ggml.token_type": ("array", kinds + [UNUSED] * spare),
        "tokenizer.ggml.scores": ("array", scores + [-1000.0] * spare),
        "tokenizer.ggml.padding_token_id": ("uint32", 2),
    }


def model_of(kind: str, **changes):
    """A transformers model of two layers, every tensor random."""
    torch.manual_seed(1)
    config, cls = (CLASSES | MISTRAL)[kind]
    sizes = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    if kind == "qwen3":
        sizes["head_dim"] = 128  # transformers' own reader knows no other
    return fill(cls(config(**sizes | changes)).eval())


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of query or key heads in the order that llama.cpp has a llama's in."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: pathlib.Path,
    kind: str = "llama",
    model=None,
    types: tuple[str, ...] = MIXED,
    keys: dict | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> pathlib.Path:
    """keys: {key: (the writer's method, value)} beside those of the model, in their place; without:
    keys or tensors to leave out; extra: more tensors."""
    model = model or model_of(kind)
    c, arch = model.config, architecture or kind
    tokens, kinds = tokens_of(c.vocab_size)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    own = {
        "block_count": ("uint32", c.num_hidden_layers),
        "context_length": ("uint32", c.max_position_embeddings),
        "embedding_length": ("uint32", c.hidden_size),
        "feed_forward_length": ("uint32", c.intermediate_size),
        "attention.head_count": ("uint32", c.num_attention_heads),
        "attention.head_count_kv": ("uint32", c.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": ("float32", c.rms_norm_eps),
        "rope.freq_base": ("float32", c.rope_parameters["rope_theta"]),
        "rope.dimension_count": ("uint32", head),
    }
    if kind == "qwen3":
        own |= {f"attention.{part}_length": ("uint32", head) for part in ("key", "value")}
    every = {f"{arch}.{key}": value for key, value in own.items()} | {
        "general.name": ("string", "Tiny"),
        "general.file_type": ("uint32", 3),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "qwen2" if kind.startswith("qwen") else "smollm"),
        "tokenizer.ggml.tokens": ("array", tokens),
        "tokenizer.ggml.token_type": ("array", kinds),
        "tokenizer.ggml.merges": ("array", MERGES),
        "tokenizer.ggml.bos_token_id": ("uint32", 1),
        "tokenizer.ggml.eos_token_id": ("uint32", 2),
        "tokenizer.ggml.padding_token_id": ("uint32", 0),
        "tokenizer.ggml.add_bos_token": ("bool", False),
        "tokenizer.chat_template": ("string", TEMPLATE),
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, (method, value) in (every | (keys or {})).items():
        if key not in without:
            getattr(writer, f"add_{method}")(key, value)
    tensors = {gguf_name(k): v.numpy() for k, v in model.state_dict().items()}
    if c.tie_word_embeddings:
        tensors.pop("output.weight", None)
    matrices = 0
    for name, value in (tensors | (extra or {})).items():
        if name in without:
            continue
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            value = permuted(value, value.shape[0] // head)
        if value.ndim == 1:
            writer.add_tensor(name, value.astype(np.float32))
            continue
        of = gguf.GGMLQuantizationType[types[matrices % len(types)]]
        matrices += 1
        data = gguf.quants.quantize(value.astype(np.float32), of)
        writer.add_tensor(name, data, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
