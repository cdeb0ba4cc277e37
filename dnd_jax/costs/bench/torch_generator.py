"""Our own PyTorch reading of docs/METHOD.md section 5, independent of the rest of dnd_jax: opponent
of tests and benchmarks.

    generator = Generator(features, kernel_size)           # its state dict has the original's names
    tokens = generator(condition)                          # (B, N, L, C) -> (B, T, h, w)
    loss = weighted_loss(tokens, target, generator.criterion_weight)

Letters: B batch, N prompts, L text length, C channels, T tokens, k kernel size.
"""

import torch
import torch.nn.functional as F
from torch import nn


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
        # (B, L, N, C') -> (B, L', N, C')
        width_first = self.conv1h(width_first.permute(0, 2, 3, 1))
        height_first = self.conv2h(x.permute(0, 2, 1, 3))  # (B, L, N, C) -> (B, L', N, C)
        # (B, C, L', N) -> (B, C', L', N)
        height_first = self.conv2w(height_first.permute(0, 3, 1, 2))
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
    """features: (N, L, C) of the condition and of every stage's output; the last is the token grid
    (T, h, w)."""

    def __init__(self, features: list, k: int):
        super().__init__()
        pairs = zip(features[:-1], features[1:], strict=True)
        self.module_list = nn.ModuleList(Stage(tuple(a), tuple(b), k) for a, b in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.module_list:
            x = stage(x)
        return x


class Generator(nn.Module):
    """The decoder under the original's names, with the optional length projection of docs/METHOD.md
    section 4."""

    def __init__(
        self,
        features: list,
        kernel_size: int,
        length_projection: str | None = None,
        max_text_length: int | None = None,
    ):
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


def weighted_loss(
    output: torch.Tensor, target: torch.Tensor, criterion_weight: torch.Tensor
) -> torch.Tensor:
    """Mean over the cells where the target is a number of weight[token] * (output - target)^2."""
    mask = ~target.isnan()
    weight = criterion_weight.reshape(-1, 1, 1).expand_as(output)
    return (weight[mask] * (output.float()[mask] - target[mask]) ** 2).mean()
