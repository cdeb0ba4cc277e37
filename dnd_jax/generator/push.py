"""Stage `push-generator`: a trained generator to the Hugging Face hub, where other stages find it
by `--generator=USER/NAME`, or to a folder, with its card.

dnd push-generator RUN --to=USER/NAME [--public] [--dtype=bfloat16]
dnd push-generator RUN --out=FOLDER [--dtype=bfloat16]
"""

import json
import pathlib
import shutil

import numpy as np

from dnd_jax import __version__
from dnd_jax.base.hub import check_repo_id, is_repo_id, push
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import check_free, replacing
from dnd_jax.core.stage import Given
from dnd_jax.core.tensors import read_safetensors, write_safetensors
from dnd_jax.generator.folder import (
    FILES,
    MODEL,
    Description,
    find_generator,
    read_description,
    steady,
)
from dnd_jax.generator.trained import span
from dnd_jax.lora.adapter import DTYPES
from dnd_jax.lora.card import TAGS, names_hub_model

SHOWN = 20  # training tasks that a card names


def card(description: Description, name: str, model: pathlib.Path) -> str:
    """The README.md of a generator, as the hub takes it: what it was trained on and how to use it.
    name: that it is asked for by."""
    adapter, condition = description.adapter, description.condition
    front = {
        **({"base_model": adapter.base} if names_hub_model(adapter.base) else {}),
        "library_name": "dnd_jax",
        "tags": [*TAGS[1:], "hypernetwork"],
    }
    header = "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in front.items())
    names, train = description.task_names, description.settings["train"]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    tasks = ", ".join(f"`{name}`" for name in names[:SHOWN]) + more
    lines = [
        f"makes LoRA adapters of rank {adapter.rank} for `{adapter.base}`, of "
        f"{', '.join(f'`{target}`' for target in adapter.targets)}",
        *([f"its LoRAs are of the GGUF file {adapter.weights}"] if adapter.weights else []),
        f"takes {span(description.fewest, condition.num_prompts)} prompts of a task, each of up to "
        f"{condition.max_text_length} tokens of `{condition.encoder}`",
        *([f"trained on {len(names)} tasks: {tasks}"] if names else []),
        *([f"{train['steps']} steps, on {train['objective']}"] if "objective" in train else []),
        f"settings: sha256 {digests.of_json(description.settings)[:16]}; parameters: sha256 "
        f"{digests.of_file(model)[:16]}; dnd_jax {__version__}",
    ]
    return (
        f"---\n{header}---\n\n# A generator of LoRA adapters\n\n"
        "Drag-and-Drop LLMs (arXiv 2506.16406), made by dnd_jax: unlabeled prompts of a task in, a "
        "PEFT adapter out, without training on the task.\n\n"
        + "".join(f"- {line}\n" for line in lines)
        + "\nOf tasks that are unlike all of these, expect little: the command says so.\n\n"
        f"```\ndnd generate --generator={name} --prompts=FILE --out=FOLDER\n```\n"
    )


def run(given: Given) -> None:
    """Runs the stage."""
    if not given["out"]:
        given.need("to")
        check_repo_id(given["to"], "--to")
    elif given["to"] or given["public"]:
        raise InputError("--out is a folder here; leave out --to and --public")
    else:
        check_free(given["out"], "out")
    if given["dtype"] and given["dtype"] not in DTYPES:
        raise InputError(f"--dtype={given['dtype']}: none of {', '.join(DTYPES)}")
    folder = find_generator(given.argument)
    description = read_description(folder)
    names = {"base": description.adapter.base, "encoder": description.condition.encoder}
    for what, name in names.items():
        if not is_repo_id(name) and not name.startswith("package:"):
            raise InputError(
                f"{folder}: its {what} is {name!r}, which nobody else has; train with one from the "
                "hub or a package" + (", or `dnd train --base-name`" if what == "base" else "")
            )
    with_card = pathlib.Path(given["out"] or folder.with_name(f"{folder.name}_on_hub"))
    with replacing(with_card, directory=True) as temporary, steady(folder):
        for name in FILES:
            shutil.copyfile(folder / name, temporary / name)
        if given["dtype"]:
            _cast(temporary / MODEL, DTYPES[given["dtype"]])
        text = card(description, given["to"] or given["out"], temporary / MODEL)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    if given["to"]:
        print(f"pushed: {push(with_card, given['to'], given['public'])}")
    else:
        print(f"generator: {with_card.absolute()}")


def _cast(path: pathlib.Path, dtype: np.dtype) -> None:
    """Stores the tensors of a file in another type."""
    write_safetensors(path, {key: x.astype(dtype) for key, x in read_safetensors(path).items()})
