"""PyTorch's side of a measurement, in a process of its own: `python -m
dnd_jax.costs.bench.torch_worker SPEC`, one JSON line."""

import contextlib
import json
import sys
from collections.abc import Callable

import numpy as np
import torch
import transformers

from dnd_jax.config.schema import Config
from dnd_jax.costs.bench import torch_answering, torch_collecting, torch_generator
from dnd_jax.costs.bench.case import Case, peak_of_process, timed
from dnd_jax.generator.sizes import encoder_module

# memory layout, compiled, autocast to bfloat16
VARIANTS = {
    f"{name}{' bf16' if bf16 else ''}": (layout, compiled, bf16)
    for bf16 in (False, True)
    for name, layout, compiled in (
        ("eager", torch.contiguous_format, False),
        ("channels_last", torch.channels_last, False),
        ("compile", torch.contiguous_format, True),
    )
}

THROUGH_BASE = {"collect": torch_collecting.operation, "answers": torch_answering.operation}


def operation(
    case: Case, config: Config, variant: str, device: torch.device
) -> Callable[[], object]:
    """A function that runs the case once, as in jax_worker.py."""
    layout, compiled, bf16 = VARIANTS[variant]
    spec, batch = case.spec(config), max(case.batch, 1)
    n, text_length, _ = spec.condition_shape
    generator = torch_generator.Generator(
        list(spec.features), spec.kernel_size, spec.length_projection or None, text_length
    )
    generator = generator.to(device).to(memory_format=layout)
    cast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    model = torch.compile(generator) if compiled else generator

    def tensor(shape, seed):
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32)).to(
            device
        )

    if case.what == "generate":
        sizes = encoder_module(config).config
        bert = transformers.BertConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
        )
        encoder = transformers.BertModel(bert, add_pooling_layer=False).to(device).eval()
        ids = torch.randint(sizes.vocab_size, (batch * n, text_length), device=device)
        windows = ids.split(bert.max_position_embeddings, dim=1)

        def generate():
            with torch.inference_mode(), cast:
                condition = torch.cat([encoder(w).last_hidden_state for w in windows], dim=1)
                return model(condition.reshape(batch, n, text_length, -1)).float().cpu()

        return generate

    condition = tensor((batch, *spec.condition_shape), 0)
    if case.what == "forward":

        def forward():
            with torch.inference_mode(), cast:
                return model(condition)

        return forward
    target = tensor((batch, *spec.token_grid), 1)
    importance = generator.criterion_weight
    train = case.what == "train"
    optimizer = torch.optim.AdamW(
        generator.parameters(),
        lr=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
    )
    condition.requires_grad_(not train)

    def step():
        with cast:
            loss = (importance * (model(condition).float() - target) ** 2).mean()
        generator.zero_grad(set_to_none=True)
        loss.backward()
        if train:
            torch.nn.utils.clip_grad_norm_(generator.parameters(), config.train.clip)
            optimizer.step()
        return loss

    return step


def main() -> None:
    """Runs the spec of the command line."""
    spec = json.loads(sys.argv[1])
    case = Case(**spec["case"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    try:
        operation_of = THROUGH_BASE.get(case.what, operation)
        run = operation_of(case, case.load(), spec["variant"], device)
        times = timed(lambda: (run(), wait()), spec["repeats"])
    except torch.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}))
        return
    cuda = device.type == "cuda"
    result = {
        **times,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak_of_process(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
