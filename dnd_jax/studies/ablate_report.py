"""The result of `dnd ablate`: ablation.json, ablation.md (which is printed too) and ablation.png.

Beside every score of the generated adapters stands that from wrong prompts: what is as high without
the task's own prompts is no merit of theirs.
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dnd_jax.config.schema import Config
from dnd_jax.core import figures
from dnd_jax.core.files import replacing
from dnd_jax.core.formats import write_numbered
from dnd_jax.scoring import intervals
from dnd_jax.scoring.results import METHODS, PARTS, TITLES, combine, summarise

MEASURES = {"exact": "exact match", "content": "right content", "format": "right format"}
OURS = ("generated", "wrong_prompts")
SHOWN = {m: TITLES[m] for m in ("train_mean", "train_best", "nearest", "tuned")}
CONTROL = (
    "Wrong: the same generator on another task's prompts, the control. Train mean, train "
    "best (chosen with hindsight), "
    "nearest: adapters of the training datasets. Tuned: on the task's own answers."
)


def row(
    name: str, config: Config, differs: Mapping[str, list], folder: str, runs: Mapping[int, Mapping]
) -> dict:
    """A variant's entry of ablation.json: {"name", "differs", "folder", "rule", "scores",
    "by_kind", "seconds"}.

    scores: {measure: {method: {"mean", "by_seed", "interval", and where known "std"}}}, by_kind:
    {kind: {method: the same}} of the exact match. "std" is that over the seeds, or of a single one
    that over the draws of prompts.
    """
    results = combine(dict(runs), config)
    mean, by_seed = results["mean"], [summarise(run["unseen"]) for run in runs.values()]
    return {
        "name": name,
        "differs": dict(differs),
        "folder": folder,
        "rule": results["rule"],
        "scores": {"exact": _scores(by_seed, mean)}
        | {part: _scores([s[part] for s in by_seed], mean[part]) for part in PARTS},
        "by_kind": {
            kind: _scores([s["by_kind"][kind] for s in by_seed], of)
            for kind, of in mean["by_kind"].items()
        },
        "seconds": {stage: round(value, 1) for stage, value in results["seconds"].items()},
    }


def _scores(by_seed: Sequence[Mapping], combined: Mapping) -> dict[str, dict]:
    """{method: entry} of one measure over one group of datasets; combined: what `combine` makes of
    the seeds."""
    found = {}
    for method in (m for m in METHODS if all(m in s for s in by_seed)):
        values = [
            s[method]["mean"] if isinstance(s[method], Mapping) else s[method] for s in by_seed
        ]
        found[method] = {
            "mean": statistics.fmean(values),
            "by_seed": values,
            "interval": combined["interval"][method],
        }
        if len(values) > 1:
            found[method]["std"] = statistics.pstdev(values)
        elif isinstance(by_seed[0][method], Mapping):
            found[method]["std"] = by_seed[0][method]["std"]
    return found


def write(rows: Sequence[Mapping], seeds: Sequence[int], workdir: pathlib.Path) -> dict:
    """Writes the three files and returns ablation.json's content."""
    report = {"seeds": list(seeds), "intervals": intervals.NOTE, "variants": list(rows)}
    write_numbered(workdir / "ablation.json", 1, report)
    with replacing(workdir / "ablation.md") as temporary:
        temporary.write_text(as_markdown(report) + "\n", encoding="utf-8")
    plot(report, workdir / "ablation.png")
    return report


def _spread(entry: Mapping | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['mean']:.2f}±{entry['std']:.2f}" if "std" in entry else f"{entry['mean']:.2f}"


def _differs(entry: Mapping) -> str:
    return (
        "; ".join(f"{key} {old!r} → {new!r}" for key, (old, new) in entry["differs"].items())
        or "(the default)"
    )


def _kinds(report: Mapping) -> list[str]:
    """Those of the unseen datasets of every variant's suite, if there are several."""
    of_each = [entry["by_kind"] for entry in report["variants"]]
    kinds = [kind for kind in of_each[0] if all(kind in by_kind for by_kind in of_each)]
    return kinds if len(kinds) > 1 else []


def as_markdown(report: Mapping) -> str:
    """The tables, one variant a row in the configuration's order, and under them rule, spread and
    control in words."""
    parts = (_overall(report), _by_kind(report), _in_words(report))
    return "\n".join(line for part in parts for line in part)


