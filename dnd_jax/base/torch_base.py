"""Answers in PyTorch, greedy or the likeliest label: the real transformers model with the real PEFT
adapter, as exported."""

import os
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError

from dnd_jax.base.chat import render
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.greedy import pad_left
from dnd_jax.base.hub import resolve
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.data.sources import Example

torch, peft = packages.deferred("torch"), packages.deferred("peft")
transformers = packages.deferred("transformers")
_SLOT = "scored"
# PEFT 0.21 asks transformers 5 for it at every adapter, which would print into the progress bars.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def load_torch_base(base: str | os.PathLike) -> "torch.nn.Module":
    """The transformers model of a folder, package or hub id: float32, on the GPU where there is
    one. Vision-language models are asked for text alone. Of the folder's generation settings none
    stays but its special tokens: greedy is greedy (Qwen2.5's own settings punish every token of the
    prompt).

    Raises InputError when it has no usable configuration or weights, or no room.
    """
    folder = resolve(base)
    try:
        text = (
            type(transformers.AutoConfig.from_pretrained(folder))
            in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        )
        name = "AutoModelForCausalLM" if text else "AutoModelForImageTextToText"
        kind = getattr(transformers, name)
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        special = {
            key: value
            for key, value in model.generation_config.to_dict().items()
            if key.endswith("_token_id")
        }
        model.generation_config = transformers.GenerationConfig(**special)
        missing = sorted(report["missing_keys"])
        if not missing:
            return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{folder}: no room for it on the GPU ({first_line(error)}); set "
            "XLA_PYTHON_CLIENT_PREALLOCATE=false, or use the CPU "
            "by CUDA_VISIBLE_DEVICES="
        ) from None
    # transformers, safetensors and the model's own code raise whatever a damaged folder makes of
    # them
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: transformers cannot load it ({why}); give a whole model folder"
        ) from None
    # transformers makes these up at random, with a warning only.
    raise InputError(
        f"{folder}: its files lack {len(missing)} of the model's tensors ({missing[0]}); give a "
        "whole model folder"
    )


class TorchBase:
    """A base model in PyTorch whose LoRA adapter can be exchanged."""

    def __init__(self, base: str | os.PathLike, batch_size: int, max_new_tokens: int):
        self.base = pathlib.Path(base)
        self.tokenizer = load_tokenizer(base)
        self.model = load_torch_base(base)
        self._device = self.model.device
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._loaded = 0

    def use(self, adapter: str | os.PathLike | None) -> None:
        """Loads an adapter folder in place of the present one; None turns adapters off.

        Raises InputError when it does not fit the base: PEFT itself only warns.
        """
        if adapter is None:
            if isinstance(self.model, peft.PeftModel):
                self.model = self.model.unload()
            return
        if not pathlib.Path(adapter, "adapter_config.json").is_file():
            raise InputError(f"{adapter}: no adapter_config.json, so no PEFT adapter")
        try:
            if not isinstance(self.model, peft.PeftModel):
                # The first one wraps the model, which reports nothing; it is loaded again below,
                # which does.
                self.model = peft.PeftModel.from_pretrained(
                    self.model, adapter, adapter_name=f"{_SLOT}0"
                )
                self._loaded = 0
            old, self._loaded = f"{_SLOT}{self._loaded}", self._loaded + 1
            result = self.model.load_adapter(adapter, adapter_name=f"{_SLOT}{self._loaded}")
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{adapter}: not an adapter of {self.base} ({first_line(error)})"
            ) from None
        name = f"{_SLOT}{self._loaded}"
        missing = [key for key in result.missing_keys if name in key]
        if missing or result.unexpected_keys:
            raise InputError(
                f"{adapter}: not an adapter of {self.base}: {len(missing)} tensors missing, "
                f"{len(result.unexpected_keys)} unknown "
                f"({(list(result.unexpected_keys) + missing)[0]})"
            )
        self.model.set_adapter(name)
        self.model.delete_adapter(old)
        self.model.eval()

    def prompt_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of each example as the base is asked: the training template, up to where the
        answer begins."""
        texts = [render(self.tokenizer, e.prompt, e.system) for e in examples]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def answer_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Greedy answers as token ids, without the end token."""
        prompts, answers = self.prompt_ids(examples), []
        end = self.tokenizer.eos_token_id
        for first in range(0, len(prompts), self._batch_size):
            ids, valid = self._padded(prompts[first : first + self._batch_size])
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=valid,
                    max_new_tokens=self._max_new_tokens,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=self.tokenizer.pad_token_id,
                )[:, ids.shape[1] :].tolist()
            answers += [row[: row.index(end)] if end in row else row for row in out]
        return answers

    def choose(self, examples: Sequence[Example], labels: Sequence[str]) -> list[str]:
        """Of the labels, the answer to each example that the base finds most likely, its end token
        included."""
        end = self.tokenizer.eos_token_id
        answers = [
            [*ids, end]
            for ids in self.tokenizer(list(labels), add_special_tokens=False)["input_ids"]
        ]
        width = max(map(len, answers))
        rows = [
            (prompt + answer, len(answer))
            for prompt in self.prompt_ids(examples)
            for answer in answers
        ]
        scores: list[float] = []
        for first in range(0, len(rows), self._batch_size):
            part = rows[first : first + self._batch_size]
            padded, valid = self._padded([row for row, _ in part])
            with torch.inference_mode():
                logits = self.model(
                    input_ids=padded,
                    attention_mask=valid,
                    position_ids=(valid.cumsum(dim=1) - 1).clamp(min=0),
                    logits_to_keep=width + 1,
                ).logits[:, :-1]
            chosen = logits.float().log_softmax(dim=-1).gather(-1, padded[:, -width:, None])[..., 0]
            inside = (
                torch.arange(width) >= width - torch.tensor([length for _, length in part])[:, None]
            )
            scores += (chosen * inside.to(self._device)).sum(dim=1).tolist()
        best = np.reshape(scores, (len(examples), len(labels))).argmax(axis=1)
        return [labels[i] for i in best]

    def decode(self, answers: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode([list(a) for a in answers], skip_special_tokens=True)

    def logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits (n, S, V) of token rows padded on the left."""
        ids, valid = self._padded(rows)
        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=valid).logits.float().cpu().numpy()

    def _padded(self, rows: Sequence[Sequence[int]]) -> "tuple[torch.Tensor, torch.Tensor]":
        """(ids, valid), int64 (n, S) each, padded on the left, where the model is."""
        ids, valid = (
            torch.from_numpy(x).long().to(self._device)
            for x in pad_left(rows, self.tokenizer.pad_token_id)
        )
        return ids, valid
