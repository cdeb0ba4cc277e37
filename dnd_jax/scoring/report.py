"""The result of a run for people: a table in the terminal and one self-contained HTML page."""

import html
import pathlib
from collections.abc import Mapping, Sequence

from dnd_jax.base.agreement import disagreement
from dnd_jax.config.schema import Config
from dnd_jax.core import workdir as paths
from dnd_jax.core.files import read_json, replacing
from dnd_jax.core.formats import write_numbered
from dnd_jax.lora.listing import checkpoint_folders
from dnd_jax.scoring.intervals import LEVEL
from dnd_jax.scoring.plots import bars, curves, projection
from dnd_jax.scoring.results import (
    CUT,
    MEANING,
    METHODS,
    PARTS,
    RESULTS_FORMAT,
    SEES,
    TITLES,
    combine,
)

HEADINGS = {"content": "Right content", "format": "Right format", CUT: "Cut off"}
SHARES = {
    "content": "Share of the answer's content words that are there, whatever the form.",
    "format": "Share of answers in the asked form, whatever the content.",
    CUT: "Share of answers that evaluate.max_new_tokens cut off before their end token.",
}


def _has_cut(results: Mapping) -> bool:
    """Whether any answer was cut off, as far as that is known."""
    return any(results["mean"].get(CUT, {}).values())


def _cell(value: float | Mapping | None, width: int = 0) -> str:
    if value is None:
        return "-".rjust(width)
    text = (
        f"{value['mean']:.2f}±{value['std']:.2f}" if isinstance(value, Mapping) else f"{value:.2f}"
    )
    return text.rjust(width)


def table(results: Mapping, measure: str = "exact") -> str:
    """The scores of every unseen dataset, by kind and over all, as aligned text; under the means
    their intervals."""
    methods = _methods(results, measure)
    widths = [max(len(TITLES[m]), 9) for m in methods]
    names = (
        list(results["unseen"])
        + [f"mean of {k}" for k in results["mean"]["by_kind"]]
        + ["mean of all unseen"]
    )
    first = max(map(len, names))
    rule = "-" * (first + sum(w + 2 for w in widths))
    lines = [
        " " * first + "".join(f"  {TITLES[m]:>{w}}" for m, w in zip(methods, widths, strict=True)),
        rule,
    ]

    def row(name: str, scores: Mapping) -> str:
        values = _measure(scores, measure)
        return f"{name:<{first}}" + "".join(
            "  " + _cell(values.get(m), w) for m, w in zip(methods, widths, strict=True)
        )

    def interval(scores: Mapping) -> list[str]:
        found = _measure(scores, measure).get("interval", {})
        cells = (_interval(found.get(m)).rjust(w) for m, w in zip(methods, widths, strict=True))
        return [f"{f'  {LEVEL:.0%} interval':<{first}}  " + "  ".join(cells)] if found else []

    for kind, mean in results["mean"]["by_kind"].items():
        lines += [
            row(name, scores)
            for name, scores in results["unseen"].items()
            if scores["kind"] == kind
        ]
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


def _html_table(results: Mapping, measure: str) -> str:
    methods = _methods(results, measure)
    head = "".join(f'<th title="{html.escape(MEANING[m])}">{TITLES[m]}</th>' for m in methods)

    def row(name: str, scores: Mapping, css: str = "") -> str:
        values = _measure(scores, measure)
        bounds = {m: _interval(of, "–") for m, of in values.get("interval", {}).items()}
        cells = "".join(
            f'<td class="{m}">{_cell(values.get(m))}<small>{bounds.get(m, "")}</small></td>'
            for m in methods
        )
        return f'<tr class="{css}"><th>{html.escape(name)}</th>{cells}</tr>'

    body = ""
    for kind, mean in results["mean"]["by_kind"].items():
        body += "".join(row(n, s) for n, s in results["unseen"].items() if s["kind"] == kind)
        body += row(f"mean of {kind}", mean, "mean")
    body += row("mean of all unseen", results["mean"], "mean")
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _training_table(results: Mapping) -> str:
    """Exact match of every training adapter on every unseen dataset; nothing for several seeds,
    each of which has its own."""
    rows = {
        name: scores["training"]
        for name, scores in results["unseen"].items()
        if scores.get("training")
    }
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in next(iter(rows.values())))
    cells = {name: "".join(f"<td>{v:.2f}</td>" for v in of.values()) for name, of in rows.items()}
    body = "".join(f"<tr><th>{html.escape(name)}</th>{row}</tr>" for name, row in cells.items())
    table = f'<div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div>'
    title = "Training adapters on every unseen dataset"
    return f"<details><summary>{title}</summary>{table}</details>"


def _agreement(agreement: Mapping) -> str:
    """Of JAX and PyTorch, in words."""
    if "note" in agreement:
        return agreement["note"]
    same, answers, asked = (agreement[key] for key in ("same_answers", "answers", "questions"))
    some = "" if answers == asked else f" (of {asked} questions, as a sample)"
    largest, dtype = agreement["largest_logit_difference"], agreement.get("dtype", "float32")
    low = "" if dtype == "float32" else f", in {dtype} against float32"
    return (
        f"{same} of {answers} greedy answers of the generated adapters{some} are identical{low}; "
        f"largest difference of a logit {largest:.1e}."
    )


