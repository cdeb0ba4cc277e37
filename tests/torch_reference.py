"""Our own PyTorch reading of docs/METHOD.md section 2, independent of dnd_jax: LoRA tensors <->
weight tokens.

    tokens, tensors = tokenize(tensors, width), detokenize(tokens, shapes, width)

Letters: T tokens, r rank, w chunk width, s scale pair.
"""

import re

import torch

ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


def _sorted(keys) -> list[str]:
    """Keys of a LoRA in token order."""

    def place(key: str) -> tuple:
        return (
            int(re.search(r"layers\.(\d+)\.", key)[1]),
            ORDER.index(key.split(".")[-3]),
            key.split(".")[-2],
        )

    return sorted(keys, key=place)


def tokenize(tensors: dict, width: int, bfloat16: bool = False) -> torch.Tensor:
    """{"...layers.I...PROJ.lora_A.weight": (r, d_in), "...lora_B.weight": (d_out, r)} -> (T, r + 2,
    w + 2), NaN where padded."""
    tokens = []
    for key in _sorted(tensors):
        matrix = tensors[key].T if ".lora_B." in key else tensors[key]
        matrix = matrix.bfloat16().float() if bfloat16 else matrix.float()
        for chunk in matrix.split(width, dim=1):
            r = len(chunk)
            std = torch.std(chunk) if chunk.numel() > 1 else torch.tensor(float("nan"))
            std = torch.nan_to_num(std, nan=1.0)
            s = torch.stack([8 * chunk.mean(), torch.log(0.9 * std + 0.1) + 1.6])
            token = torch.full((r + 2, width + 2), float("nan"))
            token[:r, : chunk.shape[1]] = (chunk - chunk.mean()) / std
            token[r:, 0::2], token[r:, 1::2] = s[0], s[1]
            token[:, width:] = s
            tokens.append(token)
    return torch.stack(tokens)


def detokenize(tokens: torch.Tensor, shapes: dict, width: int) -> dict:
    """The inverse of `tokenize` for matrices of these shapes. An odd width reads the rows only up
    to the last two columns, which break their pattern."""
    tensors, first = {}, 0
    for key in _sorted(shapes):
        rows, columns = shapes[key] if ".lora_A." in key else shapes[key][::-1]
        count = -(-columns // width)
        chunks = []
        for token in tokens[first : first + count].float():
            scale_rows = token[rows:] if width % 2 == 0 else token[rows:, :width]
            from_rows = torch.stack([scale_rows[:, 0::2].mean(), scale_rows[:, 1::2].mean()])
            from_columns = token[:, width:].mean(dim=0)
            s = from_columns if width == 1 else (from_rows + from_columns) / 2
            mean, std = s[0] / 8, (torch.exp(s[1] - 1.6) - 0.1) / 0.9
            chunks.append(token[:rows, :width] * std.clamp(min=0) + mean)
        matrix = torch.cat(chunks, dim=1)[:, :columns]
        tensors[key] = (matrix if ".lora_A." in key else matrix.T).contiguous()
        first += count
    return tensors
