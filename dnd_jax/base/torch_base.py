"""A base in PyTorch: the real transformers model with the real PEFT adapter, as exported. Its
answers are greedy, or the likeliest label."""

import os
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError

from dnd_jax.base.asked_base import AskedBase, Row, positions_of
from dnd_jax.base.chat import until_end
from dnd_jax.base.drafts import Asked, Drafted
from dnd_jax.base.greedy import pad_left
from dnd_jax.base.hub import resolve
from dnd_jax.base.sequences import plain_pairs
from dnd_jax.config.schema import Evaluate
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, NoRoom, first_line, is_no_room
from dnd_jax.data.sources import Example

torch, peft = packages.deferred("torch"), packages.deferred("peft")
transformers = packages.deferred("transformers")
_SLOT = "scored"
_UNTAKEN = (KeyError, TypeError, AttributeError)  # of settings that PEFT cannot take
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")  # what stays of generation settings
# PEFT 0.21 asks transformers 5 for it at every adapter, which would print into the progress bars.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def load_torch_base(
    base: str | os.PathLike, dtype: str = "float32", device: str = ""
) -> "torch.nn.Module":
    """The transformers model of a folder, package or hub id. device: PyTorch's name of it; empty:
    the GPU where there is one. Vision-language models are asked for text alone. Of the folder's
    generation settings none stays but its special tokens: greedy is greedy (Qwen2.5's own settings
    punish every token of the prompt, others force a first or last one).

    Raises InputError when it has no usable configuration or weights and for a device that is not
    there, NoRoom when it does not fit.
    """
    folder, device = resolve(base), device_of(device)
    try:
        model, missing = _from_pretrained(folder, dtype)
        if not missing:
            return model.eval().to(device)
    # transformers, safetensors and the model's own code raise whatever a damaged folder makes of
    # them
    except Exception as error:
        if is_no_room(error):
            raise NoRoom(
                f"{folder}: no room for it on the {'machine' if device == 'cpu' else 'GPU'} "
                f"({first_line(error)}); set XLA_PYTHON_CLIENT_PREALLOCATE=false, or use the CPU "
                "by CUDA_VISIBLE_DEVICES= (scores also: --config.evaluate.dtype=bfloat16 or "
                "--config.evaluate.device=cpu)"
            ) from None
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: transformers cannot load it ({why}); give a whole model folder"
        ) from None
    # transformers makes these up at random, with a warning only.
    raise InputError(
        f"{folder}: its files lack {len(missing)} of the model's tensors ({missing[0]}); give a "
        "whole model folder"
    )


def device_of(name: str) -> str:
    """The device of config.evaluate.device. Raises InputError for one that PyTorch does not have
    here."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"config.evaluate.device = {name!r}: PyTorch has no such device here "
            f"({first_line(error)[:200]}); give cpu, cuda or cuda:N, or nothing"
        ) from None
    return name


def _from_pretrained(folder: pathlib.Path, dtype: str) -> tuple["torch.nn.Module", list[str]]:
    """(the model on the CPU, the names of its tensors that the files lack)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText
    own = getattr(torch, dtype)
    model, report = kind.from_pretrained(folder, dtype=own, output_loading_info=True)
    settings = model.generation_config
    special = {key: getattr(settings, key) for key in SPECIAL}
    model.generation_config = transformers.GenerationConfig(**special)
    return model, sorted(report["missing_keys"])


