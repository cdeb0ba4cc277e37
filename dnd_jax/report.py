"""The result of a run for people: a table in the terminal and one self-contained HTML page."""

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dnd_jax.adapters import load_adapter
from dnd_jax.files import read_json, replacing
from dnd_jax.intervals import LEVEL
from dnd_jax.metrics import read_metrics
from dnd_jax.results import METHODS

HARNESS = "lm_eval.json"  # what `dnd lm-eval` leaves in a workdir
TITLES = {
    "base": "base",
    "train_mean": "train mean",
    "train_best": "train best",
    "mean_adapter": "mean adapter",
    "nearest": "nearest",
    "ridge": "ridge",
    "generated": "generated",
    "wrong_prompts": "wrong prompts",
    "tuned": "tuned",
}
MEANING = {
    "base": "the base without an adapter",
    "train_mean": "mean score of the training adapters",
    "train_best": "the training adapter that does best on this test (chosen with hindsight)",
    "mean_adapter": "the average of all training checkpoints",
    "nearest": "the adapter of the training dataset with the most similar prompts",
    "ridge": "ridge regression from mean-pooled prompt embeddings to weights",
    "generated": "ours: mean ± spread over draws of prompts",
    "wrong_prompts": "ours, from another unseen task's prompts (control)",
    "tuned": "a LoRA tuned on the task's own labelled examples",
}


def _cell(value: float | Mapping | None, width: int = 0) -> str:
    if value is None:
        return "-".rjust(width)
    text = f"{value['mean']:.2f}±{value['std']:.2f}" if isinstance(value, Mapping) else f"{value:.2f}"
    return text.rjust(width)


def table(results: Mapping, measure: str = "exact") -> str:
    """The scores of every unseen dataset, by kind and over all, as aligned text; under the means their intervals."""
    methods = _methods(results, measure)
    widths = [max(len(TITLES[m]), 9) for m in methods]
    names = list(results["unseen"]) + [f"mean of {k}" for k in results["mean"]["by_kind"]] + ["mean of all unseen"]
    first = max(map(len, names))
    rule = "-" * (first + sum(w + 2 for w in widths))
    lines = [" " * first + "".join(f"  {TITLES[m]:>{w}}" for m, w in zip(methods, widths, strict=True)), rule]

    def row(name: str, scores: Mapping) -> str:
        values = _measure(scores, measure)
        return f"{name:<{first}}" + "".join("  " + _cell(values.get(m), w) for m, w in zip(methods, widths, strict=True))

    def interval(scores: Mapping) -> list[str]:
        found = _measure(scores, measure).get("interval", {})
        cells = (_interval(found.get(m)).rjust(w) for m, w in zip(methods, widths, strict=True))
        return [f"{f'  {LEVEL:.0%} interval':<{first}}  " + "  ".join(cells)] if found else []

    for kind, mean in results["mean"]["by_kind"].items():
        lines += [row(name, scores) for name, scores in results["unseen"].items() if scores["kind"] == kind]
        lines += [row(f"mean of {kind}", mean), *interval(mean), rule]
    lines += [row("mean of all unseen", results["mean"]), *interval(results["mean"])]
    return "\n".join(lines)


def _interval(bounds: Sequence[float] | None, dash: str = "-") -> str:
    return f"{bounds[0]:.2f}{dash}{bounds[1]:.2f}" if bounds else ""


def _methods(results: Mapping, measure: str) -> list[str]:
    """The columns: methods that any dataset or mean has."""
    every = [_measure(scores, measure) for scores in (results["mean"], *results["unseen"].values())]
    return [m for m in METHODS if any(m in values for values in every)]


def _measure(scores: Mapping, measure: str) -> Mapping:
    return scores if measure == "exact" else scores[measure]


