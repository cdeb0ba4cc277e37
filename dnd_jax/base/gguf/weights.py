"""A GGUF file's tensors -> Hugging Face's names and float32 values, in blocks of rows."""

from collections.abc import Iterator, Mapping

import numpy as np

from dnd_jax.base.gguf.config import ROPE_FACTORS
from dnd_jax.base.gguf.header import Gguf
from dnd_jax.core.errors import listed

BLOCK = 1 << 24  # values that are in memory at once
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TURNED = ("attn_q", "attn_k")  # of a llama
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
Shape = tuple[int, ...]


class GgufWeights:
    """The weights that a config.json names, in a file.

    Raises InputError that lists the tensors that are missing, unknown or of other shapes.
    """

    def __init__(self, file: Gguf, config: Mapping):
        self._file, self._head = file, config["head_dim"]
        self._table = table = _table(config)
        found = {name: tuple(map(int, t.shape[::-1])) for name, t in file.tensors.items()}
        faults = [f"tensor {name} is missing" for name in table.keys() - found.keys()]
        unknown = found.keys() - table.keys() - {ROPE_FACTORS}
        faults += [f"tensor {name} is not known here" for name in unknown]
        faults += [
            f"tensor {name} has shape {found[name]}, by the file's keys {shape}"
            for name, shape in table.items()
            if found.get(name, shape) != shape
        ]
        if faults:
            title = f"{file.path}: not a {file.architecture} as it is known here"
            raise listed(title, sorted(faults), most=5)

    def shapes(self) -> dict[str, tuple[Shape, np.dtype]]:
        """{Hugging Face's name: (shape, float32)}, in the order of `blocks`."""
        return {_name(name): (shape, np.dtype(np.float32)) for name, shape in self._table.items()}

    def blocks(self) -> Iterator[tuple[str, np.ndarray]]:
        """(Hugging Face's name, values) of all tensors, a matrix in blocks of rows. Raises
        InputError as `Gguf.values`."""
        for name, shape in self._table.items():
            rows = file_rows(self._file.architecture, name, shape[0], self._head)
            if len(shape) == 1:
                yield _name(name), self._file.values(name)[rows]
                continue
            step = max(1, BLOCK // shape[1])
            for first in range(0, shape[0], step):
                yield _name(name), self._file.values(name, rows[first : first + step])


def file_rows(architecture: str, name: str, count: int, head: int) -> np.ndarray:
    """Which row of a file's tensor (count rows) each of Hugging Face's rows is. llama.cpp rotates
    neighbours of a llama's head where transformers rotates its two halves, so its files have the
    rows of the halves in turn. head: channels of one."""
    rows = np.arange(count)
    if architecture == "llama" and name.startswith("blk.") and name.split(".")[2] in TURNED:
        return rows.reshape(-1, head // 2, 2).swapaxes(1, 2).reshape(-1)
    return rows


def _table(config: Mapping) -> dict[str, Shape]:
    """{GGUF's name: shape} of every tensor that a model has."""
    d, f, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    block: dict[str, Shape] = {
        "attn_norm.weight": (d,),
        "attn_q.weight": (q, d),
        "attn_k.weight": (kv, d),
        "attn_v.weight": (kv, d),
        "attn_output.weight": (d, q),
        "ffn_norm.weight": (d,),
        "ffn_gate.weight": (f, d),
        "ffn_up.weight": (f, d),
        "ffn_down.weight": (d, f),
    }
    if config["model_type"] == "qwen2" or config["attention_bias"]:
        block |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if config.get("attention_bias"):
        block["attn_output.bias"] = (d,)
    if config.get("mlp_bias"):
        block |= {"ffn_gate.bias": (f,), "ffn_up.bias": (f,), "ffn_down.bias": (d,)}
    if config["model_type"] == "qwen3":
        block |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
    table: dict[str, Shape] = {"token_embd.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        table |= {f"blk.{i}.{part}": shape for part, shape in block.items()}
    table["output_norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        table["output.weight"] = (config["vocab_size"], d)
    return table


def _name(name: str) -> str:
    """Hugging Face's name of a tensor."""
    *blk, part, kind = name.split(".")
    return f"model.layers.{blk[1]}.{PARTS[part]}.{kind}" if blk else f"{WHOLE[part]}.{kind}"