def _overall(report: Mapping) -> list[str]:
    """The table of all unseen datasets."""
    head = ("variant", "differs", "exact match", "interval", "wrong", *SHOWN.values())
    head += ("content", "wrong", "format", "wrong", "minutes")
    lines = _table_row(head), "|---" * len(head) + "|"
    return [*lines, *(_table_row(_cells(entry)) for entry in report["variants"])]


def _cells(entry: Mapping) -> list[str]:
    """A variant's row of the table."""
    scores = entry["scores"]
    exact = scores["exact"]
    low, high = exact["generated"]["interval"]
    return [
        entry["name"],
        _differs(entry),
        f"**{_spread(exact['generated'])}**",
        f"{low:.2f}-{high:.2f}",
        *(_spread(exact.get(m)) for m in ("wrong_prompts", *SHOWN)),
        *(_spread(scores[part][m]) for part in PARTS for m in OURS),
        f"{sum(entry['seconds'].values()) / 60:.1f}",
    ]


def _by_kind(report: Mapping) -> list[str]:
    """The table of each kind of unseen datasets, where there are several."""
    kinds = _kinds(report)
    if not kinds:
        return []
    head = ["exact match of", *(word for kind in kinds for word in (kind, "wrong"))]
    rows = (
        [entry["name"], *(_spread(entry["by_kind"][kind][m]) for kind in kinds for m in OURS)]
        for entry in report["variants"]
    )
    return ["", _table_row(head), "|---" * len(head) + "|", *map(_table_row, rows)]


def _in_words(report: Mapping) -> list[str]:
    seeds = report["seeds"]
    over = "draws of prompts, not over seeds of training (--seeds=0,1,2 gives that)"
    if len(seeds) > 1:
        over = f"the seeds {', '.join(map(str, seeds))}"
    rules: dict[str, list[str]] = {}
    for entry in report["variants"]:
        rules.setdefault(entry["rule"], []).append(entry["name"])
    of_rule = [
        rule if len(rules) == 1 else f"{', '.join(names)}: {rule}" for rule, names in rules.items()
    ]
    return [
        "",
        "Means over all unseen datasets, of the generated adapters where no other is named; ± is "
        f"the population standard deviation over {over}. {CONTROL}",
        "",
        *of_rule,
        "",
        report["intervals"],
        "",
        "Minutes: wall time of what a variant does not share with the default.",
    ]


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(report: Mapping, path: pathlib.Path) -> None:
    """A panel a measure and kind, two bars a variant: the generated adapters and the control."""
    rows = report["variants"]
    panels = [(MEASURES["exact"], [entry["scores"]["exact"] for entry in rows])]
    panels += [
        (f"{MEASURES['exact']}: {kind}", [entry["by_kind"][kind] for entry in rows])
        for kind in _kinds(report)
    ]
    panels += [(MEASURES[part], [entry["scores"][part] for entry in rows]) for part in PARTS]
    width, height = 1.6 + 2.6 * len(panels), 1.4 + 0.5 * len(rows)
    figure, axes = figures.panels(len(panels), width, height, share_y=True)
    axes[0].invert_yaxis()  # of all of them
    for axis, (title, scores) in zip(axes, panels, strict=True):
        _panel(axis, rows, scores)
        axis.set(xlim=(0, 1.02), title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("means over unseen datasets; * and dotted: the default")
    figures.save(figure, path)


def _panel(axis: Any, rows: Sequence[Mapping], scores: Sequence[Mapping]) -> None:
    """The bars of one measure, {method: entry} a variant; a dotted line where the default is."""
    bars = (
        ("generated", "generated", "tab:orange", -0.2),
        ("wrong_prompts", "from wrong prompts (control)", "0.7", 0.2),
    )
    for method, label, color, offset in bars:
        at, means = [i + offset for i in range(len(rows))], [of[method]["mean"] for of in scores]
        errors = [of[method].get("std", 0) for of in scores]
        axis.barh(at, means, 0.38, xerr=errors, color=color, label=label)
    for entry, of in zip(rows, scores, strict=True):
        if not entry["differs"]:
            axis.axvline(of["generated"]["mean"], color="black", linewidth=0.8, linestyle=":")
    names = [entry["name"] if entry["differs"] else f"{entry['name']} *" for entry in rows]
    axis.set_yticks(range(len(rows)), names)
