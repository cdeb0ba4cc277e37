"""Hugging Face's tensor names of every architecture, as tables of (theirs, ours, transposed):
theirs is (out, in), ours (in, out).

Each table comes with a function stored name -> name in the table, None for tensors that we do not
use.
"""

from collections.abc import Sequence

from dnd_jax.base.architecture import LmConfig

Table = Sequence[tuple[str, str, bool]]


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

    table = [("model.embed_tokens.weight", "embed_tokens/embedding", False)]
    for i in range(config.num_hidden_layers if layers is None else layers):
        table += [
            (f"model.layers.{i}.{theirs}", f"layers_{i}/{ours}", transposed)
            for theirs, ours, transposed in block
        ]
    if layers in (None, config.num_hidden_layers):
        table.append(("model.norm.weight", "norm/scale", False))
    if layers is None and not config.tie_word_embeddings:
        table.append(("lm_head.weight", "lm_head/kernel", True))
    return table


def lm_name(stored: str) -> str | None:
    """Old exporters store rotary frequencies; models saved without a head have no prefix."""
    if stored.endswith("rotary_emb.inv_freq"):
        return None
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"
