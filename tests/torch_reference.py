"""Our own PyTorch reading of METHOD.md, independent of dnd_jax: decoder, loss, weight tokens; opponent of tests and benchmarks.

    generator = Generator(features, kernel_size)           # state dict names of METHOD.md section 5
    tokens = generator(condition)                          # (B, N, L, C) -> (B, T, h, w)
    loss = weighted_loss(tokens, target, generator.criterion_weight)
    tokens, tensors = tokenize(tensors, width), detokenize(tokens, shapes, width)

Letters: B batch, N prompts, L text length, C channels, T tokens, k kernel size, r rank, w chunk width, s scale pair.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


class TwoPaths(nn.Module):
    """(B, N, L, C) -> (B, N, L', C'): steps 1 to 4 of a stage."""

    def __init__(self, length: int, c: int, length_out: int, c_out: int, k: int):
        super().__init__()

        def conv(size_in: int, size_out: int) -> nn.Conv2d:
            return nn.Conv2d(size_in, size_out, k, padding=k // 2, bias=False)

        self.norm = nn.LayerNorm((length, c), eps=1e-5)
        self.conv1w, self.conv1h = conv(c, c_out), conv(length, length_out)
        self.conv2h, self.conv2w = conv(length, length_out), conv(c, c_out)
        bound = 1 / (length_out * c_out)
        self.bias = nn.Parameter(torch.empty(length_out, c_out).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        width_first = self.conv1w(x.permute(0, 3, 2, 1))  # (B, C, L, N) -> (B, C', L, N)
        width_first = self.conv1h(width_first.permute(0, 2, 3, 1))  # (B, L, N, C') -> (B, L', N, C')
        height_first = self.conv2h(x.permute(0, 2, 1, 3))  # (B, L, N, C) -> (B, L', N, C)
        height_first = self.conv2w(height_first.permute(0, 3, 1, 2))  # (B, C, L', N) -> (B, C', L', N)
        height_first = torch.tanh(height_first)
        return (width_first.permute(0, 2, 1, 3) + height_first.permute(0, 3, 2, 1) + self.bias) / 3


class Stage(nn.Module):
    """(B, N, L, C) -> (B, N', L', C')."""

    def __init__(self, features_in: tuple, features_out: tuple, k: int):
        super().__init__()
        self.linear1 = TwoPaths(*features_in[1:], *features_out[1:], k)
        self.linear2 = nn.Conv2d(features_in[0], features_out[0], k, padding=k // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear2(self.linear1(x))
        return x + y if x.shape == y.shape else y


class Decoder(nn.Module):
    """features: (N, L, C) of the condition and of every stage's output; the last is the token grid (T, h, w)."""

    def __init__(self, features: list, k: int):
        super().__init__()
        pairs = zip(features[:-1], features[1:], strict=True)
        self.module_list = nn.ModuleList(Stage(tuple(a), tuple(b), k) for a, b in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.module_list:
            x = stage(x)
        return x


class Generator(nn.Module):
    """The decoder under the original's names, with the optional length projection of METHOD.md section 4."""

    def __init__(self, features: list, kernel_size: int, length_projection: str | None = None, max_text_length: int | None = None):
        super().__init__()
        self.length_projection = length_projection
        self.model = nn.Module()
        self.model.decoder = Decoder(features, kernel_size)
        self.register_buffer("criterion_weight", torch.ones(1, features[-1][0], 1, 1))
        if length_projection:
            self.down_proj = nn.Linear(max_text_length, features[0][1])
            self.gate_proj = nn.Linear(features[0][1], features[0][1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, length, c = x.shape
        if self.length_projection == "camera_ready":
            x = self.gate_proj(F.silu(self.down_proj(x.transpose(2, 3)))).transpose(2, 3)
        elif self.length_projection == "first_release":
            x = self.gate_proj(self.down_proj(x.reshape(b, n, c, length))).reshape(b, n, -1, c)
        return self.model.decoder(x)


def weighted_loss(output: torch.Tensor, target: torch.Tensor, criterion_weight: torch.Tensor) -> torch.Tensor:
    """Mean over the cells where the target is a number of weight[token] * (output - target)^2."""
    mask = ~target.isnan()
    weight = criterion_weight.reshape(-1, 1, 1).expand_as(output)
    return (weight[mask] * (output.float()[mask] - target[mask]) ** 2).mean()


def _sorted(keys) -> list[str]:
    """Keys of a LoRA in token order."""

    def place(key: str) -> tuple:
        return int(re.search(r"layers\.(\d+)\.", key)[1]), ORDER.index(key.split(".")[-3]), key.split(".")[-2]

    return sorted(keys, key=place)


def tokenize(tensors: dict, width: int, bfloat16: bool = False) -> torch.Tensor:
    """{"...layers.I...PROJ.lora_A.weight": (r, d_in), "...lora_B.weight": (d_out, r)} -> (T, r + 2, w + 2), NaN where padded."""
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
    """The inverse of `tokenize` for matrices of these shapes. An odd width reads the rows only up to the last two columns,
    which break their pattern."""
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
