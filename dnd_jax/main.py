"""The console command: dnd STAGE --config=FILE --workdir=DIR [--config.key=value ...]. `dnd` alone lists the stages."""

import dataclasses
import functools
import glob
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable

from dnd_jax.errors import CheckFailed, InputError, Missing, first_line

STAGES: dict[str, str] = {
    "quickstart": "the whole pipeline on a suite: table, results.json, report.html",
    "suite": "write the embedded suite to --out",
    "data-report": "what is in a suite's data, and what is wrong with it: duplicates, test questions in train, labels, ...",
    "pretrain": "a base LLM from scratch on the suite's corpus -> WORKDIR/base",
    "collect": "one LoRA a dataset, all at once -> WORKDIR/loras",
    "train": "the generator, from prompts and LoRA checkpoints -> WORKDIR/generator",
    "generate": "prompts -> PEFT adapter: --generator, --prompts, --out, --seed, --samples, --dtype, --merge, --push-to-hub",
    "import-generator": "a released generator (.pth) -> --out, a generator folder: --adapter, --config.generator.length_projection",
    "export-generator": "a generator folder -> --out, the original's .pth",
    "verify-adapter": "an adapter folder on --base in PyTorch: does it change the logits as its matrices say?",
    "init-config": "a configuration for another base -> --out=configs/NAME.py: --base, --adapter, --budget, --encoder, ...",
    "plan": "compile train and generation step for a TPU --topology or --devices that need not be there: memory, time, links",
    "ablate": "the configuration beside variants of it (configs/ablate_*.py): table and plot, with a control of wrong prompts",
    "bench": "our methods and PyTorch side by side, measured; or --backend=tpu-aot: a TPU compiler's estimates",
    "lm-eval": "score the same adapters by EleutherAI's harness: --tasks=NAME,NAME:TASK,... --limit, --unsafe-code",
    "overhead": "time and memory of generating an adapter against tuning one: --generator, --prompts, --base, --limit",
    "evaluate": "score generated adapters and their competitors in PyTorch -> WORKDIR/results.json",
}
DEFAULT_CONFIG = "configs/mini.py"
# Stages that take one file or folder by itself, and what it is.
POSITIONAL = {"import-generator": "X.pth", "export-generator": "GENERATOR", "verify-adapter": "ADAPTER"}
_ON_SUITE = "quickstart data-report pretrain collect train ablate evaluate lm-eval"
FLAGS: dict[str, tuple[type, object, str, str]] = {  # kind, default, the stages that read it, meaning; no number is below 0
    "workdir": (str, "runs/mini", f"{_ON_SUITE} plan bench overhead", "folder of the run; the same command goes on in it"),
    "suite": (str, "", _ON_SUITE, "folder or JSON file of your own tasks (default: the embedded suite)"),
    "strict": (bool, False, _ON_SUITE, "refuse a suite with faults in its data instead of warning"),
    "tasks": (list, [], "lm-eval", "NAME (an unseen dataset's questions), NAME:TASK or NAME:TASK@DATA; dnd_jax/harness.py"),
    "limit": (int, 0, "lm-eval overhead", "questions a task, or steps of tuning that are timed; 0: all"),
    "unsafe-code": (bool, False, "lm-eval", "allow tasks that run what a model wrote"),
    "seeds": (list, [], "quickstart ablate", "comma-separated seeds (default: the config's)"),
    "generator": (str, "", "generate overhead", "a trained or imported generator's folder"),
    "prompts": (str, "", "generate overhead", "file of prompts; for overhead with their responses"),
    "out": (str, "", "suite generate init-config import-generator export-generator", "what to write"),
    "seed": (int, 0, "generate", "draws the prompts"),
    "samples": (int, 1, "generate", "adapters, from as many draws"),
    "dtype": (str, "float32", "generate", "of the adapter's tensors, float32 or bfloat16"),
    "merge": (str, "", "generate", "a folder for the whole model, base + adapter, in the base's dtype"),
    "push-to-hub": (str, "", "generate", "USER/NAME to upload the adapter (with --merge: the whole model) to"),
    "base": (
        str,
        "",
        "init-config generate overhead verify-adapter",
        "its folder or hub id, for generate with --merge (default: the one the adapter names)",
    ),
    "adapter": (str, "", "import-generator init-config", "a PEFT adapter of the base (default: by the base and config.lora)"),
    "budget": (float, 0.0, "init-config", "parameters of the decoder, such as 1e9 (default: as the paper's settings spend them)"),
    "encoder": (str, "", "init-config", "the text encoder (default: config.condition.encoder)"),
    "num-prompts": (int, 0, "init-config", "prompts an adapter (default: config.condition.num_prompts)"),
    "max-text-length": (int, 0, "init-config", "tokens a prompt (default: config.condition.max_text_length)"),
    "backend": (str, "", "bench", "tpu-aot compiles for --topology (v5p:2x2x1, v5e:4x4, ...) without a TPU"),
    "topology": (str, "", "plan bench", "TPU chips to compile for, such as v5p:2x2x4 (plan without: this machine's devices)"),
    "devices": (int, 0, "plan", "virtual CPU devices to compile for"),
    "sweep": (bool, False, "plan", "every combination of config.sweep in one table and plot (configs/ablate_sharding.py)"),
    "measure": (bool, False, "plan", "run the steps on this machine's devices as well"),
    "allow": (list, [], "train", "settings that may differ from the run that is resumed, such as train.steps,train.clip"),
    "profile": (list, [], "train", "trace the steps between two numbers, such as 100,110, into WORKDIR/generator/profile"),
    "multihost": (bool, False, "train", "one process of a cluster that JAX detects (Cloud TPU, GKE, SLURM)"),
    "coordinator": (str, "", "train", "elsewhere, HOST:PORT of process 0"),
    "processes": (int, 1, "train", "with --coordinator, how many processes there are"),
    "process": (int, 0, "train", "with --coordinator, which one this is"),
    "start-timeout": (int, 300, "train", "seconds until all processes must have joined"),
    "layers": (bool, False, "bench", "every convolution of the configuration by itself"),
    "limits": (bool, False, "bench", "what the hardware allows for the paper's settings, by counting"),
}


