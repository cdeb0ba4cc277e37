"""The README.md of what we export: a model card that the hub accepts, saying what made it and how
to load it."""

import json
import pathlib
from collections.abc import Sequence

from dnd_jax.base.hub import is_repo_id
from dnd_jax.core import digests
from dnd_jax.core.files import holds_only
from dnd_jax.lora.peft_settings import CARD, CONFIG, WEIGHTS, AdapterConfig

TAGS = ("lora", "drag-and-drop-llms", "dnd_jax")
# vLLM takes --max-lora-rank from this list alone (MaxLoRARanks in vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def names_hub_model(base: str) -> bool:
    """Whether a base's name can stand as base_model in a card: USER/NAME that is no local folder
    (the hub refuses others)."""
    return is_repo_id(base) and not pathlib.Path(base).exists()


def is_generated(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter with our card and nothing else but files of systems."""
    ours = (WEIGHTS, CONFIG, CARD)
    if not holds_only(folder, ours) or not all((folder / name).is_file() for name in ours):
        return False
    return TAGS[1] in (folder / CARD).read_text(encoding="utf-8", errors="replace")


def card(
    adapter: AdapterConfig,
    generator: str,
    config_hash: str,
    prompts: Sequence[str],
    seed: int,
    merged: bool = False,
    notes: Sequence[str] = (),
) -> str:
    """The card of a generated adapter, or of a base with one merged into it.

    generator: its fingerprint; config_hash: of the settings that it was trained with;
    prompts: those drawn by `seed`; notes: what else is to be said.
    """
    front = {
        **({"base_model": adapter.base} if names_hub_model(adapter.base) else {}),
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": list(TAGS[1:] if merged else TAGS),
    }
    # JSON is YAML: every value is written so, and no name needs a rule of quoting.
    header = "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items()
    )
    base = json.dumps(adapter.base, ensure_ascii=False)
    rank = next((r for r in VLLM_RANKS if r >= adapter.rank), None)
    if merged:
        title, load = (
            "A base with a LoRA generated from prompts",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n',
        )
    else:
        title = "LoRA adapter generated from prompts"
        of_base = f"AutoModelForCausalLM.from_pretrained({base})"
        load = f'model = PeftModel.from_pretrained({of_base}, "FOLDER")\n'
    peft = "" if merged else "from peft import PeftModel\n"
    weights = (
        f"- its weights: the GGUF file {adapter.weights}, on which the LoRAs behind this were "
        "trained; those of another file, or of the hub, are other numbers, and nothing was "
        "measured on them\n"
        if adapter.weights
        else ""
    )
    vllm = (
        "vllm serve FOLDER"
        if merged
        else f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules task=FOLDER"
    )
    served = (
        f"```\n{vllm}\n```\n"
        if merged or rank
        else f"vLLM serves LoRAs up to rank {VLLM_RANKS[-1]}: merge this one.\n"
    )
    return (
        f"---\n{header}---\n\n# {title}\n\n"
        "Made by dnd_jax (Drag-and-Drop LLMs, arXiv 2506.16406) from unlabeled prompts, without "
        "training on the task.\n\n"
        f"- base: `{adapter.base}`\n{weights}"
        f"- generator: sha256 {generator}; its configuration: sha256 {config_hash[:16]}\n"
        f"- prompts: {len(prompts)}, drawn with seed {seed} "
        f"(sha256 {digests.of_texts(prompts)[:16]})\n"
        f"- rank {adapter.rank}, alpha {adapter.alpha:g} (scale {adapter.scale:g})\n"
        + "".join(f"- {note}\n" for note in notes)
        + "\n"
        f"```python\n{peft}from transformers import AutoModelForCausalLM\n\n{load}```\n\n{served}"
    )
