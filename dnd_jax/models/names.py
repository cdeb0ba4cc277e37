"""Hugging Face's tensor names of every architecture, as tables of (theirs, ours, transposed): theirs is (out, in), ours (in, out).

Each table comes with a function stored name -> name in the table, None for tensors that we do not use.
"""

from collections.abc import Sequence

from dnd_jax.models.base_lm import LmConfig

Table = Sequence[tuple[str, str, bool]]


def _affine(theirs: str, ours: str, norm: bool = False) -> Table:
    """Weight and bias of a linear layer or a LayerNorm."""
    return [(f"{theirs}.weight", f"{ours}/{'scale' if norm else 'kernel'}", not norm), (f"{theirs}.bias", f"{ours}/bias", False)]


def lm_table(config: LmConfig, layers: int | None = None) -> Table:
    """A decoder-only LM's. With `layers`, those of its embeddings and first blocks alone."""
    biased = {p: config.qkv_bias for p in "qkv"} | {"o": config.o_bias}
    block = []
    for p, bias in biased.items():
        block += _affine(f"self_attn.{p}_proj", f"{p}_proj/dense")[: 1 + bias]
    for p in ("up", "gate", "down"):
        block += _affine(f"mlp.{p}_proj", f"{p}_proj/dense")[: 1 + config.mlp_bias]
    norms = ["input_layernorm", "post_attention_layernorm"]
    block += [(f"{norm}.weight", f"{norm}/scale", False) for norm in norms]
    if config.qk_norm:
        block += [(f"self_attn.{norm}.weight", f"{norm}/scale", False) for norm in ("q_norm", "k_norm")]

    table = [("model.embed_tokens.weight", "embed_tokens/embedding", False)]
    for i in range(config.num_hidden_layers if layers is None else layers):
        table += [(f"model.layers.{i}.{theirs}", f"layers_{i}/{ours}", transposed) for theirs, ours, transposed in block]
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


def bert_table(layers: int) -> Table:
    """BERT's encoder."""
    table = [
        ("embeddings.word_embeddings.weight", "word_embeddings/embedding", False),
        ("embeddings.position_embeddings.weight", "position_embeddings", False),
        ("embeddings.token_type_embeddings.weight", "token_type_embeddings", False),
        *_affine("embeddings.LayerNorm", "norm", norm=True),
    ]
    for i in range(layers):
        for theirs, ours, norm in (
            ("attention.self.query", "query", False),
            ("attention.self.key", "key", False),
            ("attention.self.value", "value", False),
            ("attention.output.dense", "attention_output", False),
            ("attention.output.LayerNorm", "attention_norm", True),
            ("intermediate.dense", "intermediate", False),
            ("output.dense", "output", False),
            ("output.LayerNorm", "output_norm", True),
        ):
            table += _affine(f"encoder.layer.{i}.{theirs}", f"layer_{i}/{ours}", norm)
    return table


def bert_name(stored: str) -> str | None:
    """Pooler and heads are not used; the first BERTs call a LayerNorm's parameters gamma and beta."""
    name = stored.removeprefix("bert.")
    if name.startswith(("pooler.", "cls.")) or name.endswith("position_ids"):
        return None
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def t5_table(layers: int, gated: bool) -> Table:
    """T5's encoder; its first block holds the position bias of all."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    table = [
        ("shared.weight", "word_embeddings/embedding", False),
        (f"{attention}.relative_attention_bias.weight", "relative_bias", False),
        ("encoder.final_layer_norm.weight", "norm/scale", False),
    ]
    attend = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}
    feed = ({"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}) | {"wo": "down"}
    for i in range(layers):
        theirs, ours = f"encoder.block.{i}.layer", f"layer_{i}"
        table += [(f"{theirs}.0.SelfAttention.{a}.weight", f"{ours}/{b}/kernel", True) for a, b in attend.items()]
        table += [(f"{theirs}.1.DenseReluDense.{a}.weight", f"{ours}/{b}/kernel", True) for a, b in feed.items()]
        table.append((f"{theirs}.0.layer_norm.weight", f"{ours}/attention_norm/scale", False))
        table.append((f"{theirs}.1.layer_norm.weight", f"{ours}/output_norm/scale", False))
    return table


def t5_name(stored: str) -> str | None:
    """Decoder and head are not used; the encoder's own table of embeddings is the shared one."""
    if stored.startswith(("decoder.", "lm_head.")):
        return None
    return "shared.weight" if stored == "encoder.embed_tokens.weight" else stored
