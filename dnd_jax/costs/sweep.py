"""`dnd plan --sweep`: every combination of meshes, rules, remat, batches and methods that a
configuration lists, in one table.

    dnd plan --sweep --config=configs/ablate_sharding.py --workdir=runs/sharding

WORKDIR gets plans.json, plans.csv, plans.md, plans.png and, where the combinations differ in the
number of devices, scaling.png. A combination that was compiled before is not compiled again.
"""

import csv
import dataclasses
import importlib.metadata
import io
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
from tqdm import tqdm

from dnd_jax.config.schema import Config
from dnd_jax.core import digests, figures, packages
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json, replacing, write_json
from dnd_jax.core.stopping import stop
from dnd_jax.costs.compiled import StepCost, devices_of
from dnd_jax.costs.describe import what_would_help
from dnd_jax.costs.step_cost import make_plan


def variants(config: Config) -> Iterator[tuple[str, str, Config]]:
    """(topology, step, configuration) of each combination of config.sweep; an empty list takes the
    configuration's own value. The program that collects LoRAs depends on the first two lists
    alone."""
    s, m, t = config.sweep, config.mesh, config.train
    places = s.topologies or ("",), s.meshes or ((m.slices, m.data, m.fsdp, m.tensor),)
    of_generator = (
        s.rules or (m.rules,),
        s.remat or (t.remat,),
        s.batches or (t.batch_size,),
        s.micro_batches or (t.micro_batches,),
        s.methods or (config.generator.convolution,),
    )
    first = [values[0] for values in of_generator]
    for topology, mesh, *others, step in itertools.product(*places, *of_generator, s.steps):
        if step == "collect" and others != first:
            continue
        rules, remat, batch, parts, method = others
        slices, data, fsdp, tensor = mesh if len(mesh) == 4 else (m.slices, *mesh)
        yield (
            topology,
            step,
            dataclasses.replace(
                config,
                mesh=dataclasses.replace(
                    m, slices=slices, data=data, fsdp=fsdp, tensor=tensor, rules=rules
                ),
                train=dataclasses.replace(t, remat=remat, batch_size=batch, micro_batches=parts),
                generator=dataclasses.replace(config.generator, convolution=method),
            ),
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _key(topology: str, step: str, config: Config, measure: bool) -> str:
    """Names what a plan depends on."""
    settings = {
        key: value
        for key, value in config.to_json().items()
        if key in ("condition", "generator", "train", "mesh", "base", "lora")
    }
    devices = topology or [jax.device_count(), jax.devices()[0].device_kind]
    compilers = jax.__version__, *map(_version, ("jaxlib", "libtpu"))
    program = digests.of_program()
    return digests.of_json([devices, step, settings, measure, compilers, program])[:16]


def sweep(config: Config, workdir: pathlib.Path, measure: bool = False) -> list[StepCost]:
    """Compiles every combination and writes the tables and the plot; what its mesh does not divide
    is left out with a line."""
    every, found = list(variants(config)), []
    for topology, step, variant in (
        bar := tqdm(every, desc="plan", unit="program", dynamic_ncols=True)
    ):
        stop.check()
        devices = devices_of(topology, variant.mesh.slices)
        batch, parts = variant.train.batch_size, variant.train.micro_batches
        if batch < 0:
            batch = -batch * len(devices)
            variant = dataclasses.replace(
                variant, train=dataclasses.replace(variant.train, batch_size=batch)
            )
        if step != "collect" and batch % parts:
            bar.write(f"left out: micro_batches = {parts} does not divide batch_size = {batch}")
            continue
        path = workdir / "plans" / f"{_key(topology, step, variant, measure)}.json"
        if path.is_file():
            plan = StepCost(**read_json(path))
            # 64 samples and 8 a chip are the same on eight chips.
            found += [plan] if plan not in found else []
            continue
        try:
            plan = make_plan(variant, devices, step, measure)
        except InputError as error:
            bar.write(f"left out: {error}")
            continue
        write_json(path, dataclasses.asdict(plan))
        found.append(plan)
    if not found:
        raise InputError("config.sweep: no combination fits its mesh")
    write_json(workdir / "plans.json", [dataclasses.asdict(p) for p in found])
    for name, text in (("plans.csv", as_csv(found)), ("plans.md", as_markdown(found) + "\n")):
        with replacing(workdir / name) as temporary:
            temporary.write_text(text)
    plot(found, workdir / "plans.png")
    plot_scaling(found, workdir / "scaling.png")
    return found


def best(plans: Sequence[StepCost], step: str) -> StepCost | None:
    """The fitting plan of a step with the most samples a second and device, by measurement where
    some were measured; the leanest one where no time is known."""
    fitting = [p for p in plans if p.step == step and p.fits]
    fitting = [p for p in fitting if p.measured_seconds] or fitting
    return max(
        fitting,
        key=lambda p: ((p.samples_per_second or 0) / _size(p), -(p.peak_bytes or 0)),
        default=None,
    )


def nearest_miss(plans: Sequence[StepCost]) -> str:
    """When nothing fits: the plan that wants the least beyond its limit, and what would make it
    fit."""
    known = [p for p in plans if not p.fits and p.peak_bytes and p.limit_bytes]
    if not known:
        return "nothing fits; take more chips or a smaller batch"
    p = min(known, key=lambda p: p.peak_bytes / p.limit_bytes)
    over = f"{p.peak_bytes / 2**30:.1f} GiB of {p.limit_bytes / 2**30:.1f}"
    return (
        f"nothing fits; the nearest is {p.step} on {p.devices}, mesh {mesh_name(p)}, which wants "
        f"{over}; {what_would_help(p)}"
    )


def _size(plan: StepCost) -> int:
    return math.prod(plan.mesh.values())


def mesh_name(plan: StepCost) -> str:
    """ "8x1x1": data x fsdp x tensor, with the slices before them when there are some."""
    sizes = [plan.mesh[axis] for axis in ("data", "fsdp", "tensor")]
    return "x".join(map(str, [plan.mesh["slice"], *sizes] if plan.mesh["slice"] > 1 else sizes))


def as_csv(plans: Sequence[StepCost]) -> str:
    """All fields, one plan a row; collectives as bytes by kind."""
    rows = []
    for p in plans:
        row = dataclasses.asdict(p)
        row |= {f"mesh_{axis}": size for axis, size in row.pop("mesh").items()}
        row |= {f"{kind}_bytes": t["bytes"] for kind, t in row.pop("collectives").items()}
        rows.append(row | {"fits": p.fits, "samples_per_second": p.samples_per_second})
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_markdown(plans: Sequence[StepCost]) -> str:
    """The table that is printed: the fastest first, the best of each step in bold, what does not
    fit last."""
    stars = [best(plans, step) for step in ("train", "generate")]
    lines = [
        "| step | devices | mesh | rules | batch | remat | method | peak GiB | of | TFLOP | GB "
        "moved | GB links | ms compute | "
        "ms links | ms measured | per s | fits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(value, scale=1.0, digits=4):
        return "-" if value is None else f"{value / scale:.{digits}g}"

    for p in sorted(
        plans,
        key=lambda p: (p.step != "train", not p.fits, -(p.samples_per_second or 0) / _size(p)),
    ):
        links = (
            sum(t["link_bytes"] + t["network_bytes"] for t in p.collectives.values())
            if p.flops
            else None
        )
        flops, moved = (None, None) if p.looped else (p.flops, p.bytes)
        batch = f"{p.batch} / {p.micro_batches}" if p.micro_batches > 1 else str(p.batch)
        cells = [
            p.step,
            p.devices,
            mesh_name(p),
            p.rules,
            batch,
            p.remat,
            p.method,
            shown(p.peak_bytes, 2**30),
            shown(p.limit_bytes, 2**30),
            shown(flops, 1e12),
            shown(moved, 1e9),
            shown(links, 1e9, 3),
            shown(p.estimate_seconds, 1e-3),
            shown(p.link_seconds, 1e-3, 3),
            shown(p.measured_seconds, 1e-3),
            shown(p.samples_per_second),
            "yes" if p.fits else "NO",
        ]
        lines.append("| " + " | ".join(f"**{c}**" if p in stars else c for c in cells) + " |")
    lines += [
        "",
        "mesh: data x fsdp x tensor. Compute by the compiler; links if nothing overlapped. "
        "**Best** a device.",
    ]
    return "\n".join(lines)


def plot(plans: Sequence[StepCost], path: pathlib.Path) -> None:
    """Milliseconds and memory of the train steps (else of all), one bar a plan."""
    shown = [p for p in plans if p.step == "train"] or list(plans)
    shown = sorted(shown, key=lambda p: (not p.fits, -(p.samples_per_second or 0) / _size(p)))
    names = {
        "devices": "",
        "batch": "batch ",
        "micro_batches": "parts ",
        "remat": "remat ",
        "method": "",
        "rules": "rules ",
    }
    same = {name: len({getattr(p, name) for p in shown}) == 1 for name in names}
    labels = [
        " ".join([mesh_name(p), *(f"{names[n]}{getattr(p, n)}" for n in names if not same[n])])
        for p in shown
    ]
    figure, (left, right) = figures.panels(2, 12, 1.2 + 0.32 * len(shown), share_y=True)
    at = range(len(shown))
    left.barh(
        at,
        [(p.estimate_seconds or 0) * 1e3 for p in shown],
        color="#4c72b0",
        label="compute, by the compiler",
    )
    left.barh(
        at,
        [(p.link_seconds or 0) * 1e3 for p in shown],
        left=[(p.estimate_seconds or 0) * 1e3 for p in shown],
        color="#dd8452",
        label="links, not overlapped",
    )
    if any(p.measured_seconds for p in shown):
        left.plot(
            [(p.measured_seconds or float("nan")) * 1e3 for p in shown],
            at,
            "k|",
            markersize=12,
            label="measured",
        )
    left.set_yticks(at, labels)
    left.invert_yaxis()
    left.set_xlabel("ms a step")
    left.legend(loc="lower right")
    colors = ["#55a868" if p.fits else "#c44e52" for p in shown]
    right.barh(at, [(p.peak_bytes or 0) / 2**30 for p in shown], color=colors)
    for limit in {p.limit_bytes for p in shown if p.limit_bytes}:
        right.axvline(limit / 2**30, color="black", linewidth=1)
    right.set_xlabel("GiB a device (green fits, line: the chip's)")
    title = " ".join(f"{names[n]}{getattr(shown[0], n)}" for n in names if same[n])
    figure.suptitle(f"{shown[0].step} step, mesh data x fsdp x tensor; {title}")
    figures.save(figure, path)


def scaling(plans: Sequence[StepCost]) -> dict[str, list[StepCost]]:
    """Fitting train steps that differ in nothing but the number of devices, from few to many: {"64
    samples a step": plans, ...} where the batch is the same (strong scaling), {"8 samples a
    device": plans, ...} where a device's share is (weak scaling)."""
    shown = sorted((p for p in plans if p.step == "train" and p.fits), key=_size)

    def settings(p: StepCost) -> tuple[str, ...]:
        kind = p.devices.split(" ", 1)[1]  # "8 TPU v5p"
        fsdp, tensor = (f"{axis} {p.mesh[axis]}" for axis in ("fsdp", "tensor"))
        return (
            kind,
            fsdp,
            tensor,
            f"rules {p.rules}",
            f"remat {p.remat}",
            f"parts {p.micro_batches}",
            p.method,
        )

    differing = [len(set(values)) > 1 for values in zip(*map(settings, shown), strict=True)]
    lines: dict[str, list[StepCost]] = {}
    for share in (False, True):
        for p in shown:
            samples = (
                f"{p.batch / _size(p):g} samples a device" if share else f"{p.batch} samples a step"
            )
            notes = (note for note, differs in zip(settings(p), differing, strict=True) if differs)
            lines.setdefault(", ".join([samples, *notes]), []).append(p)
    return {name: line for name, line in lines.items() if len({_size(p) for p in line}) > 1}


def plot_scaling(plans: Sequence[StepCost], path: pathlib.Path) -> None:
    """Samples a second and milliseconds a step over the number of devices, a line for each of
    `scaling`'s. Nothing without times or with one number of devices."""
    lines = scaling([p for p in plans if p.samples_per_second])
    if not lines:
        return
    figure, (left, right) = figures.panels(2, 12, 4.5)
    for number, (name, line) in enumerate(lines.items()):
        sizes, color = [_size(p) for p in line], f"C{number}"
        left.plot(sizes, [p.samples_per_second for p in line], "o-", color=color, label=name)
        left.plot(
            sizes, [line[0].samples_per_second * n / sizes[0] for n in sizes], ":", color=color
        )
        for what, style, field in (
            ("compute", "o-", "estimate_seconds"),
            ("links", "s--", "link_seconds"),
            ("measured", "x-.", "measured_seconds"),
        ):
            if any(getattr(p, field) for p in line):
                ms = [(getattr(p, field) or float("nan")) * 1e3 for p in line]
                right.plot(sizes, ms, style, color=color, label=f"{what}, {name}")
    left.set_ylabel("samples a second (dotted: perfect)")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(packages.load("matplotlib.ticker").ScalarFormatter())
    right.set_ylabel("ms a step; links if nothing overlapped")
    right.set_ylim(bottom=0)
    ticks = sorted({_size(p) for line in lines.values() for p in line})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, ticks)
        axes.set_xlabel(f"devices ({plans[0].devices.split(' ', 1)[1]})")
        axes.grid(alpha=0.3)
        axes.legend()
    figures.save(figure, path)
