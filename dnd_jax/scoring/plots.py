"""The pictures of a report, by matplotlib."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnd_jax.core import figures
from dnd_jax.core import workdir as paths
from dnd_jax.loop.metrics import read_metrics
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.scoring.results import METHODS, TITLES

WIDTH, HEIGHT = 4.6, 3.2  # of a panel, inches
PANELS = 4  # side by side
THROUGH_BASE = {"answers_loss", "distill_loss"}  # what a step through the base has


def bars(results: Mapping) -> str:
    """Exact match by kind and method."""
    kinds = results["mean"]["by_kind"]
    figure, axes = figures.panels(len(kinds), WIDTH * len(kinds), HEIGHT)
    for axis, (kind, mean) in zip(axes, kinds.items(), strict=True):
        methods = [m for m in METHODS if m in mean]
        values = [mean[m]["mean"] if isinstance(mean[m], Mapping) else mean[m] for m in methods]
        errors = [mean[m]["std"] if isinstance(mean[m], Mapping) else 0 for m in methods]
        colors = ["tab:orange" if m == "generated" else "0.7" for m in methods]
        axis.barh([TITLES[m] for m in methods], values, xerr=errors, color=colors)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1.02), title=f"{kind}: exact match")
    return figures.embedded(figure)


def curves(workdir: pathlib.Path) -> str:
    """Loss and accuracy of every training that was run here, PANELS a row of pictures."""
    trainings = [
        (_title(folder.relative_to(workdir)), rows)
        for name in paths.TRAININGS
        for folder in sorted(workdir.glob(name))
        if (rows := read_metrics(folder))
    ]
    starts = range(0, len(trainings), PANELS)
    return "".join(_row_of_curves(trainings[start : start + PANELS]) for start in starts)


def _title(folder: pathlib.PurePath) -> str:
    """What a training in this folder of a run makes, and which group of it."""
    stage, *rest = folder.parts
    name = {paths.PRETRAIN: "base", paths.COLLECT: "LoRAs (mean)"}.get(stage, stage)
    return ", ".join([name, *(part.replace("_", " ") for part in rest if part != "training")])


def _row_of_curves(trainings: Sequence[tuple[str, Sequence[Mapping]]]) -> str:
    figure, axes = figures.panels(len(trainings), WIDTH * len(trainings), HEIGHT)
    for axis, (name, rows) in zip(axes, trainings, strict=True):
        axis.set(title=name, xlabel="step", yscale="log")
        # Losses of two kinds are two curves: on weights first, through the base then.
        through_base = [row for row in rows if THROUGH_BASE & row.keys()]
        before = [row for row in rows if not THROUGH_BASE & row.keys()]
        _curve(axis, before, "loss", "tab:blue")
        _curve(axis, through_base, "loss", "tab:blue")
        axis.set_ylabel("loss", color="tab:blue")
        if before and through_base:
            axis.axvline(through_base[0]["step"], color="0.8", linewidth=0.8)
            axis.set_ylabel("loss: on weights | through the base", color="tab:blue")
        twin, there = axis.twinx(), {key for row in rows for key in row}
        if there & {"accuracy", "exact", "held_in_exact"}:
            label = "training batch exact match"
            _curve(twin, rows, "accuracy", "tab:orange", alpha=0.7)
            _curve(twin, rows, "exact", "tab:orange", alpha=0.7)
            if "held_in_exact" in there:
                label = "exact match (dots: held-in)" if "exact" in there else "held-in exact match"
                look = {"linestyle": "" if "exact" in there else "-", "marker": "o"}
                _curve(twin, rows, "held_in_exact", "tab:orange", **look)
            twin.set_ylim(-0.02, 1.02)
        else:
            label = "mean square: output, target (grey)"
            _curve(twin, rows, "output_mean_square", "tab:orange", alpha=0.7)
            _curve(twin, rows, "target_mean_square", "0.6", alpha=0.7, linewidth=0.8)
        twin.set_ylabel(label, color="tab:orange")
    return figures.embedded(figure)


def _curve(axis: Any, rows: Sequence[Mapping], name: str, color: str, **look: Any) -> None:
    """Of the steps that have it: not all have a mean square of a target, or held-in scores."""
    rows = [row for row in rows if name in row]
    axis.plot([row["step"] for row in rows], [row[name] for row in rows], color=color, **look)


def projection(
    workdir: pathlib.Path, results: Mapping, training: Mapping[str, pathlib.Path]
) -> str:
    """Training, tuned and generated adapters on the first two principal components of the training
    adapters; not of one or none."""
    if len(training) < 2:
        how_many = "One training adapter spans" if training else "No training adapters span"
        return f"<p>{how_many} no plane to show the others in.</p>"
    groups = _on_the_plane(workdir, results, training)
    figure, (axis,) = figures.panels(1, 8, 5.6)
    looks = zip("o*s", ("0.75", "tab:orange", "tab:green"), (28, 60, 28), strict=True)
    for (group, points), (marker, color, size) in zip(groups.items(), looks, strict=True):
        if points:
            xy = np.stack(list(points.values()))
            axis.scatter(xy[:, 0], xy[:, 1], marker=marker, c=color, label=group, s=size)
    for name, (x, y) in groups["generated"].items():
        axis.annotate(name, (x, y), fontsize=6, alpha=0.8)
        if name in groups["tuned"]:
            to_x, to_y = groups["tuned"][name]
            axis.plot([x, to_x], [y, to_y], color="0.6", linewidth=0.6)
    title = "adapters on two principal components of the training adapters"
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend()
    return figures.embedded(figure)


def _on_the_plane(
    workdir: pathlib.Path, results: Mapping, training: Mapping[str, pathlib.Path]
) -> dict[str, dict[str, np.ndarray]]:
    """{group: {dataset: (2,)}} of the training, generated and tuned adapters that are there."""
    adapters, loras = workdir / paths.ADAPTERS, workdir / paths.LORAS
    unseen = results["unseen"]
    tuned = {n: sorted((loras / n).glob("*/adapter_model.safetensors")) for n in unseen}
    folders = {
        "training": training,
        "generated": {n: adapters / n for n in unseen if (adapters / n).is_dir()},
        "tuned": {n: files[-1].parent for n, files in tuned.items() if files},
    }
    vectors = {
        group: {n: _vector(folder) for n, folder in of_group.items()}
        for group, of_group in folders.items()
    }
    points = np.stack(list(vectors["training"].values()))
    centre = points.mean(axis=0)
    plane = np.linalg.svd(points - centre, full_matrices=False)[2][:2]
    return {
        group: {n: (v - centre) @ plane.T for n, v in of_group.items()}
        for group, of_group in vectors.items()
    }


def _vector(folder: pathlib.Path) -> np.ndarray:
    """All numbers of an adapter."""
    return np.concatenate([value.ravel() for _, value in sorted(load_adapter(folder).items())])
