"""The pictures of a report, by matplotlib."""

import pathlib
from collections.abc import Mapping

import numpy as np

from dnd_jax.core import figures
from dnd_jax.loop.metrics import read_metrics
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.scoring.results import METHODS, TITLES

WIDTH, HEIGHT = 4.6, 3.2  # of a panel, inches


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
    """Loss and accuracy of every training stage that was run here."""
    stages = [
        (name, rows)
        for name in ("pretrain", "collect", "generator")
        if (rows := read_metrics(workdir / name))
    ]
    if not stages:
        return ""
    figure, axes = figures.panels(len(stages), WIDTH * len(stages), HEIGHT)
    for axis, (name, rows) in zip(axes, stages, strict=True):
        steps = [row["step"] for row in rows]
        axis.plot(steps, [row["loss"] for row in rows], color="tab:blue")
        axis.set(
            title={"pretrain": "base", "collect": "LoRAs (mean)"}.get(name, name),
            xlabel="step",
            yscale="log",
        )
        axis.set_ylabel("loss", color="tab:blue")
        twin = axis.twinx()
        if "accuracy" in rows[0]:
            twin.plot(steps, [row["accuracy"] for row in rows], color="tab:orange", alpha=0.7)
            twin.set_ylabel("training batch exact match", color="tab:orange")
        else:
            twin.plot(
                steps, [row["output_mean_square"] for row in rows], color="tab:orange", alpha=0.7
            )
            twin.plot(
                steps,
                [row["target_mean_square"] for row in rows],
                color="0.6",
                alpha=0.7,
                linewidth=0.8,
            )
            twin.set_ylabel("mean square: output, target (grey)", color="tab:orange")
    return figures.embedded(figure)


def projection(
    workdir: pathlib.Path, results: Mapping, training: Mapping[str, pathlib.Path]
) -> str:
    """Training, tuned and generated adapters on the first two principal components of the training
    adapters; not of one."""
    if len(training) == 1:
        return "<p>One training adapter spans no plane to show the others in.</p>"

    def vector(folder: pathlib.Path) -> np.ndarray:
        return np.concatenate([value.ravel() for _, value in sorted(load_adapter(folder).items())])

    groups = {"training": {n: vector(f) for n, f in training.items()}}
    made = [n for n in results["unseen"] if (workdir / "adapters" / n).is_dir()]
    groups["generated"] = {n: vector(workdir / "adapters" / n) for n in made}
    tuned = {
        n: sorted((workdir / "loras" / n).glob("*/adapter_model.safetensors"))
        for n in results["unseen"]
    }
    groups["tuned"] = {n: vector(files[-1].parent) for n, files in tuned.items() if files}
    points = np.stack(list(groups["training"].values()))
    centre = points.mean(axis=0)
    axes_2d = np.linalg.svd(points - centre, full_matrices=False)[2][:2]
    figure, axes = figures.panels(1, 8, 5.6)
    looks = zip("o*s", ("0.75", "tab:orange", "tab:green"), strict=True)
    for (group, members), (marker, color) in zip(groups.items(), looks, strict=True):
        if members:
            at = {name: (v - centre) @ axes_2d.T for name, v in members.items()}
            xy = np.stack(list(at.values()))
            axes[0].scatter(
                xy[:, 0],
                xy[:, 1],
                marker=marker,
                c=color,
                label=group,
                s=60 if marker == "*" else 28,
            )
            if group == "generated":
                for name, (x, y) in at.items():
                    axes[0].annotate(name, (x, y), fontsize=6, alpha=0.8)
                    if name in groups["tuned"]:
                        to = (groups["tuned"][name] - centre) @ axes_2d.T
                        axes[0].plot([x, to[0]], [y, to[1]], color="0.6", linewidth=0.6)
    axes[0].set(
        title="adapters on two principal components of the training adapters", xticks=[], yticks=[]
    )
    axes[0].legend()
    return figures.embedded(figure)
