"""The case "collect" of `dnd bench` by PEFT: one task after the other, as its users do."""

from collections.abc import Callable

import numpy as np
import torch
import transformers

from dnd_jax.base.hub import resolve
from dnd_jax.config.schema import Config
from dnd_jax.core import packages
from dnd_jax.costs.bench.case import Case
from dnd_jax.costs.bench.collecting import Work

peft = packages.deferred("peft")  # what other cases do without


def operation(
    case: Case, config: Config, variant: str, device: torch.device
) -> Callable[[], object]:
    """A function that takes one step of every task, on the same rows as ours, each task's padded to
    its longest. All steps are of one adapter: what they compute is as much. There is one
    variant."""
    work, c = Work.of(case, config), config.lora
    dtype = getattr(torch, case.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(config.base.path), dtype=dtype
    )
    adapter = peft.LoraConfig(r=c.rank, lora_alpha=c.alpha, target_modules=list(c.targets))
    model = peft.get_peft_model(model, adapter).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, c.learning_rate, weight_decay=c.weight_decay)

    def rows(task, index) -> dict[str, torch.Tensor]:
        start, end = task.start[index, None], task.end[index, None]
        ids = task.ids[index][:, : end.max()]
        at = np.arange(ids.shape[1])
        labels = np.where((start <= at) & (at < end), ids, -100)
        found = {"input_ids": ids, "attention_mask": at < end, "labels": labels}
        return {key: torch.tensor(x, dtype=torch.long, device=device) for key, x in found.items()}

    batches = [rows(task, index) for task, index in zip(work.tasks, work.index, strict=True)]

    def run() -> list:
        losses = []
        for batch in batches:
            loss = model(**batch).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, c.clip)
            optimizer.step()
            losses.append(float(loss))
        return losses

    return run
