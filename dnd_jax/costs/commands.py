"""The commands of this room."""

from dnd_jax.config.studies import STEPS
from dnd_jax.core import packages
from dnd_jax.core.stage import DEFAULT, WORKDIR, Flag, Given, Stage

# Its cases, which it has to read, say what it needs.
bench = packages.deferred("dnd_jax.costs.bench.run")

PLANNED = (
    WORKDIR,
    Flag(
        "topology",
        str,
        "",
        "TPU chips to compile for, such as v5p:2x2x4 (default: this machine's devices)",
    ),
    Flag("devices", int, 0, "virtual CPU devices to compile for"),
    Flag(
        "sweep",
        bool,
        False,
        "every combination of config.sweep in one table and plot (configs/ablate_sharding.py)",
    ),
    Flag("step", str, "", f"one of {', '.join(STEPS)} (default: the first two)"),
    Flag(
        "answer-tokens",
        int,
        0,
        "of the longest answer, where the base is asked (default: all that config.base.max_length "
        "leaves)",
    ),
    Flag(
        "lora-checkpoints",
        int,
        0,
        "of all training datasets, counted if they stay on the devices (config.train.targets_on)",
    ),
    Flag(
        "host-rate",
        float,
        10.0,
        "GB/s that a host is taken to give its devices, which `dnd bench --input` measures",
    ),
    Flag("measure", bool, False, "run the steps on this machine's devices as well"),
)
COMPARED = (
    WORKDIR,
    Flag(
        "backend",
        str,
        "",
        "tpu-aot compiles for --topology (v5p:2x2x1, v5e:4x4, ...) without a TPU",
    ),
    Flag("topology", str, "", "TPU chips to compile for, with --backend=tpu-aot"),
    Flag("layers", bool, False, "every convolution of the configuration by itself"),
    Flag("limits", bool, False, "what the hardware allows for the paper's settings, by counting"),
    Flag("rates", bool, False, "learn how fast this CPU computes convolutions"),
    Flag("input", bool, False, "how many training samples a second this host can give"),
)


def _planned(given: Given) -> tuple[str, ...]:
    away = given["topology"] or (
        given["sweep"] and given.config.sweep.topologies and not given["devices"]
    )
    models = packages.of_models(given.config.base.path, given.config.condition.encoder)
    drawn = ("matplotlib",) if given["sweep"] else ()
    return (*(("libtpu",) if away else ()), *drawn, *models)


COMMANDS = {
    "plan": Stage("costs.plan", PLANNED, _planned),
    "bench": Stage("costs.bench.run", COMPARED, lambda given: bench.needs(given), settings=DEFAULT),
}
