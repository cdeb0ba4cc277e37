"""The console command: dnd STAGE --config=FILE --workdir=DIR [--config.key=value ...]. `dnd` alone lists the stages."""

import glob
import os
import pathlib
import shlex
import sys
from collections.abc import Callable

from dnd_jax.errors import InputError

STAGES: dict[str, str] = {
    "quickstart": "the whole pipeline on a suite: table, results.json, report.html",
    "suite": "write the embedded suite to --out",
    "data-report": "what is in a suite's data, and what is wrong with it: duplicates, test questions in train, labels, ...",
    "pretrain": "a base LLM from scratch on the suite's corpus -> WORKDIR/base",
    "collect": "one LoRA a dataset, all at once -> WORKDIR/loras",
    "train": "the generator, from prompts and LoRA checkpoints -> WORKDIR/generator",
    "generate": "prompts -> PEFT adapter: --generator, --prompts, --out, --seed, --samples",
    "bench": "our methods and PyTorch side by side, measured; or --backend=tpu-aot: a TPU compiler's estimates",
    "lm-eval": "score the same adapters by EleutherAI's harness: --tasks=NAME,NAME:TASK,... --limit, --unsafe-code",
    "evaluate": "score generated adapters and their competitors in PyTorch -> WORKDIR/results.json",
}
DEFAULT_CONFIG = "configs/mini.py"


def usage() -> str:
    """The stages and the flags that they share."""
    lines = [f"  {name:<11} {text}" for name, text in STAGES.items()]
    return (
        "usage: dnd STAGE [--config=FILE] [--workdir=DIR] [--config.key=value ...]\n\n" + "\n".join(lines) + "\n\n"
        f"--config     a file of configs/ (default {DEFAULT_CONFIG}); any of its keys can be set: --config.train.steps=500\n"
        "--workdir    folder of the run (default runs/mini); the same command goes on where it was stopped\n"
        "--suite      folder or JSON file of your own tasks (default: the embedded suite)\n"
        "--strict     refuse a suite with faults in its data instead of warning\n"
        "--backend    bench: tpu-aot compiles for --topology (v5p:2x2x1, v5e:4x4, ...) without a TPU\n"
        "--layers     bench: every convolution of the configuration by itself\n"
        "--limits     bench: what the hardware allows for the paper's settings, by counting\n"
        "--tasks      lm-eval: NAME (an unseen dataset's questions), NAME:TASK or NAME:TASK@DATA; dnd_jax/harness.py\n"
        "--seeds      quickstart: comma-separated seeds (default: the config's)"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a stage; returns the exit status: 0 done or stopped by SIGTERM, 2 bad input, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):  # libtpu without a TPU: no questions to a metadata server
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from dnd_jax import loop

    loop.stop.install()
    try:
        if argv[0] not in STAGES:
            import difflib

            near = difflib.get_close_matches(argv[0], STAGES, n=1)
            raise InputError(f"no stage {argv[0]!r}" + (f"; did you mean {near[0]}?" if near else "; run `dnd` for the list"))
        _run(argv[0], argv[1:])
    except InputError as error:
        print(f"dnd: {error}", file=sys.stderr)
        return 2
    except (loop.Stopped, KeyboardInterrupt) as error:
        name = str(error) or "SIGINT"
        print(f"\nstopped by {name}; resume with: dnd {shlex.join(argv)}", file=sys.stderr)
        return 0 if name == "SIGTERM" else 130
    except OSError as error:
        what = f"{error.filename or 'disk'}: {error.strerror or error}"
        print(f"dnd: {what}; check the path, its rights and the free space", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str]):
    """absl flags and config overrides -> (flag values, frozen Config, config file). Raises InputError with the nearest name."""
    from absl import flags
    from ml_collections import config_flags

    from dnd_jax import config as config_lib

    values = flags.FlagValues()
    name = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), DEFAULT_CONFIG)
    arguments = [a for a in arguments if not a.startswith("--config=")]
    base = config_lib.load_file(name)
    flags.DEFINE_string("workdir", "runs/mini", "folder of the run", flag_values=values)
    flags.DEFINE_string("suite", "", "folder or JSON file of your own tasks", flag_values=values)
    flags.DEFINE_bool("strict", False, "refuse a suite with faults in its data", flag_values=values)
    flags.DEFINE_list("tasks", [], "lm-eval: NAME, NAME:TASK or NAME:TASK@DATA", flag_values=values)
    flags.DEFINE_integer("limit", 0, "lm-eval: questions a task; 0: all", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("unsafe-code", False, "lm-eval: allow tasks that run what a model wrote", flag_values=values)
    flags.DEFINE_list("seeds", [], "quickstart: seeds", flag_values=values)
    flags.DEFINE_string("generator", "", "generate: a trained generator's folder", flag_values=values)
    flags.DEFINE_string("prompts", "", "generate: file of prompts", flag_values=values)
    flags.DEFINE_string("out", "", "generate, suite: output folder", flag_values=values)
    flags.DEFINE_integer("seed", 0, "generate: draws the prompts", flag_values=values)
    flags.DEFINE_integer("samples", 1, "generate: adapters, from as many draws", lower_bound=1, flag_values=values)
    flags.DEFINE_string("backend", "", "bench: tpu-aot for a TPU compiler's estimates without a TPU", flag_values=values)
    flags.DEFINE_bool("layers", False, "bench: every convolution by itself", flag_values=values)
    flags.DEFINE_bool("limits", False, "bench: what hardware allows for the paper's settings", flag_values=values)
    flags.DEFINE_string("topology", "v5p:2x2x1", "bench: the TPU chips to compile for", flag_values=values)
    try:
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=["dnd", *arguments])
        rest = values(["dnd", *arguments])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error.args[0] if error.args else error).replace("\n", " ")
        raise InputError(f"{text} (configuration {name})") from None
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; options are --name=value")
    if values.suite:
        base.suite = values.suite
    return values, config_lib.freeze(base), name