def usage() -> str:
    """The stages and their flags."""
    width = max(map(len, STAGES))
    stages = "\n".join(f"  {name:<{width}}  {text}" for name, text in STAGES.items())
    flags = "\n".join(f"--{name:<15} {read_by.replace(' ', ', ')}: {meaning}" for name, (_, _, read_by, meaning) in FLAGS.items())
    return (
        f"usage: dnd STAGE [--config=FILE] [--workdir=DIR] [--config.key=value ...]\n\n{stages}\n\n"
        f"--config          a file of configs/ (default {DEFAULT_CONFIG}); any key can be set: --config.train.steps=500\n{flags}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a stage; returns the exit status: 0 done or stopped by SIGTERM or a preemption notice (75 with DND_REQUEUE=1), 1 a check
    failed, nothing fits or a device has no room, 2 bad input, 3 lost or (with DND_REQUEUE=1) missing processes, 130 Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):  # libtpu without a TPU: no questions to a metadata server
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from dnd_jax.stopping import Stopped, exit_status, requeued, stop

    stop.install()
    try:
        if argv[0] not in STAGES:
            import difflib

            near = difflib.get_close_matches(argv[0], STAGES, n=1)
            raise InputError(f"no stage {argv[0]!r}" + (f"; did you mean {near[0]}?" if near else "; run `dnd` for the list"))
        _run(argv[0], argv[1:])
    except (InputError, CheckFailed) as error:
        print(f"dnd: {error}", file=sys.stderr)
        if isinstance(error, Missing) and requeued():
            return 3  # as for a peer that is lost later: GKE starts all again, which it does not after bad input
        return 2 if isinstance(error, InputError) else 1
    except (Stopped, KeyboardInterrupt) as error:
        print(f"\nstopped by {str(error) or 'SIGINT'}; resume with: dnd {shlex.join(argv)}", file=sys.stderr)
        return exit_status(getattr(error, "signum", None))
    except RuntimeError as error:  # as JAX's and PyTorch's own are
        if "RESOURCE_EXHAUSTED" not in str(error) and type(error).__name__ != "OutOfMemoryError":
            raise
        hint = "a smaller batch, train.micro_batches, train.remat=stages or mesh.fsdp; `dnd plan` says what fits"
        print(f"dnd: no room on the device ({first_line(error)}); take {hint}", file=sys.stderr)
        return 1
    except OSError as error:
        what = f"{error.filename or 'disk'}: {error.strerror or error}"
        print(f"dnd: {what}; check the path, its rights and the free space", file=sys.stderr)
        return 2
    return 0


