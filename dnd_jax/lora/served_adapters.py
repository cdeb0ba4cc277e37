"""Adapters that a running server loads by name, and the proof that it applies them.

vLLM takes an adapter whose names fit no module of its model, and answers with the base. So before
anything is asked of them, and while nothing else is, each has to change log-probabilities.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from dnd_jax.base.served_base import ServedBase
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.core.stopping import stop
from dnd_jax.lora.adapter import fingerprint, load_adapter
from dnd_jax.lora.names import LORA_A, LORA_B
from dnd_jax.lora.peft_settings import load_adapter_config
from dnd_jax.lora.verify_served import NOISE, TEXTS, served_logprobs, size


@contextlib.contextmanager
def served_adapters(base: ServedBase, folders: Sequence[str]) -> Iterator[dict[str, str]]:
    """{folder: what the server calls it, which is of its contents} while the block lasts.

    Raises InputError where the server does not load one, CheckFailed where it ignores one.
    """
    server, names = base.server, {}
    texts = base.tokenizer([*TEXTS], add_special_tokens=False)["input_ids"]

    plain = served_logprobs(server, base.served_base, texts)
    noise = size(served_logprobs(server, base.served_base, texts) - plain)
    there = server.models()  # some may be left of a run that was killed
    try:
        for folder in tqdm(folders, desc="load", unit="adapter", dynamic_ncols=True):
            stop.check()
            path, name = str(pathlib.Path(folder).resolve()), f"dnd-{fingerprint(folder)}"
            if name in there and there[name].root != path:
                server.unload(name)
            if name not in names.values() and (name not in there or there[name].root != path):
                server.load(name, path)
            names[folder] = name
            change = size(served_logprobs(server, name, texts) - plain)
            if change <= NOISE * noise and not _does_nothing(folder):
                raise CheckFailed(
                    f"{server.url}: the server ignores {folder}: log-probabilities of {len(plain)} "
                    f"tokens change by {change:.3g} (root mean square), the base's own by "
                    f"{noise:.3g}; its names may not fit the server's model (`dnd verify-adapter` "
                    "tells), or its effect is too small for the type that the server computes in"
                )
        yield names
    finally:
        for name in set(names.values()):
            with contextlib.suppress(InputError):  # the server may be gone
                server.unload(name)


def _does_nothing(folder: str) -> bool:
    """Whether an adapter is none: a factor of every product is 0."""
    tensors = load_adapter(folder)
    modules = [key.removesuffix(LORA_A) for key in tensors if key.endswith(LORA_A)]
    acts = (tensors[m + LORA_A].any() and tensors[m + LORA_B].any() for m in modules)
    return not load_adapter_config(folder).scale or not any(acts)