def _picture(figure) -> str:
    """A matplotlib figure as an embedded PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _figure(columns: int, height: float = 3.2):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def bars(results: Mapping) -> str:
    """Exact match by kind and method."""
    kinds = results["mean"]["by_kind"]
    figure, axes = _figure(len(kinds))
    for axis, (kind, mean) in zip(axes, kinds.items(), strict=True):
        methods = [m for m in METHODS if m in mean]
        values = [mean[m]["mean"] if isinstance(mean[m], Mapping) else mean[m] for m in methods]
        errors = [mean[m]["std"] if isinstance(mean[m], Mapping) else 0 for m in methods]
        colors = ["tab:orange" if m == "generated" else "0.7" for m in methods]
        axis.barh([TITLES[m] for m in methods], values, xerr=errors, color=colors)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1.02), title=f"{kind}: exact match")
    return _picture(figure)


def curves(workdir: pathlib.Path) -> str:
    """Loss and accuracy of every training stage that was run here."""
    stages = [(name, rows) for name in ("pretrain", "collect", "generator") if (rows := read_metrics(workdir / name))]
    if not stages:
        return ""
    figure, axes = _figure(len(stages))
    for axis, (name, rows) in zip(axes, stages, strict=True):
        steps = [row["step"] for row in rows]
        axis.plot(steps, [row["loss"] for row in rows], color="tab:blue")
        axis.set(title={"pretrain": "base", "collect": "LoRAs (mean)"}.get(name, name), xlabel="step", yscale="log")
        axis.set_ylabel("loss", color="tab:blue")
        twin = axis.twinx()
        if "accuracy" in rows[0]:
            twin.plot(steps, [row["accuracy"] for row in rows], color="tab:orange", alpha=0.7)
            twin.set_ylabel("training batch exact match", color="tab:orange")
        else:
            twin.plot(steps, [row["output_mean_square"] for row in rows], color="tab:orange", alpha=0.7)
            twin.plot(steps, [row["target_mean_square"] for row in rows], color="0.6", alpha=0.7, linewidth=0.8)
            twin.set_ylabel("mean square: output, target (grey)", color="tab:orange")
    return _picture(figure)


def projection(workdir: pathlib.Path, results: Mapping, training: Mapping[str, pathlib.Path]) -> str:
    """Training, tuned and generated adapters on the first two principal components of the training adapters; not of one."""
    if len(training) == 1:
        return "<p>One training adapter spans no plane to show the others in.</p>"

    def vector(folder: pathlib.Path) -> np.ndarray:
        return np.concatenate([value.ravel() for _, value in sorted(load_adapter(folder).items())])

    groups = {"training": {n: vector(f) for n, f in training.items()}}
    made = [n for n in results["unseen"] if (workdir / "adapters" / n).is_dir()]
    groups["generated"] = {n: vector(workdir / "adapters" / n) for n in made}
    tuned = {n: sorted((workdir / "loras" / n).glob("*/adapter_model.safetensors")) for n in results["unseen"]}
    groups["tuned"] = {n: vector(files[-1].parent) for n, files in tuned.items() if files}
    points = np.stack(list(groups["training"].values()))
    centre = points.mean(axis=0)
    axes_2d = np.linalg.svd(points - centre, full_matrices=False)[2][:2]
    figure, axes = _figure(1, 5.0)
    figure.set_size_inches(8, 5.6)
    looks = zip("o*s", ("0.75", "tab:orange", "tab:green"), strict=True)
    for (group, members), (marker, color) in zip(groups.items(), looks, strict=True):
        if members:
            at = {name: (v - centre) @ axes_2d.T for name, v in members.items()}
            xy = np.stack(list(at.values()))
            axes[0].scatter(xy[:, 0], xy[:, 1], marker=marker, c=color, label=group, s=60 if marker == "*" else 28)
            if group == "generated":
                for name, (x, y) in at.items():
                    axes[0].annotate(name, (x, y), fontsize=6, alpha=0.8)
                    if name in groups["tuned"]:
                        to = (groups["tuned"][name] - centre) @ axes_2d.T
                        axes[0].plot([x, to[0]], [y, to[1]], color="0.6", linewidth=0.6)
    axes[0].set(title="adapters on two principal components of the training adapters", xticks=[], yticks=[])
    axes[0].legend()
    return _picture(figure)


def _html_table(results: Mapping, measure: str) -> str:
    methods = _methods(results, measure)
    head = "".join(f'<th title="{html.escape(MEANING[m])}">{TITLES[m]}</th>' for m in methods)

    def row(name: str, scores: Mapping, css: str = "") -> str:
        values = _measure(scores, measure)
        bounds = {m: _interval(of, "–") for m, of in values.get("interval", {}).items()}
        cells = "".join(f'<td class="{m}">{_cell(values.get(m))}<small>{bounds.get(m, "")}</small></td>' for m in methods)
        return f'<tr class="{css}"><th>{html.escape(name)}</th>{cells}</tr>'

    body = ""
    for kind, mean in results["mean"]["by_kind"].items():
        body += "".join(row(n, s) for n, s in results["unseen"].items() if s["kind"] == kind)
        body += row(f"mean of {kind}", mean, "mean")
    return f"<table><tr><th></th>{head}</tr>{body}{row('mean of all unseen', results['mean'], 'mean')}</table>"


def _training_table(results: Mapping) -> str:
    """Exact match of every training adapter on every unseen dataset; nothing for several seeds, each of which has its own."""
    rows = {name: scores["training"] for name, scores in results["unseen"].items() if "training" in scores}
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in next(iter(rows.values())))
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{value:.2f}</td>' for value in of.values())}</tr>"
        for name, of in rows.items()
    )
    table = f'<div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div>'
    return f"<details><summary>Every training adapter on every unseen dataset</summary>{table}</details>"


def _agreement(agreement: Mapping) -> str:
    """Of JAX and PyTorch, in words."""
    if "note" in agreement:
        return agreement["note"]
    some = "" if agreement["answers"] == agreement["questions"] else f" (of {agreement['questions']} questions, as a sample)"
    return (
        f"{agreement['same_answers']} of {agreement['answers']} greedy answers of the generated adapters{some} are identical; "
        f"largest difference of a logit {agreement['largest_logit_difference']:.1e}."
    )


def _harness(workdir: pathlib.Path) -> str:
    """The table of `dnd lm-eval`, where it was run."""
    path = workdir / HARNESS
    return f"<h2>lm-evaluation-harness</h2>{_html_table(read_json(path), 'exact')}" if path.is_file() else ""


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1em 0}td,th{padding:.2em .6em;text-align:right;white-space:nowrap}
th:first-child{text-align:left;font-weight:normal}tr.mean{background:#f3f3f3;font-weight:600}tr.mean th{font-weight:600}
td small{display:block;font-size:9px;color:#777}.wide{overflow-x:auto}
td.generated{background:#fff1e0}img{max-width:100%;margin:.5em 0}dt{font-weight:600;float:left;width:9em}dd{margin-left:9.5em}
@media(prefers-color-scheme:dark){body{background:#fff}}"""