def _harness(workdir: pathlib.Path) -> str:
    """The table of `dnd lm-eval`, where it was run."""
    path = workdir / paths.HARNESS
    return (
        f"<h2>lm-evaluation-harness</h2>{_html_table(read_json(path), 'exact')}"
        if path.is_file()
        else ""
    )


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;
color:#222}table{border-collapse:collapse;font-size:13px;margin:1em 0}
td,th{padding:.2em .6em;text-align:right;white-space:nowrap}
th:first-child{text-align:left;font-weight:normal}
tr.mean{background:#f3f3f3;font-weight:600}tr.mean th{font-weight:600}
td small{display:block;font-size:9px;color:#777}.wide{overflow-x:auto}
td.generated{background:#fff1e0}img{max-width:100%;margin:.5em 0}
.words th,.words td{text-align:left}
@media(prefers-color-scheme:dark){body{background:#fff}}"""


def write_report(
    workdir: pathlib.Path, results: Mapping, training: Mapping[str, pathlib.Path]
) -> pathlib.Path:
    """Writes WORKDIR/report.html: tables, bars, curves, the projection and seconds a stage, without
    outside files."""
    suite = html.escape(results["suite"])
    sections = (
        _introduction(results),
        _scores(results),
        _harness(workdir),
        f"<h2>Training</h2>{curves(workdir)}",
        f"<h2>Where the adapters lie</h2>{projection(workdir, results, training)}",
        _costs(results),
    )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Drag-and-drop adapters: {suite}</title>
<style>{STYLE}</style>
<h1>Adapters from prompts: {suite}</h1>
{_first(results)}{chr(10).join(sections)}</html>
"""
    path = workdir / paths.REPORT
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _first(results: Mapping) -> str:
    """What must be read before all else; empty where there is nothing."""
    warning = disagreement(results["agreement"])
    return f"<p><b>{html.escape(warning)}</b></p>\n" if warning else ""


def _introduction(results: Mapping) -> str:
    seeds = results["seeds"]
    asked = {"greedy": "greedy decoding", "likelihood": "the likeliest label"}[results["answers"]]
    return f"""<p>Seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}. Every score is
from PyTorch (transformers + PEFT) on the exported adapter folders, {asked}, on test questions whose
prompts the generator did not see. {html.escape(results["rule"])}</p>"""


def _scores(results: Mapping) -> str:
    """The tables of every measure, the exact match with its bars and what its methods mean."""
    warned = "".join(f"<p><b>{html.escape(text)}</b></p>" for text in results["warnings"])
    meaning = "".join(
        f"<tr><th>{TITLES[m]}</th><td>{html.escape(MEANING[m])}</td><td>{SEES[m]}</td></tr>"
        for m in _methods(results, "exact")
    )
    others = "".join(
        f"<h2>{HEADINGS[measure]}</h2><p>{SHARES[measure]}</p>{_html_table(results, measure)}\n"
        for measure in ((*PARTS, CUT) if _has_cut(results) else PARTS)
    )
    return f"""<h2>Exact match</h2>{warned}{_html_table(results, "exact")}{bars(results)}
{_training_table(results)}
<p>Small: {html.escape(results["intervals"])}</p>
<table class="words"><tr><th></th><td>what it is</td><td>what it saw of the task</td></tr>
{meaning}</table>
{others}"""


def _costs(results: Mapping) -> str:
    """What was measured when all was scored, and the seconds of the stages."""
    seconds = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{v:.1f}</td></tr>" for k, v in results["seconds"].items()
    )
    return f"""<h2>Cost</h2><p>{html.escape(results["overhead"]["note"])}</p>
<h2>Agreement of JAX and PyTorch</h2>
<p>{html.escape(_agreement(results["agreement"]))}</p>
<h2>Seconds a stage</h2><table>{seconds}</table>"""


def publish(runs: dict[int, dict], config: Config, workdir: pathlib.Path) -> dict:
    """Writes results.json and report.html of the seeds' evaluations and prints the tables."""
    results = _write(runs, config, workdir)
    for measure in (*PARTS, CUT) if _has_cut(results) else PARTS:
        print(f"\n{HEADINGS[measure].lower()}\n{table({**results, 'unseen': {}}, measure)}")
    print(f"\nexact match\n{table(results)}\n")
    print(*results["warnings"], results["rule"], results["intervals"], sep="\n", flush=True)
    return results


def publish_measured(runs: dict[int, dict], config: Config, workdir: pathlib.Path) -> dict:
    """Writes both files again with what was measured since, and prints that, the report's path
    last."""
    results = _write(runs, config, workdir)
    if warning := disagreement(results["agreement"]):
        print(warning)
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in results["seconds"].items())
    print(f"{_agreement(results['agreement'])}\n{results['overhead']['note']}\nseconds: {seconds}")
    print(f"report: {(workdir / paths.REPORT).absolute()}", flush=True)
    return results


def _write(runs: dict[int, dict], config: Config, workdir: pathlib.Path) -> dict:
    results = combine(runs, config)
    write_numbered(workdir / paths.RESULTS, RESULTS_FORMAT, results)
    root = pathlib.Path(config.train.checkpoints or workdir / paths.LORAS)
    of_training = checkpoint_folders(root, next(iter(runs.values()))["train"])
    last = {name: folders[-1] for name, folders in of_training.items()}
    write_report(workdir, results, last)
    return results
