"""Names that become folders and files of a run: of datasets and of an ablation's variants. One rule
for all of them."""

import re
import unicodedata
from collections.abc import Collection, Iterable

LONGEST = 150  # bytes: a file system takes 255, of which temporary names need some
# Of files that are written beside a folder of such a name.
_OURS = re.compile(r"\.(json|jsonl|yaml|safetensors|npy|html|md|png|damaged)$", re.IGNORECASE)


def name_fault(name: object, taken: Collection[str] = ()) -> str:
    """Why this cannot name a folder; empty when it can. taken: names that mean something else
    there.

    A name is a text of 1 to LONGEST bytes without / \\ : @ and invisible characters, without a
    space at an end; it begins with neither . nor -, and does not end as a file of ours does.
    """
    if not isinstance(name, str) or not name:
        return f"{name!r} cannot name a folder: it is {'empty' if name == '' else 'no text'}"
    shown = repr(name if len(name) < 60 else f"{name[:50]}...")
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") for c in name):
        why = "it has a character that cannot be seen"
    elif (size := len(name.encode())) > LONGEST:
        why = f"it is {size} bytes long, at most {LONGEST}"
    elif found := re.search(r"[/\\:@]", name):
        why = f"it has a {found[0]}"
    elif name[0] in ".-":
        why = f"it begins with {name[0]}"
    elif name != name.strip():
        why = "it begins or ends with a space"
    elif found := _OURS.search(name):
        why = f"it ends with {found[0]}, as files that are written beside it do"
    elif _folded(name) in {_folded(other) for other in taken}:
        why = "that is the name of something else there"
    else:
        return ""
    return f"{shown} cannot name a folder: {why}"


def twin_faults(names: Iterable[str]) -> list[str]:
    """The names that would share a folder where capitals and ways to write an accent make no
    difference, as on macOS."""
    seen: dict[str, str] = {}
    faults = []
    for name in dict.fromkeys(names):
        other = seen.setdefault(_folded(name), name)
        if other != name:
            faults.append(f"{other!r} and {name!r} are one folder on some systems; rename one")
    return faults


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
