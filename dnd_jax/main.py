"""The console command, dnd STAGE [--config.KEY=VALUE ...]; `dnd` alone lists the stages."""

import os
import shlex
import sys

from dnd_jax import __version__
from dnd_jax.core import environment
from dnd_jax.core.errors import (
    CheckFailed,
    InputError,
    Lost,
    Missing,
    first_line,
    is_no_room,
    nearest,
    tell,
)
from dnd_jax.core.processes import STDOUT, nobody_reads
from dnd_jax.core.stage import stage_of

# Stage -> (the room whose commands.py has it, what it makes).
STAGES: dict[str, tuple[str, str]] = {
    "quickstart": ("studies", "the pipeline on a suite: results.json, report.html"),
    "suite": ("data", "write an embedded suite to --out"),
    "data-report": ("studies", "what is in a suite's data, and what is wrong with it"),
    "pretrain": ("base", "a base LLM from scratch on the suite's corpus -> WORKDIR/base"),
    "collect": ("lora", "one LoRA a dataset, all at once -> WORKDIR/loras"),
    "controls": ("lora", "LoRAs to compare with: one for all tasks, few-shot tuned ones"),
    "train": ("generator", "the generator, from prompts and LoRAs -> WORKDIR/generator"),
    "generate": ("generator", "prompts -> PEFT adapters; merged, or pushed to the hub"),
    "ask": ("serving", "one question, answered without and with an adapter of prompts"),
    "serve": ("serving", "a trained generator over HTTP: prompts in, adapters out"),
    "push-generator": ("generator", "a generator to the hub, for --generator=USER/NAME"),
    "evaluate": ("scoring", "score adapters in PyTorch -> WORKDIR/results.json"),
    "lm-eval": ("scoring", "score them by EleutherAI's harness -> WORKDIR/lm_eval.json"),
    "verify-adapter": ("lora", "does an adapter change its base as its matrices say?"),
    "export-gguf": ("lora", "an adapter for llama.cpp -> --out, a GGUF file"),
    "import-generator": ("generator", "a released .pth -> --out, a folder"),
    "export-generator": ("generator", "a generator folder -> --out, a .pth"),
    "init-config": ("generator", "settings for another base -> --out=NAME.py"),
    "plan": ("costs", "what the real steps cost on devices that need not be there"),
    "bench": ("costs", "our methods and PyTorch side by side, measured"),
    "ablate": ("studies", "a configuration beside variants of it: table and plot"),
    "doctor": ("studies", "what would go wrong later, found before hours are spent"),
    "overhead": ("studies", "time and memory of generating an adapter, of tuning one"),
}


def usage() -> str:
    """The stages."""
    width = max(map(len, STAGES))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in STAGES.items())
    form = "dnd STAGE [--config=SETTINGS] [--workdir=DIR] [--config.KEY=VALUE ...]"
    return (
        f"usage: {form}\n\n{rows}\n\ndnd STAGE --help lists a stage's flags. "
        "SETTINGS: a file, or the name of shipped ones such as mini."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a stage; returns the exit status: 0 done or stopped by SIGTERM or a preemption notice
    (75 with DND_REQUEUE=1), 1 a check failed, nothing fits or a device has no room, 2 bad input or
    a folder that another run has, 3 lost or (with DND_REQUEUE=1) missing processes, 130 Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    status = 0
    try:
        status = _main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `dnd ... | head`: whoever read has read enough
        if not nobody_reads(STDOUT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return status


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"dnd-jax {__version__}")
        return 0
    environment.prepare()
    from dnd_jax.core.stopping import Stopped, exit_status, requeued, stop

    stop.install()
    try:
        _run(argv[0], argv[1:])
    except (InputError, CheckFailed, Lost) as error:
        tell(error)
        if isinstance(error, Missing) and requeued():
            return 3  # as for a peer lost later: GKE starts all again, but not after bad input
        return 1 if isinstance(error, CheckFailed) or is_no_room(error) else 2
    except (Stopped, KeyboardInterrupt) as error:
        print(
            f"\nstopped by {str(error) or 'SIGINT'}; resume with: dnd {shlex.join(argv)}",
            file=sys.stderr,
        )
        return exit_status(getattr(error, "signum", None))
    except (RuntimeError, MemoryError, AssertionError) as error:  # JAX's, PyTorch's: the first
        if not is_no_room(error):
            if (refusal := environment.refused(error)) is None:
                raise
            tell(refusal)
            return 1 if isinstance(refusal, CheckFailed) else 2
        tell(
            f"no room on the device ({first_line(error)}); take a smaller batch, "
            "train.micro_batches, train.remat=stages or mesh.fsdp; `dnd plan` says what fits"
        )
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads(STDOUT):
            raise
        what = f"{error.filename or 'disk'}: {error.strerror or error}"
        tell(f"{what}; check the path, its rights and the free space")
        return 2
    return 0


def _run(name: str, words: list[str]) -> None:
    """Parses a stage's flags, imports its module, and it alone with what it needs, and runs it."""
    if name not in STAGES:
        raise InputError(f"no stage {name!r}{nearest(name, STAGES) or '; run `dnd` for the list'}")
    from dnd_jax.config import command
    from dnd_jax.config.remembered import remembering
    from dnd_jax.core import packages
    from dnd_jax.core.workdir import held

    room, summary = STAGES[name]
    stage = stage_of(room, name)
    if any(word in ("-h", "--help") for word in words):
        print(command.usage(name, stage, summary))
        return
    given = command.parse(name, stage, words)
    try:
        needed = stage.packages(given)
        packages.check(name, needed)
        environment.settle(needed)
        run = stage.load()
    except ValueError as error:  # JAX reads its variables when it is imported
        raise environment.refused(error) or error from None
    if not stage.writes:
        run(given)
        return
    seeds = given.seeds() if "seeds" in given.flags else ()
    with held(given.workdir, name), remembering(given.workdir, given.config, seeds):
        run(given)
