"""The case "answers" of `dnd bench` in PyTorch: our decoder's reading there, a transformers model
whose projections add each task's LoRA, and gradients through it."""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dnd_jax.base.hub import resolve
from dnd_jax.config.schema import Config
from dnd_jax.costs.bench.answering import Work
from dnd_jax.costs.bench.case import Case
from dnd_jax.costs.bench.torch_generator import Generator
from dnd_jax.generator.sizes import spec_of
from dnd_jax.lora.targets import ElementTarget, Target


class Matrices:
    """Tokens (K, T, h, w) -> {a module's path: its (A (K, r, d_in), B (K, d_out, r))}."""

    def __init__(self, target: Target, device: torch.device):
        self._layout, self._element = target.layout, isinstance(target, ElementTarget)
        if self._element:
            self._mean = torch.tensor(target.mean, device=device)
            self._scale = torch.tensor(target.scale, device=device)[:, None, None]
        self._tokens = [torch.tensor(s.tokens, device=device) for s in self._layout.stacks]

    def __call__(self, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        chunks, sides = self._chunks(tokens), ({}, {})
        for stack, index in zip(self._layout.stacks, self._tokens, strict=True):
            rows = chunks[:, index].transpose(2, 3).flatten(3)  # (K, layers, r, n * w)
            rows = rows[..., : stack.shape[0 if stack.is_b else 1]]
            values = (rows.mT if stack.is_b else rows).unbind(1)
            for key, value in zip(stack.keys, values, strict=True):
                sides[stack.is_b][key.rsplit(".lora_", 1)[0]] = value
        return {name: (a, sides[1][name]) for name, a in sides[0].items()}

    def _chunks(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised tokens -> weights in chunks (K, T, r, w)."""
        if self._element:
            return tokens * self._scale + self._mean
        r, w = self._layout.chunk_shape
        whole = w + 2 if w % 2 == 0 else w - 1  # an odd width breaks the pattern at the corner
        pair = tokens[..., w:].mean(-2)
        if whole:
            pair = (pair + tokens[..., r:, :whole].unflatten(-1, (-1, 2)).mean((-3, -2))) / 2
        mean, std = pair[..., 0] / 8, (torch.exp(pair[..., 1] - 1.6) - 0.1) / 0.9
        return tokens[..., :r, :w] * std.clamp(min=0)[..., None, None] + mean[..., None, None]


class ThroughBase:
    """The loss of generated LoRAs through a frozen base, that of each task's LoRA on its rows alone
    in one forward pass of all."""

    def __init__(self, work: Work, base: str, dtype: torch.dtype, device: torch.device):
        model = transformers.AutoModelForCausalLM.from_pretrained(resolve(base), dtype=dtype)
        self._model = model.to(device).eval().requires_grad_(False)
        self._matrices, self._scale = Matrices(work.target, device), work.scale
        self._loras = {}
        for name in work.target.layout.modules:
            self._model.get_submodule(name).register_forward_hook(self._adding(name))

    def _adding(self, name: str) -> Callable:
        """A hook that adds scale * (x A^T) B^T to a projection of x, by task."""

        def add(module, given, output):
            a, b = (side.to(output.dtype) for side in self._loras[name])
            x, y = (z.reshape(len(a), -1, z.shape[-1]) for z in (given[0], output))
            return torch.baddbmm(y, x @ a.mT, b.mT, alpha=self._scale).reshape(output.shape)

        return add

    def loss(
        self,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        at: torch.Tensor,
        labels: torch.Tensor,
        shares: torch.Tensor,
    ) -> torch.Tensor:
        """The sum over answers' tokens of their cross-entropy times their share. tokens: (K, T, h,
        w). ids: (K * n, S). at: which of the K * n * S positions predict `labels`."""
        self._loras = self._matrices(tokens)
        # Rows are padded on the right, where causal attention needs no mask.
        hidden = self._model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = self._model.get_output_embeddings()(hidden.flatten(0, 1)[at])
        return (F.cross_entropy(logits.float(), labels, reduction="none") * shares).sum()


def arguments_of(work: Work, tasks: range, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What `ThroughBase.loss` takes beside the tokens of these tasks: the rows padded to their
    longest."""
    rows, of = [], slice(tasks.start, tasks.stop)
    for task, index in zip(work.tasks[of], work.index[of], strict=True):
        answers = (task.end - task.start)[index]
        share = 1 / answers.sum() / len(work.condition)
        rows += [(task.ids[i, : task.end[i]], task.start[i], share) for i in index]
    length = max(len(ids) for ids, *_ in rows)
    padded = np.full((len(rows), length), work.pad, np.int64)
    at, labels, shares = [], [], []
    for number, (ids, start, share) in enumerate(rows):
        padded[number, : len(ids)] = ids
        at += [*range(number * length + start - 1, number * length + len(ids) - 1)]
        labels += ids[start:].tolist()
        shares += [share] * (len(ids) - start)
    found = padded, np.array(at), np.array(labels), np.array(shares, np.float32)
    return tuple(torch.tensor(x, device=device) for x in found)


def train_step(
    generator: Generator, config: Config, work: Work, variant: str, device: torch.device
) -> Callable[[], tuple[float, float]]:
    """A function that trains the decoder for a step and returns (loss, norm of the gradient before
    it is clipped). variant: as of case.TORCH_ANSWERING."""
    c, count = config.train, len(work.condition)
    dtype = getattr(torch, c.dtype)
    through = ThroughBase(work, config.base.path, dtype, device).loss
    model, bf16 = generator, dtype == torch.bfloat16
    cast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    if variant == "compiled":
        model, through = torch.compile(generator), torch.compile(through)
    parts = [range(k, k + 1) for k in range(count)] if variant == "one by one" else [range(count)]
    asked = [(part.start, part.stop, arguments_of(work, part, device)) for part in parts]
    condition = torch.tensor(work.condition, device=device)
    optimizer = torch.optim.AdamW(
        generator.parameters(), c.learning_rate, weight_decay=c.weight_decay
    )
    average = None
    if c.average_decay:
        average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(c.average_decay))

    def run() -> tuple[float, float]:
        with cast:
            tokens = model(condition + c.condition_noise * torch.randn_like(condition)).float()
        # The graph through the base is freed part by part, the decoder's at the end.
        made, loss = tokens.detach().requires_grad_(), 0.0
        for first, last, rows in asked:
            of_part = through(made[first:last], *rows)
            of_part.backward()
            loss += float(of_part.detach())
        optimizer.zero_grad(set_to_none=True)
        tokens.backward(made.grad)
        norm = torch.nn.utils.clip_grad_norm_(generator.parameters(), c.clip)
        optimizer.step()
        if average is not None:
            average.update_parameters(generator)
        return loss, float(norm)

    return run


def operation(
    case: Case, config: Config, variant: str, device: torch.device
) -> Callable[[], object]:
    """A function that trains a new decoder for a step, on the same rows as ours."""
    spec = spec_of(config)
    given = list(spec.features), spec.kernel_size, spec.length_projection or None
    generator = Generator(*given, spec.condition_shape[1]).to(device)
    return train_step(generator, config, Work.of(case, config), variant, device)