def _parse(stage: str, arguments: list[str]):
    """absl flags and config overrides -> (flag values, frozen Config, config file, the stage's own argument or "").

    Raises InputError with the nearest name.
    """
    from absl import flags
    from ml_collections import config_flags

    from dnd_jax import config as config_lib

    values = flags.FlagValues()
    # Released generators were trained with the paper's encoder, the default of default.py, over which a new file is a diff.
    default = "configs/default.py" if stage in ("import-generator", "init-config") else DEFAULT_CONFIG
    name = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), default)
    arguments = [a for a in arguments if not a.startswith("--config=")]
    base = config_lib.load_file(name)
    kinds = {
        str: flags.DEFINE_string,
        bool: flags.DEFINE_bool,
        int: functools.partial(flags.DEFINE_integer, lower_bound=0),
        float: functools.partial(flags.DEFINE_float, lower_bound=0.0),
        list: flags.DEFINE_list,
    }
    for flag, (kind, default, _, _) in FLAGS.items():
        kinds[kind](flag, default, "", flag_values=values)
    try:
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=["dnd", *arguments])
        rest = values(["dnd", *arguments])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{config_lib.said(error)} (configuration {name})") from None
    for flag, (_, _, read_by, _) in FLAGS.items():
        if values[flag].present and stage not in read_by.split():
            raise InputError(f"--{flag}: `dnd {stage}` does not read it; {read_by.replace(' ', ', ')} only")
    argument = rest.pop(0) if rest and stage in POSITIONAL else ""
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; options are --name=value")
    if stage in POSITIONAL and not argument:
        raise InputError(f"{POSITIONAL[stage]} is needed: dnd {stage} {POSITIONAL[stage]}")
    if values.suite:
        base.suite = values.suite
    return values, config_lib.freeze(base), name, argument


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
    values, config, config_file, argument = _parse(stage, arguments)
    workdir = pathlib.Path(values.workdir)
    runners: dict[str, Callable[[], None]] = {
        "suite": lambda: _suite(values, config),
        "data-report": lambda: _data_report(values, config, workdir),
        "quickstart": lambda: _quickstart(values, config, workdir),
        "generate": lambda: _generate(values, config),
        "import-generator": lambda: _import_generator(values, config, argument),
        "export-generator": lambda: _export_generator(values, argument),
        "verify-adapter": lambda: _verify_adapter(values, argument),
        "ablate": lambda: _ablate(values, config, workdir),
        "bench": lambda: _bench(values, config, config_file, workdir),
        "overhead": lambda: _overhead(values, config, workdir),
        "plan": lambda: _plan(values, config, workdir),
        "init-config": lambda: _init_config(values, config),
        "train": lambda: _train(values, config, workdir, arguments),
    }
    runners.get(stage, lambda: _stage(stage, values, config, workdir))()


def _suite(values, config) -> None:
    from dnd_jax.files import check_free
    from dnd_jax.world import write_world

    _need(values, "out")
    check_free(values.out, "out")
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


def _generate(values, config) -> None:
    from dnd_jax.adapters import DTYPES
    from dnd_jax.card import is_generated
    from dnd_jax.files import check_free
    from dnd_jax.generate import TrainedGenerator
    from dnd_jax.hub import check_repo_id, push
    from dnd_jax.merge import merge_adapter
    from dnd_jax.models.hf import resolve

    _need(values, "generator", "prompts", "out")
    if values.samples < 1:
        raise InputError(f"--samples={values.samples}: at least 1")
    if values.dtype not in DTYPES:
        raise InputError(f"--dtype={values.dtype}: none of {', '.join(DTYPES)}")
    repo = values["push-to-hub"].value
    if repo:
        check_repo_id(repo)
        if values.samples > 1:
            raise InputError("--push-to-hub takes one adapter; leave out --samples")
    parts = [""] if values.samples == 1 else [f"sample_{sample}" for sample in range(values.samples)]
    folders = [pathlib.Path(values.out, part) for part in parts]
    merged = [pathlib.Path(values.merge, part) for part in parts] if values.merge else []
    for folder in folders:
        if not is_generated(folder):  # one can generate again into the same place
            check_free(folder, "out")
    for folder in merged:
        check_free(folder, "merge")
        if any(out.resolve().is_relative_to(folder.resolve()) for out in folders):
            raise InputError(f"--merge={values.merge}: would replace the adapter in --out={values.out}; choose another --merge")
    generator = TrainedGenerator(values.generator, config.mesh)
    prompts = generator.read(values.prompts)
    base = resolve(values.base or generator.adapter.base) if values.merge else None
    for sample, folder in enumerate(folders):
        seed = values.seed + sample
        folder = generator.write(prompts, folder, seed, values.prompts, values.dtype)
        print(f"adapter: {folder.absolute()}")
        if values.merge:
            card = generator.card(generator.draw(prompts, seed, values.prompts), seed, merged=True)
            folder = merge_adapter(base, folder, merged[sample], card)
            print(f"model: {folder.absolute()}")
    if repo:
        print(f"pushed: {push(folder, repo)}")


def _import_generator(values, config, path: str) -> None:
    from dnd_jax.interop import import_generator

    _need(values, "out")
    print(f"generator: {import_generator(path, values.out, config, values.adapter).absolute()}")


def _export_generator(values, folder: str) -> None:
    from dnd_jax.interop import export_generator

    _need(values, "out")
    print(f"state dict: {export_generator(folder, values.out).absolute()}")


