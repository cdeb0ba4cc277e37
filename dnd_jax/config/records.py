"""What a run was made with, and whether it is the same run now.

A record is JSON with sections of the settings as config.to_json() has them, beside digests of
contents. Of a stored one,
- a setting that it lacks, because a later version added it, is taken at its default;
- a setting of SAME_NUMBERS does not count, whether it is there or not;
- a setting that this version has no longer does not count at the value of GONE, at which nothing
  changes without it;
- anything else that differs is refused, unless --allow names it.
"""

import copy
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dnd_jax.config.load import DEFAULTS, load_file
from dnd_jax.core.errors import listed

# Settings that change no number of a result, beyond rounding: how often something is saved, where,
# and how the work is divided. Paths are here because the digests of what they lead to are recorded.
SAME_NUMBERS = (
    "base.path",
    "pretrain.save_every",
    "lora.save_every",
    "lora.tasks_at_once",
    "lora.remat",
    "condition.encoder",
    "condition.in_graph",
    "condition.too_long",
    "generator.convolution",
    "train.checkpoints",
    "train.targets_on",
    "train.micro_batches",
    "train.deterministic",
    "train.remat",
    "train.save_every",
    "train.save_every_seconds",
    "train.validate_every",
    "train.keep_last",
    "train.keep_every",
    "train.checkpoint_dir",
    "train.local_dir",
    "train.local_every_seconds",
    "train.trackers",
    "evaluate.batch_size",
    "evaluate.device",
    "evaluate.engine_adapters",
    "evaluate.engine_token_file",
    "evaluate.free_form",
    "evaluate.agreement",
    "evaluate.overhead",
    "mesh",
)
GONE: dict[str, Any] = {}  # {key: value}
# {key: whether a value that an earlier version recorded of it means the present one}
Older = Mapping[str, Callable[[Any], bool]]


def differences(then: Any, now: Any, path: str = "") -> dict[str, str]:
    """{key: "key: then -> now"} of every leaf in which two JSON-like values differ."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        found = {}
        for key in sorted(then.keys() | now.keys()):
            found |= differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if then == now else {path: f"{path}: {then!r} -> {now!r}"}


def check_same_run(
    where: os.PathLike,
    then: Mapping,
    now: Mapping,
    allowed: Collection[str] | None = (),
    older: Older | None = None,
    free: Collection[str] = SAME_NUMBERS,
) -> bool:
    """Whether a stored record is the present one; False when what differs is allowed to.

    allowed: names ("train.steps", "train") that may differ; None where the user cannot give any.
    older: what earlier versions recorded otherwise. free: the keys that do not count. Raises
    InputError listing everything else that differs.
    """
    then, now = (json.loads(json.dumps(record)) for record in (then, now))
    changed = {
        key: line
        for key, line in differences(_with_defaults(then, now), now).items()
        if not is_named(key, free)
        and not (key in GONE and _at(then, key) == GONE[key])
        and not (key in (older or {}) and older[key](_at(then, key)))
    }
    refused = [key for key in changed if not is_named(key, allowed or ())]
    if refused:
        ways = (
            "or use another --workdir"
            if allowed is None
            else f"use another --workdir, or allow them by --allow={','.join(refused)}"
        )
        raise listed(
            f"{where} was made with other settings; restore them, {ways} (then -> now)",
            [changed[key] for key in refused],
        )
    return not changed


def is_named(key: str, names: Collection[str]) -> bool:
    """Whether a key is one of these, or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _at(record: Any, key: str) -> Any:
    for name in key.split("."):
        record = record.get(name) if isinstance(record, Mapping) else None
    return record


@functools.cache
def _defaults() -> dict:
    return json.loads(load_file(DEFAULTS).to_json())


def _with_defaults(then: Mapping, now: Mapping) -> dict:
    """A stored record with the settings that it lacks, of those that are recorded now."""
    full = copy.deepcopy(dict(then))
    for name, section in _defaults().items():
        if isinstance(section, Mapping) and all(
            isinstance(r.get(name), Mapping) for r in (then, now)
        ):
            lacking = now[name].keys() & section.keys() - then[name].keys()
            full[name] |= {key: section[key] for key in lacking}
    return full