def _seeds(values, config) -> list[int]:
    if not values.seeds:
        return [config.seed]
    if not all(s.strip().isdigit() for s in values.seeds) or len(set(values.seeds)) < len(values.seeds):
        raise InputError(f"--seeds={','.join(values.seeds)}: expected different whole numbers, such as 0,1,2")
    return [int(s) for s in values.seeds]


def _need(values, *names: str) -> None:
    for name in names:
        if not getattr(values, name):
            raise InputError(f"--{name} is needed")


def _run(stage: str, arguments: list[str]) -> None:
    if any(a in ("-h", "--help") for a in arguments):
        print(usage())
        return
    values, config, config_file = _parse(arguments)
    workdir = pathlib.Path(values.workdir)
    runners: dict[str, Callable[[], None]] = {
        "suite": lambda: _suite(values, config),
        "data-report": lambda: _data_report(values, config, workdir),
        "quickstart": lambda: _quickstart(values, config, workdir),
        "generate": lambda: _generate(values),
        "bench": lambda: _bench(values, config, config_file, workdir),
    }
    runners.get(stage, lambda: _stage(stage, values, config, workdir))()


def _suite(values, config) -> None:
    from dnd_jax.world import write_world

    _need(values, "out")
    write_world(values.out, config.seed)
    print(f"suite: {pathlib.Path(values.out).absolute()}")


def _data_report(values, config, workdir: pathlib.Path) -> None:
    from dnd_jax import hygiene
    from dnd_jax.suite import load_suite

    suite = load_suite(config.suite or workdir / "suite", 1)
    print(hygiene.report(suite), flush=True)
    if values.strict:
        hygiene.check(suite, strict=True)


def _quickstart(values, config, workdir: pathlib.Path) -> None:
    from dnd_jax.quickstart import quickstart

    quickstart(config, workdir, _seeds(values, config), values.strict)


def _generate(values) -> None:
    from dnd_jax.generate import TrainedGenerator

    _need(values, "generator", "prompts", "out")
    generator = TrainedGenerator(values.generator)
    prompts = generator.read(values.prompts)
    out = pathlib.Path(values.out)
    for sample in range(values.samples):
        folder = out if values.samples == 1 else out / f"sample_{sample}"
        print(f"adapter: {generator.write(prompts, folder, values.seed + sample, values.prompts).absolute()}")


def _bench(values, config, config_file: str, workdir: pathlib.Path) -> None:
    if values.limits:
        from dnd_jax.bench.limits import limits_table

        print(limits_table())
        return
    if values.layers:
        from dnd_jax.bench.layers import layers_table

        print(layers_table(config))
        return
    if values.backend not in ("", "tpu-aot"):
        raise InputError(f"--backend={values.backend}: only tpu-aot, or nothing for the devices of this machine")
    if values.backend:
        from dnd_jax.bench.tpu import estimate

        estimate(config, values.topology, workdir)
        return
    from dnd_jax.bench.run import bench

    bench(config, config_file, workdir)


def _stage(stage: str, values, config, workdir: pathlib.Path) -> None:
    from dnd_jax import quickstart as q

    workdir.mkdir(parents=True, exist_ok=True)
    suite = q.open_suite(config, workdir, values.strict)
    if stage == "pretrain":
        print(f"base: {q.make_base(config, suite, workdir)}")
        return
    if stage == "train":
        print(f"generator: {q.train(config, suite, workdir)}")
        return
    base = config.base.path or str(workdir / "base")
    if not config.base.path and not (workdir / "base" / "config.json").is_file():
        raise InputError(f"{base}: no base here; run `dnd pretrain` first or set --config.base.path")
    if stage == "collect":
        folder = q.collect(config, suite, base, workdir)
        print(f"{q.score_table(folder)}\nLoRA checkpoints: {folder}")
    elif stage == "lm-eval":
        from dnd_jax.harness import lm_eval_stage

        lm_eval_stage(config, suite, base, workdir, values.tasks, values.limit, values["unsafe-code"].value)
    else:
        with q.timed(workdir, "evaluate"):
            evaluation = q.evaluate(config, suite, base, workdir)
        run = {"suite": suite.name, "train": [d.name for d in suite.train], **evaluation}
        q.finish({config.seed: {**run, "seconds": q.read_json(workdir / q.SECONDS)}}, config, workdir)


if __name__ == "__main__":
    sys.exit(main())
