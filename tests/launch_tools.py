"""Stand-ins for gcloud, kubectl and SLURM's commands, which are not here. They refuse what the real
ones do: subcommands and flags that their references do not list, values of another kind, and calls
without what a command needs.

    python tests/launch_tools.py gcloud compute tpus ...     # status 2 and a line of why, or 0
"""

import dataclasses
import re
import sys

NUMBER, ANY, ALL = r"[1-9]\d*", r".+", r"0|[1-9]\d*|all"


@dataclasses.dataclass(frozen=True)
class Command:
    """What one subcommand takes: arguments without a flag, --flag=VALUE with the pattern of VALUE,
    --flag alone, and the sets of flags of which exactly one must be given, whole."""

    arguments: int
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    switches: tuple[str, ...] = ()
    needs: tuple[tuple[str, ...], ...] = ()
    runs: bool = False  # what follows the first argument is a program's own


WHERE = {"zone": r"[a-z]+-[a-z]+\d-[a-z]", "project": ANY}
ON_WORKERS = {"node": ALL, "worker": ALL, "batch-size": r"[1-9]\d*|all"}
QUEUED = "gcloud compute tpus queued-resources"
TASKS = {"nodes": NUMBER, "ntasks-per-node": NUMBER, "gpus-per-node": NUMBER, "time": r"[\d:-]+"}
COMMANDS = {
    f"{QUEUED} create": Command(
        1,
        {
            "accelerator-type": r"v\d\w*-\d+",
            "runtime-version": ANY,
            "node-id": ANY,
            "node-count": NUMBER,
            "node-prefix": ANY,
            **WHERE,
        },
        ("spot", "reserved", "best-effort", "guaranteed", "async", "internal-ips"),
        (("node-id",), ("node-count", "node-prefix")),
    ),
    f"{QUEUED} describe": Command(1, {"format": r"(value|json|yaml)(\([\w.,]+\))?", **WHERE}),
    f"{QUEUED} delete": Command(1, WHERE, ("force", "quiet", "async")),
    f"{QUEUED} ssh": Command(1, {"command": ANY, **ON_WORKERS, **WHERE}, needs=(("command",),)),
    f"{QUEUED} scp": Command(2, {**ON_WORKERS, **WHERE}, ("recurse", "compress")),
    "kubectl apply": Command(
        0, {"filename": ANY, "namespace": ANY}, ("server-side",), (("filename",),)
    ),
    "kubectl get": Command(2, {"output": r"wide|name|json|yaml", "namespace": ANY}),
    "kubectl delete": Command(2, {"namespace": ANY, "grace-period": NUMBER}),
    "kubectl logs": Command(
        0,
        {"selector": r"[\w./-]+=.+", "tail": r"-1|\d+", "max-log-requests": NUMBER}
        | {"namespace": ANY},
        ("follow", "prefix"),
        (("selector",),),
    ),
    "srun": Command(
        1, {"kill-on-bad-exit": r"0|1", "wait": r"\d+", **TASKS}, ("label",), runs=True
    ),
    "sbatch": Command(
        1,
        {"job-name": ANY, "output": ANY, "open-mode": r"append|truncate"}
        | {"signal": r"([RB]+:)?[A-Z]+(@\d+)?", **TASKS},
        ("requeue", "no-requeue"),
        runs=True,
    ),
    "scancel": Command(1, {"signal": r"[A-Z]+|\d+"}, ("batch", "full")),
    "scontrol requeue": Command(1),
}


def refusal(words: list[str]) -> str:
    """Why a command would not run; "" if it would."""
    flags = [word for word in words if word.startswith("--")]
    plain = [word for word in words if not word.startswith("--")]
    name = next((name for name in COMMANDS if plain[: len(name.split())] == name.split()), None)
    if name is None:
        return f"no such command: {' '.join(plain)}"
    command, arguments = COMMANDS[name], plain[len(name.split()) :]
    if command.runs and arguments:
        at = words.index(arguments[0])
        flags, arguments = [w for w in words[:at] if w.startswith("--")], arguments[:1]
    if len(arguments) != command.arguments:
        return f"{name}: {len(arguments)} arguments instead of {command.arguments}: {arguments}"
    given = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    for flag, value in given.items():
        if flag in command.switches and not value:
            continue
        if not re.fullmatch(command.values.get(flag, r"(?!)"), value, re.DOTALL):
            return f"{name}: --{flag}{'=' if value else ''}{value}: not known"
    if command.needs and sum(given.keys() >= set(needed) for needed in command.needs) != 1:
        return f"{name}: one of {command.needs} is needed"
    return ""


if __name__ == "__main__":
    why = refusal(sys.argv[1:])
    print(why, file=sys.stderr)
    sys.exit(2 if why else 0)
