"""results.json: the scores of every unseen dataset, their means by kind and over all, over one seed
or several."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dnd_jax.config.schema import Config
from dnd_jax.scoring import intervals

RESULTS_FORMAT = 1  # of results.json
# The columns of every table, in order; "generated" also has a spread over the S draws of prompts.
PARTS = (
    "content",
    "format",
)  # measures that stand in an entry under their names, beside its exact match
METHODS = (
    "base",
    "train_mean",
    "train_best",
    "mean_adapter",
    "nearest",
    "ridge",
    "generated",
    "wrong_prompts",
    "tuned",
)
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
RULE = (
    "No selection: mean of all samples. {samples} adapters a dataset from {samples} seeded draws "
    "of {prompts}, mean and "
    "population standard deviation over them; the generator is the one after its last step."
)
FEW_RULE = " They are repeated until the generator has its {n}."
FORM_RULE = " The condition is of the form {form!r}: it reads the answers of the unseen pools too."
LIKELIHOOD_RULE = " An answer is the most likely one of a dataset's labels."


def rule(config: Config) -> str:
    """How the reported adapters were chosen and asked, in words; fixed before any test."""
    n, different = config.condition.num_prompts, config.evaluate.num_prompts
    drawn = "1 prompt" if (different or n) == 1 else f"{different or n} prompts"
    text = RULE.format(samples=config.evaluate.samples, prompts=drawn)
    text += FEW_RULE.format(n=n) if different else ""
    text += (
        FORM_RULE.format(form=config.condition.form) if config.condition.form != "prompt" else ""
    )
    return text + (LIKELIHOOD_RULE if config.evaluate.answers == "likelihood" else "")


def mean_scores(entries: Sequence[Mapping]) -> dict:
    """The mean of several datasets' (or seeds') scores, measure by measure; spreads are
    averaged."""

    def mean(values: Sequence) -> float | dict:
        if isinstance(values[0], Mapping):
            return {key: statistics.fmean(v[key] for v in values) for key in ("mean", "std")}
        return statistics.fmean(values)

    def over(rows: Sequence[Mapping]) -> dict:
        shared = [m for m in METHODS if all(m in row for row in rows)]
        return {m: mean([row[m] for row in rows]) for m in shared}

    parts = [measure for measure in PARTS if all(measure in e for e in entries)]
    return over(entries) | {measure: over([e[measure] for e in entries]) for measure in parts}


def summarise(entries: Mapping[str, Mapping]) -> dict:
    """`mean_scores` over all unseen datasets, and under "by_kind" over those of each kind."""
    kinds = list(dict.fromkeys(e["kind"] for e in entries.values()))
    by_kind = {
        kind: mean_scores([e for e in entries.values() if e["kind"] == kind]) for kind in kinds
    }
    return mean_scores(list(entries.values())) | {"by_kind": by_kind}


def pack(values: Sequence[float]) -> str:
    """Scores question by question as one text that `unpack` reads exactly: JSON files stay
    small."""
    return " ".join(repr(v).removesuffix(".0") for v in values)


def unpack(text: str) -> list[float]:
    """The values of `pack`."""
    return [float(v) for v in text.split()]


def add_intervals(unseen: Mapping[str, dict], mean: dict, runs: Mapping[int, Mapping]) -> None:
    """Adds "interval": {method: [low, high]} beside every measure's scores, from the runs'
    "questions".

    unseen, mean: the parts of results.json; a mean's interval is that of the mean over seeds of the
    mean over datasets. Seeds with one "fingerprint" of their suite were asked the same questions,
    and draw the same ones.
    """
    prints = {seed: run.get("fingerprint", seed) for seed, run in runs.items()}
    draw = {seed: next(first for first in runs if prints[first] == prints[seed]) for seed in runs}

    def of_dataset(seed: int, name: str) -> dict:
        packed = runs[seed]["questions"][name]
        flat = {
            (measure, method): np.array(unpack(text))
            for measure, of in packed.items()
            for method, text in of.items()
        }
        return intervals.replicates(flat, draw[seed], name)

    drawn = {
        seed: {name: of_dataset(seed, name) for name in run["unseen"]} for seed, run in runs.items()
    }

    def add(entry: dict, wanted: Callable[[int, str], bool]) -> None:
        per_seed = [
            [r for name, r in by_name.items() if wanted(seed, name)]
            for seed, by_name in drawn.items()
        ]
        found = intervals.average([intervals.average(group) for group in per_seed if group])
        for (measure, method), values in found.items():
            of = entry[measure] if measure in PARTS else entry
            if method in of:
                of.setdefault("interval", {})[method] = intervals.interval(values)

    for name, entry in unseen.items():
        add(entry, lambda _, other, name=name: other == name)
    add(mean, lambda _, name: True)
    for kind, entry in mean["by_kind"].items():
        add(entry, lambda seed, name, kind=kind: runs[seed]["unseen"][name]["kind"] == kind)


def combine(runs: dict[int, dict], config: Config) -> dict:
    """results.json from each seed's evaluation: datasets averaged over the seeds that have them,
    and the spread over seeds."""
    seeds = list(runs)
    first = runs[seeds[0]]
    names = list(dict.fromkeys(name for run in runs.values() for name in run["unseen"]))
    unseen = {}
    for name in names:
        entries = [run["unseen"][name] for run in runs.values() if name in run["unseen"]]
        unseen[name] = (
            copy.deepcopy(entries[0])
            if len(entries) == 1
            else {"kind": entries[0]["kind"], **mean_scores(entries)}
        )
    mean = summarise(unseen)
    if len(runs) > 1:
        # A seed counts once, however many datasets of a kind it has.
        by_seed = {seed: summarise(run["unseen"]) for seed, run in runs.items()}
        mean = mean_scores(list(by_seed.values()))
        kinds = list(dict.fromkeys(kind for s in by_seed.values() for kind in s["by_kind"]))
        of_kind = {
            kind: [s["by_kind"][kind] for s in by_seed.values() if kind in s["by_kind"]]
            for kind in kinds
        }
        mean["by_kind"] = {kind: mean_scores(entries) for kind, entries in of_kind.items()}
        for entry, entries in (
            (mean, by_seed.values()),
            *((mean["by_kind"][k], of_kind[k]) for k in kinds),
        ):
            scores = [e["generated"]["mean"] for e in entries]
            entry["generated"] |= {"std_over_seeds": statistics.pstdev(scores), "by_seed": scores}
    add_intervals(unseen, mean, runs)
    agreements = [run["agreement"] for run in runs.values()]
    results = {
        "suite": first["suite"],
        "seeds": seeds,
        "answers": config.evaluate.answers,
        "rule": rule(config),
        "intervals": intervals.NOTE,
        "unseen": unseen,
        "mean": mean,
        "overhead": first["overhead"],
        # All seeds have one base: either each was compared, or none.
        "agreement": agreements[0]
        if "note" in agreements[0]
        else {
            key: (max if key == "largest_logit_difference" else sum)(a[key] for a in agreements)
            for key in agreements[0]
        },
        "seconds": {
            s: statistics.fmean(r["seconds"].get(s, 0.0) for r in runs.values())
            for s in first["seconds"]
        },
    }
    if len(runs) > 1:
        results["runs"] = {
            str(seed): {"unseen": run["unseen"], "seconds": run["seconds"]}
            for seed, run in runs.items()
        }
    return results