def _verify_adapter(values, folder: str) -> None:
    from dnd_jax.verify import verify_on_base

    print(verify_on_base(folder, values.base))


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

        estimate(config, values.topology or "v5p:2x2x1", workdir)
        return
    from dnd_jax.bench.run import bench

    bench(config, config_file, workdir)


def _init_config(values, config) -> None:
    import dataclasses

    from dnd_jax.init_config import init_config

    _need(values, "out")
    given = {
        "encoder": values.encoder,
        "num_prompts": values["num-prompts"].value,
        "max_text_length": values["max-text-length"].value,
    }
    condition = dataclasses.replace(config.condition, **{key: value for key, value in given.items() if value})
    print(init_config(dataclasses.replace(config, condition=condition), values.out, values.base, values.adapter, values.budget))


def _overhead(values, config, workdir: pathlib.Path) -> None:
    from dnd_jax import overhead

    _need(values, "generator", "prompts")
    result = overhead.overhead(config, values.generator, values.prompts, workdir, values.base, values.limit)
    print(f"{overhead.describe(result)}\nmeasurements: {(workdir / overhead.RESULT).absolute()}")


def _plan(values, config, workdir: pathlib.Path) -> None:
    if values.devices and values.topology:
        raise InputError("--devices (virtual CPU devices) and --topology (TPU chips) exclude each other")
    if values.measure and (values.topology or (values.sweep and config.sweep.topologies and not values.devices)):
        raise InputError("--measure runs on this machine's devices; leave --topology and config.sweep.topologies empty")
    if values.devices:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"{flags} --xla_force_host_platform_device_count={values.devices}")
    elif values.topology or (values.sweep and config.sweep.topologies):
        os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs
    from dnd_jax import plan, sweep
    from dnd_jax.config import STEPS

    if values.topology or values.devices:
        config = dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, topologies=(values.topology,)))
    if values.sweep:
        plans = sweep.sweep(config, workdir, values.measure)
        more = ", scaling.png" if (workdir / "scaling.png").is_file() else ""
        print(f"\n{sweep.as_markdown(plans)}\n\nplans: {workdir.absolute()}/plans.{{json,csv,md,png}}{more}", flush=True)
    else:
        devices = plan.devices_of(values.topology, config.mesh.slices)
        plans = [plan.make_plan(config, devices, step, values.measure) for step in STEPS]
        print("\n\n".join(map(plan.describe_plan, plans)), flush=True)
    if not any(p.fits for p in plans if p.step == plans[0].step):
        raise CheckFailed(sweep.nearest_miss(plans))


def _ablate(values, config, workdir: pathlib.Path) -> None:
    from dnd_jax.ablate import ablate

    ablate(config, workdir, _seeds(values, config), values.strict)


def _train(values, config, workdir: pathlib.Path, arguments: list[str]) -> None:
    from dnd_jax import multihost
    from dnd_jax import quickstart as q

    several = values.coordinator or values.multihost
    if not several and (values.processes > 1 or values.process):
        raise InputError("--processes and --process need --coordinator=HOST:PORT of process 0")
    if values.process >= values.processes and values.coordinator:
        raise InputError(f"--process={values.process} is not one of 0 to {values.processes - 1} (--processes={values.processes})")
    profile = [int(step) for step in values.profile if step.isdigit()]
    if values.profile and (len(values.profile) != 2 or len(profile) != 2 or profile[0] >= profile[1]):
        raise InputError(f"--profile={','.join(values.profile)}: expected two steps, the first below the second, such as 100,110")
    same = [json.dumps(config.to_json(), sort_keys=True), *values.allow, *values.profile]
    address = values.coordinator, values.processes, values.process
    with multihost.joined(*address, values.multihost, values["start-timeout"].value, same):
        multihost.check_shared(workdir)
        if config.train.checkpoint_dir and "://" not in config.train.checkpoint_dir:
            multihost.check_shared(pathlib.Path(config.train.checkpoint_dir), "config.train.checkpoint_dir")
        workdir.mkdir(parents=True, exist_ok=True)
        with multihost.lead_first():
            suite = q.open_suite(config, workdir, values.strict)
        folder = q.train(config, suite, workdir, values.allow, tuple(profile) or None)
        if multihost.lead():
            print(f"generator: {folder}")


def _stage(stage: str, values, config, workdir: pathlib.Path) -> None:
    from dnd_jax import quickstart as q

    workdir.mkdir(parents=True, exist_ok=True)
    suite = q.open_suite(config, workdir, values.strict, scored=stage in ("evaluate", "lm-eval"))
    if stage == "pretrain":
        print(f"base: {q.make_base(config, suite, workdir)}")
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
        run = {"suite": suite.name, **evaluation}
        q.finish({config.seed: {**run, "seconds": q.read_json(workdir / q.SECONDS)}}, config, workdir)


if __name__ == "__main__":
    sys.exit(main())
