"""Stage `generate`: prompts of an unseen task -> a PEFT adapter (docs/METHOD.md section 7). No
template adapter, no training.

dnd generate --generator=RUN --prompts=FILE --out=DIR [--seed=0] [--samples=1] [--strength=0.7]
             [--dtype=bfloat16] [--merge=MODEL] [--config.mesh.fsdp=8]
dnd generate --generator=RUN --prompts=FOLDER --out=DIR    a file of prompts -> DIR/NAME each
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

from dnd_jax.base.hub import check_repo_id, is_repo_id, kept_revision, push, resolve
from dnd_jax.base.identity import other_weights
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import check_free
from dnd_jax.core.stage import Given
from dnd_jax.data.rows import prompt_files
from dnd_jax.generator.trained import (
    TrainedGenerator,
    check_strength,
    load_generator,
)
from dnd_jax.lora.adapter import DTYPES
from dnd_jax.lora.card import is_generated, names_hub_model
from dnd_jax.lora.merge import FILES, merge_adapter


def generate_adapter(
    run_dir: str | os.PathLike,
    prompts: Sequence[str] | str | os.PathLike,
    out_dir: str | os.PathLike,
    seed: int = 0,
) -> pathlib.Path:
    """Writes a PEFT adapter for the task of `prompts` (texts, or a file of them) and returns its
    folder.

    The seed draws N of the prompts. Raises InputError for too few prompts, a damaged generator or
    an unwritable folder.
    """
    generator, source = load_generator(run_dir), "prompts"
    if isinstance(prompts, str | os.PathLike):
        source, prompts = os.fspath(prompts), generator.read(prompts)
    generator.check(prompts, source)
    return generator.write(list(prompts), out_dir, seed, source)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """One adapter: whose prompts, drawn by which seed, written where, merged into which folder."""

    source: pathlib.Path
    seed: int
    folder: pathlib.Path
    merged: pathlib.Path | None


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("generator", "prompts", "out")
    wanted = _wanted(given)
    generator = TrainedGenerator(
        given["generator"],
        given.config.mesh,
        base_name=given["base-name"],
        key_prefix=given["key-prefix"],
    )
    if given["push-to-hub"]:
        _check_base_name(given, generator.adapter.base)
    prompts = {one.source: generator.read(one.source) for one in wanted}
    for source, of_source in prompts.items():
        generator.check(of_source, str(source), given.config.condition.too_long)
    base = trained_base(given["base"], generator, "--merge") if given["merge"] else None
    warned: set[pathlib.Path] = set()
    for first in range(0, len(wanted), generator.at_once):
        some = wanted[first : first + generator.at_once]
        drawn = [generator.draw(prompts[one.source], one.seed, str(one.source)) for one in some]
        for one, made in zip(some, generator.make(drawn), strict=True):
            if made.warning and one.source not in warned:
                warned.add(one.source)
                print(f"warning: {one.source}: {made.warning}", file=sys.stderr)
            how = one.seed, given["dtype"], given["strength"]
            folder = generator.save(made, one.folder, *how)
            print(f"adapter: {folder.absolute()}")
            if one.merged:
                card = generator.card(made, one.seed, given["strength"], merged=True)
                folder = merge_adapter(base, folder, one.merged, card)
                print(f"model: {folder.absolute()}")
    if given["push-to-hub"]:
        print(f"pushed: {push(folder, given['push-to-hub'], given['public'])}")


def trained_base(name: str, generator: TrainedGenerator, what: str) -> pathlib.Path:
    """The folder of the base of that name; empty: the one that a generator's adapters name. what
    needs it, for messages. Raises InputError where the generator's LoRAs were trained on other
    weights than their base's name means, unless a name is given; as `resolve`."""
    if generator.adapter.weights and not name:
        raise InputError(
            f"{what}: the LoRAs were trained on {generator.adapter.weights}; give that file by "
            f"--base, or --base={generator.base} for the hub's own weights, which are other numbers"
        )
    base = base_to_merge(name or generator.base, generator.folder)
    if note := other_weights(generator.adapter.weights, base):
        print(f"note: {base}: the generator's LoRAs were {note}", file=sys.stderr)
    return base


def base_to_merge(name: str, generator: pathlib.Path) -> pathlib.Path:
    """The folder of the base to merge into; of a hub id, the commit that the generator's run took,
    where its folder says so. Raises InputError as `resolve`."""
    return resolve(name, FILES, kept_revision(name, generator.parent))


def _check_base_name(given: Given, base: str) -> None:
    """Raises InputError where an adapter would be uploaded whose base only this machine has."""
    if not (is_repo_id(base) if given["base-name"] else names_hub_model(base)):
        raise InputError(
            f"--push-to-hub: the adapter would name its base {base!r}, which is not on the hub; "
            "say by --base-name=USER/NAME which it is"
        )


def _wanted(given: Given) -> list[_Wanted]:
    """Each file's adapters, one a sample. Raises InputError for flags that cannot be, and for
    folders in use."""
    if given["samples"] < 1:
        raise InputError(f"--samples={given['samples']}: at least 1")
    if given["dtype"] not in DTYPES:
        raise InputError(f"--dtype={given['dtype']}: none of {', '.join(DTYPES)}")
    check_strength(given["strength"], "--strength")
    if given["merge"] and given["key-prefix"]:
        raise InputError("--key-prefix is for servers that load the adapter; leave out --merge")
    if given["base"] and not given["merge"]:
        raise InputError("--base is for --merge=FOLDER; what an adapter calls it is --base-name")
    if given["public"] and not given["push-to-hub"]:
        raise InputError("--public is for --push-to-hub=USER/NAME")
    files = prompt_files(given["prompts"])
    if given["push-to-hub"]:
        check_repo_id(given["push-to-hub"])
        if given["samples"] > 1:
            raise InputError("--push-to-hub takes one adapter; leave out --samples")
        if "" not in files:
            raise InputError("--push-to-hub takes one adapter; give one file by --prompts")
    wanted = _of_files(given, files)
    for one in wanted:
        if not is_generated(one.folder):  # one can generate again into the same place
            check_free(one.folder, "out")
        if one.merged:
            check_free(one.merged, "merge")
            if any(other.folder.resolve().is_relative_to(one.merged.resolve()) for other in wanted):
                raise InputError(
                    f"--merge={given['merge']}: would replace the adapter in --out={given['out']}; "
                    "choose another --merge"
                )
    return wanted


def _of_files(given: Given, files: Mapping[str, pathlib.Path]) -> list[_Wanted]:
    """NAME/sample_I of each file and sample; without NAME of a single file, without sample_I of a
    single sample."""
    wanted = []
    for name, source in files.items():
        for sample in range(given["samples"]):
            part = pathlib.Path(name, f"sample_{sample}" if given["samples"] > 1 else "")
            merged = pathlib.Path(given["merge"], part) if given["merge"] else None
            folder = pathlib.Path(given["out"], part)
            wanted.append(_Wanted(source, given["seed"] + sample, folder, merged))
    return wanted