def write_report(workdir: pathlib.Path, results: Mapping, training: Mapping[str, pathlib.Path]) -> pathlib.Path:
    """Writes WORKDIR/report.html: tables, bars, curves, the projection and seconds a stage, without outside files."""
    seeds = results["seeds"]
    asked = {"greedy": "greedy decoding", "likelihood": "the likeliest label"}[results["answers"]]
    seconds = "".join(f"<tr><th>{html.escape(k)}</th><td>{v:.1f}</td></tr>" for k, v in results["seconds"].items())
    meaning = "".join(f"<dt>{TITLES[m]}</dt><dd>{html.escape(MEANING[m])}</dd>" for m in METHODS)
    suite, rule = html.escape(results["suite"]), html.escape(results["rule"])
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Drag-and-drop adapters: {suite}</title>
<style>{STYLE}</style>
<h1>Adapters from prompts: {suite}</h1>
<p>Seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}. Every score is from PyTorch (transformers + PEFT) on the
exported adapter folders, {asked}, on test questions whose prompts the generator did not see. {rule}</p>
<h2>Exact match</h2>{_html_table(results, "exact")}{bars(results)}
{_training_table(results)}
<p>Small: {html.escape(results["intervals"])}</p>
<dl>{meaning}</dl>
<h2>Right content</h2><p>Share of the answer's content words that are there, whatever the form.</p>{_html_table(results, "content")}
<h2>Right format</h2><p>Share of answers in the asked form, whatever the content.</p>{_html_table(results, "format")}
{_harness(workdir)}<h2>Training</h2>{curves(workdir)}
<h2>Where the adapters lie</h2>{projection(workdir, results, training)}
<h2>Cost</h2><p>{html.escape(results["overhead"]["note"])}</p>
<h2>Agreement of JAX and PyTorch</h2>
<p>{html.escape(_agreement(results["agreement"]))}</p>
<h2>Seconds a stage</h2><table>{seconds}</table></html>
"""
    path = workdir / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