class TorchBase(AskedBase):
    """A base model in PyTorch whose LoRA adapter can be exchanged."""

    engine = "PyTorch"

    def __init__(
        self,
        base: str | os.PathLike,
        batch_size: int,
        max_new_tokens: int,
        dtype: str = "float32",
        device: str = "",
    ):
        """As `load_torch_base`."""
        super().__init__(base, batch_size, max_new_tokens)
        self.model = load_torch_base(base, dtype, device)
        # The harness of `dnd lm-eval` generates with the model's own settings.
        self.model.generation_config.eos_token_id = list(self.ends)
        self.positions = positions_of(self.model.config)
        self._device = self.model.device
        self._loaded = 0
        self._tried = 0, False  # tokens of a row, and whether so many are exact from drafts

    @classmethod
    def of(cls, base: str | os.PathLike, c: Evaluate) -> "TorchBase":
        """As scores are asked for."""
        return cls(base, c.batch_size, c.max_new_tokens, c.dtype, c.device)

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
            old, new, result = self._load(adapter)
        except (RuntimeError, ValueError, SafetensorError, *_UNTAKEN) as error:
            if is_no_room(error):
                raise
            raise InputError(
                f"{adapter}: not an adapter of {self.base} ({first_line(error)})"
            ) from None
        missing = [key for key in result.missing_keys if new in key]
        if missing or result.unexpected_keys:
            raise InputError(
                f"{adapter}: not an adapter of {self.base}: {len(missing)} tensors missing, "
                f"{len(result.unexpected_keys)} unknown "
                f"({(list(result.unexpected_keys) + missing)[0]})"
            )
        self.model.set_adapter(new)
        self.model.delete_adapter(old)
        self.model.eval()

    def _load(self, adapter: str | os.PathLike) -> tuple[str, str, object]:
        """Loads an adapter beside the present one: (the old one's name, the new one's, what PEFT
        says of its tensors)."""
        if not isinstance(self.model, peft.PeftModel):
            # The first one wraps the model, which reports nothing; it is loaded again below, which
            # does.
            name = f"{_SLOT}0"
            self.model = peft.PeftModel.from_pretrained(self.model, adapter, adapter_name=name)
            self._loaded = 0
        old, self._loaded = f"{_SLOT}{self._loaded}", self._loaded + 1
        new = f"{_SLOT}{self._loaded}"
        return old, new, self.model.load_adapter(adapter, adapter_name=new)

    def answer_ids(
        self, examples: Sequence[Example], at_most: int = 0, shots: Sequence[Example] = ()
    ) -> list[list[int]]:
        """Greedy answers as token ids, without the end token. at_most: tokens of an answer; 0:
        max_new_tokens. An answer of so many tokens was cut off: it has no end token. shots: as in
        `prompt_ids`."""
        at_most = at_most or self.max_new_tokens
        asked = [Asked(*pair) for pair in plain_pairs(self.tokenizer, examples, shots)]
        prompts = [a.prompt for a in asked]
        if self._takes_drafts(prompts, at_most):
            found = Drafted(self.model, self.ends).answers(asked, at_most, self._batch_size)
        else:
            found = self._generated(prompts, at_most)
        return [until_end(row, self.ends) for row in found]

    def _takes_drafts(self, prompts: Sequence[list[int]], at_most: int) -> bool:
        """Whether answers to these prompts are exact from drafts; tried once, on a row as long as
        the longest."""
        longest = max(prompts, key=len, default=[])
        if len(longest) + at_most > self._tried[0]:
            row = np.resize(longest, len(longest) + at_most).tolist()
            self._tried = len(row), Drafted(self.model).is_exact(row)
        return self._tried[1]

    def _generated(self, prompts: Sequence[list[int]], at_most: int) -> list[list[int]]:
        """transformers' own greedy answers."""
        answers = []
        for first in range(0, len(prompts), self._batch_size):
            ids, valid = self._padded(prompts[first : first + self._batch_size])
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=valid,
                    max_new_tokens=at_most,
                    do_sample=False,
                    eos_token_id=list(self.ends),
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            answers += out[:, ids.shape[1] :].tolist()
        return answers

    def _likelihoods(self, rows: Sequence[Row]) -> list[float]:
        width = max(length for _, length in rows)
        padded, valid = self._padded([ids for ids, _ in rows])
        with torch.inference_mode():
            logits = self.model(
                input_ids=padded,
                attention_mask=valid,
                position_ids=(valid.cumsum(dim=1) - 1).clamp(min=0),
                logits_to_keep=width + 1,
            ).logits[:, :-1]
        chosen = logits.float().log_softmax(dim=-1).gather(-1, padded[:, -width:, None])[..., 0]
        lengths = torch.tensor([length for _, length in rows])
        inside = torch.arange(width) >= width - lengths[:, None]
        return (chosen * inside.to(self._device)).sum(dim=1).tolist()

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
