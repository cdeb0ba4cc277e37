"""What a run was made with, and whether it is the same run now."""

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from dnd_jax.core.errors import listed


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Every leaf in which two JSON-like values differ, as "key: then -> now"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = sorted(then.keys() | now.keys())
        return [
            d
            for k in keys
            for d in differences(then.get(k), now.get(k), f"{path}.{k}" if path else k)
        ]
    return [] if then == now else [f"{path}: {then!r} -> {now!r}"]


def check_same_run(
    where: os.PathLike, then: Any, now: Any, allowed: Collection[str] | None = None
) -> bool:
    """Whether a run's stored settings are the present ones. allowed: names ("train.steps", "train")
    that may differ; None where the user cannot give any.

    Raises InputError listing everything else that does.
    """
    changed = differences(json.loads(json.dumps(then)), json.loads(json.dumps(now)))
    keys = {line: line.split(": ", 1)[0] for line in changed}
    refused = [
        line
        for line, key in keys.items()
        if not any(key == name or key.startswith(f"{name}.") for name in allowed or ())
    ]
    if refused:
        names = ",".join(keys[line] for line in refused)
        ways = (
            "or use another --workdir"
            if allowed is None
            else f"use another --workdir, or allow them by --allow={names}"
        )
        raise listed(
            f"{where} was made with other settings; restore them, {ways} (then -> now)", refused
        )
    return not changed
