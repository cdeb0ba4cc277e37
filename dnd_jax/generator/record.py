"""What a generator was made with: the record of its training, which stands in generator.json and
beside every checkpoint."""

import pathlib
from collections.abc import Collection

from dnd_jax.base.hub import is_hub_id
from dnd_jax.config.records import SAME_NUMBERS, Older, check_same_run
from dnd_jax.config.schema import Condition, Config
from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import Suite
from dnd_jax.encoders.cache import identify, is_encoder
from dnd_jax.generator.folder import (
    DESCRIPTION,
    MODEL,
    find_generator,
    read_description,
    read_record,
)
from dnd_jax.generator.objective import Source, source_of, taught_by
from dnd_jax.lora.checkpoints import Checkpoints


def settings_of(config: Config, suite: Suite) -> dict:
    """The settings that a generator depends on; what it starts from by its contents."""
    full = config.to_json()
    training = {k: value for k, value in full["train"].items() if f"train.{k}" not in SAME_NUMBERS}
    del training["init_from"]  # a path
    if config.train.init_from:
        start = find_generator(config.train.init_from)
        training["init_from"] = digests.of_file(start / MODEL)
    sections = {key: full[key] for key in ("seed", "condition", "generator")}
    return sections | {"train": training, "suite": suite.fingerprint}


def older_values(config: Config, source: Source) -> Older:
    """What records without a format number say instead of the present digests."""
    known = isinstance(source, Checkpoints)
    return {
        "checkpoints": lambda then: known and then == source.digest_of_format_0(),
        "encoder": lambda then: is_encoder(then, config.condition),
        "train.init_from": lambda then: then == config.train.init_from,
    }


def is_finished(
    folder: pathlib.Path,
    config: Config,
    suite: Suite,
    workdir: pathlib.Path,
    allowed: Collection[str] | None,
    base_name: str = "",
) -> bool:
    """Whether a folder has the generator of this configuration. suite: with the datasets that are
    trained on. Raises InputError when it has one of other settings that are not allowed to differ,
    or whose adapters call their base otherwise than `base_name`, if one is given.
    """
    if not (folder / DESCRIPTION).is_file():
        return False
    then, now = read_record(folder), settings_of(config, suite)
    source = source_of(config, suite, workdir)
    taught = taught_by(config, source, workdir)
    if "checkpoints" not in then and "base" not in then:  # the first versions do not say
        taught.pop("checkpoints", None)
    now |= taught
    now["encoder"] = _encoder(then, config.condition)
    older = older_values(config, source)
    same = check_same_run(folder / DESCRIPTION, then, now, allowed, older)
    called = read_description(folder).adapter.base if same and base_name else base_name
    if called != base_name:
        raise InputError(
            f"{folder}: is finished, and its adapters call their base {called!r}; name another by "
            f"`dnd generate --base-name={base_name}`"
        )
    return same


def _encoder(then: dict, condition: Condition) -> str:
    """The encoder's fingerprint. A hub id is the commit that was recorded: it is not asked for."""
    if is_hub_id(condition.encoder) and condition.encoder == then["condition"]["encoder"]:
        return then["encoder"]
    return identify(condition)
