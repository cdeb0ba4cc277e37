"""Proof in numbers that a running server applies an adapter: it is asked for the log-probabilities
of the same texts by its base and by the adapter, whose differences are compared with those that
PyTorch and PEFT compute.

Servers take adapters that they can do nothing with, and answer with the base: vLLM does where no
name of a tensor fits a module of the model.
"""

import os
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.hub import resolve
from dnd_jax.base.served import Served
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.core import packages
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.lora.adapter import load_adapter, save_adapter
from dnd_jax.lora.names import IN_FRONT, renamed
from dnd_jax.lora.peft_settings import load_adapter_config

torch = packages.deferred("torch")

# Of several kinds, so that an adapter of any task changes some of them.
TEXTS = (
    "Question: Which of these is a fruit?\nA. stone\nB. apple\nAnswer: B",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Translate into French: The house is small. La maison est petite.",
    "If 3 apples cost 6 dollars, then 5 apples cost 10 dollars.",
    "Write the words in capitals: bowl, chipmunk, quill. BOWL, CHIPMUNK, QUILL.",
)
# How far a server's change of log-probabilities may be from PyTorch's, as a share of it, beside
# NOISE times what the two give the base differently (the server may compute in bfloat16).
RELATIVE, NOISE = 0.1, 2.0


def verify_served(
    adapter: str | os.PathLike,
    server: Served,
    model: str,
    base: str | os.PathLike = "",
    served_base: str = "",
    key_prefix: str = "",
) -> str:
    """A report in lines. model: what the server calls the adapter; base: a folder, GGUF file or hub
    id (empty: the one that the adapter names); served_base: what the server calls its base (empty:
    as it says itself); key_prefix: what the adapter's names were given in the place of "model.".

    Raises CheckFailed where the server does not do what the adapter's matrices say, InputError for
    what cannot be read or asked.
    """
    folder = pathlib.Path(adapter)
    config = load_adapter_config(folder)
    served_base = served_base or _base_of(server, model, config.base)
    path = resolve(base or config.base, revision="" if base else config.revision)
    texts = load_tokenizer(path)([*TEXTS], add_special_tokens=False)["input_ids"]

    plain = served_logprobs(server, served_base, texts)
    again = served_logprobs(server, served_base, texts)
    changed = served_logprobs(server, model, texts) - plain
    in_torch = TorchBase(path, batch_size=1, max_new_tokens=1)
    expected_plain = _in_torch(in_torch.model, texts)
    with tempfile.TemporaryDirectory() as scratch:
        in_torch.use(_as_pefts(folder, key_prefix, pathlib.Path(scratch, "adapter")))
    expected = _in_torch(in_torch.model, texts) - expected_plain

    noise, rounding = size(again - plain), size(plain - expected_plain)
    change, by_hand, off = size(changed), size(expected), size(changed - expected)
    told = (
        f"log-probabilities of {len(plain)} tokens change by {change:.4g} (root mean square), in "
        f"PyTorch by {by_hand:.4g}, {off:.4g} apart; the base's own differ by {rounding:.4g}"
    )
    where = f"{server.url}, {model!r}"
    if rounding > max(0.5, by_hand):
        raise CheckFailed(
            f"{where}: its base {served_base!r} is another model than {path}: log-probabilities of "
            f"the base alone differ by {rounding:.4g}"
        )
    if by_hand <= NOISE * max(noise, rounding):
        raise CheckFailed(f"{where}: cannot be told: {told}; the adapter's effect is too small")
    if change <= NOISE * noise or change < RELATIVE * by_hand:
        raise CheckFailed(
            f"{where}: the server ignores the adapter: {told}; its names, which begin with "
            f"{key_prefix or IN_FRONT}layers., may not fit the server's model (`dnd generate "
            "--key-prefix=model.language_model.`), or another adapter stands under this name"
        )
    if off > RELATIVE * by_hand + NOISE * max(noise, rounding):
        raise CheckFailed(f"{where}: the server does something else than the adapter says: {told}")
    applies = f"ok: the server applies the adapter, by names with {key_prefix or IN_FRONT}layers."
    lines = f"{folder} on {path}, served as {where}", told, applies
    return "\n".join(lines)


def _as_pefts(folder: pathlib.Path, key_prefix: str, copy: pathlib.Path) -> pathlib.Path:
    """The adapter with the names that PEFT knows, in a copy where it has a server's."""
    if not key_prefix:
        return folder
    try:
        tensors = renamed(load_adapter(folder), key_prefix, IN_FRONT)
    except InputError as error:
        raise InputError(f"--key-prefix={key_prefix}: {folder}: {error}") from None
    return save_adapter(copy, tensors, load_adapter_config(folder))


def _base_of(server: Served, model: str, named: str) -> str:
    """What the server calls the base of a model. Raises InputError where it does not say."""
    models = server.models()
    bases = [name for name, of in models.items() if not of.parent and name != model]
    if model in models and models[model].parent:
        return models[model].parent
    if named in models or len(bases) == 1:
        return named if named in models else bases[0]
    raise InputError(
        f"{server.url}: serves {', '.join(models) or 'no model'}; say by --served-base which of "
        "them is the base"
    )


def served_logprobs(server: Served, model: str, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Of every token of texts but their first, float64 (n,)."""
    return np.concatenate(server.logprobs(model, texts))


def _in_torch(model, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """The same by a PyTorch model."""
    found = []
    for ids in texts:
        row = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=row).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].cpu().numpy())
    return np.concatenate(found)


def size(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))
