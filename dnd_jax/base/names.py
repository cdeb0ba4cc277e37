"""Hugging Face's tensor names of every architecture, as tables of (theirs, ours, transposed):
theirs is (out, in), ours (in, out). `layers/3/a/b` of ours is layer 3's part of the parameter
`layers/a/b`, which is stacked.

Each table comes with a function of all stored names -> {stored name: name in the table}, without
the tensors that are not used.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence

from dnd_jax.base.architecture import LmConfig

Table = Sequence[tuple[str, str, bool]]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What old exporters store, and nobody reads.
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
# Parts of names -> the program that puts them there.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "pretrained_model.": "TRL",
    "language_model.": "a vision-language model",
    "module.": "DistributedDataParallel or DeepSpeed",
}


def part_of(ours: str) -> tuple[str, int | None]:
    """(the parameter, its layer) of one of our paths in a table; None: all of it."""
    match = re.fullmatch(r"layers/(\d+)/(.+)", ours)
    return (f"layers/{match[2]}", int(match[1])) if match else (ours, None)


def affine(theirs: str, ours: str, norm: bool = False) -> Table:
    """Weight and bias of a linear layer or a LayerNorm."""
    return [
        (f"{theirs}.weight", f"{ours}/{'scale' if norm else 'kernel'}", not norm),
        (f"{theirs}.bias", f"{ours}/bias", False),
    ]


def lm_table(config: LmConfig, layers: int | None = None) -> Table:
    """A decoder-only LM's. With `layers`, those of its embeddings and first blocks alone."""
    biased = {p: config.qkv_bias for p in "qkv"} | {"o": config.o_bias}
    block = []
    for p, bias in biased.items():
        block += affine(f"self_attn.{p}_proj", f"{p}_proj/dense")[: 1 + bias]
    for p in ("up", "gate", "down"):
        block += affine(f"mlp.{p}_proj", f"{p}_proj/dense")[: 1 + config.mlp_bias]
    norms = ["input_layernorm", "post_attention_layernorm"]
    block += [(f"{norm}.weight", f"{norm}/scale", False) for norm in norms]
    if config.qk_norm:
        block += [
            (f"self_attn.{norm}.weight", f"{norm}/scale", False) for norm in ("q_norm", "k_norm")
        ]

    table = [(EMBEDDINGS, "embed_tokens/embedding", False)]
    for i in range(config.num_hidden_layers if layers is None else layers):
        table += [
            (f"model.layers.{i}.{theirs}", f"layers/{i}/{ours}", transposed)
            for theirs, ours, transposed in block
        ]
    if layers in (None, config.num_hidden_layers):
        table.append(("model.norm.weight", "norm/scale", False))
    if layers is None and not config.tie_word_embeddings:
        table.append((HEAD, "lm_head/kernel", True))
    return table


def by_prefix(stored: str, wanted: Collection[str], prefix: str) -> str:
    """A stored name as transformers takes it: without the prefix of the whole model, or with it,
    where the model has such a tensor; else as it is."""
    bare, whole = stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"
    if bare != stored and bare in wanted:
        return bare
    return whole if whole in wanted else stored


def lm_names(stored: Collection[str], config: LmConfig) -> dict[str, str]:
    """Of a decoder-only LM, whether its head is tied or not. A tied one may be stored as its head
    alone."""
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    wanted = {theirs for theirs, _, _ in lm_table(untied)}
    names = {
        name: by_prefix(name, wanted, "model") for name in stored if not name.endswith(BUFFERS)
    }
    if config.tie_word_embeddings and EMBEDDINGS not in names.values():
        return {name: EMBEDDINGS if to == HEAD else to for name, to in names.items()}
    return names


def wrapped_by(unknown: Collection[str], wanted: Collection[str]) -> str:
    """What the names of unknown tensors say of the program that wrapped the model; empty where they
    would not be the wanted ones without it."""
    found = {}
    for name in unknown:
        bare = name
        for mark, who in WRAPPERS.items():
            if mark in bare:
                bare, found[mark] = bare.replace(mark, ""), who
        if not {bare, f"model.{bare}"} & set(wanted):
            return ""
    return " and ".join(f"{who} ({mark})" for mark, who in found.items())
