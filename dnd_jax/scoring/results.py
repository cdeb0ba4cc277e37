"""results.json: the scores of every unseen dataset, their means by kind and over all, over one seed
or several."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.schema import Config
from dnd_jax.scoring import intervals

RESULTS_FORMAT = 1  # of results.json
# Measures that stand in an entry under their names, beside its exact match; and the share of
# answers that were cut off before their end token, where it is known.
PARTS = ("content", "format")
CUT = "cut"
# The columns of every table, in order; "generated" also has a spread over the S draws of prompts.
METHODS = (
    "base",
    "in_context",
    "train_mean",
    "train_best",
    "mean_adapter",
    "nearest",
    "ridge",
    "multi_task_tenth",
    "multi_task",
    "generated",
    "wrong_prompts",
    "random_prompts",
    "empty_prompts",
    "few_shot_8",
    "few_shot_64",
    "tuned",
)
TITLES = {
    "base": "base",
    "in_context": "in context",
    "train_mean": "train mean",
    "train_best": "train best",
    "mean_adapter": "mean adapter",
    "nearest": "nearest",
    "ridge": "ridge",
    "multi_task_tenth": "1/10 multi-task",
    "multi_task": "multi-task",
    "generated": "generated",
    "wrong_prompts": "wrong prompts",
    "random_prompts": "random prompts",
    "empty_prompts": "empty prompts",
    "few_shot_8": "tuned on 8",
    "few_shot_64": "tuned on 64",
    "tuned": "tuned",
}
MEANING = {
    "base": "the base without an adapter",
    "in_context": "the base with answered examples of the task before each question",
    "train_mean": "mean score of the training adapters",
    "train_best": "the training adapter that does best on this test (chosen with hindsight)",
    "mean_adapter": "the average of all training checkpoints",
    "nearest": "the adapter of the training dataset with the most similar prompts",
    "ridge": "ridge regression from mean-pooled prompt embeddings to weights",
    "multi_task_tenth": "the multi-task LoRA after a tenth of its steps",
    "multi_task": "ONE LoRA tuned on all training tasks together, for the steps of all their LoRAs",
    "generated": "ours: mean ± spread over draws of prompts",
    "wrong_prompts": "ours, from another task's prompts (control)",
    "random_prompts": "ours, from prompts that are each of another training task (control)",
    "empty_prompts": "ours, from prompts without a word (control)",
    "few_shot_8": "a LoRA tuned on 8 labelled examples of the task",
    "few_shot_64": "a LoRA tuned on 64 labelled examples of the task",
    "tuned": "a LoRA tuned on the task's own labelled examples",
}
# What each of them was allowed to see of the task that it is scored on, beside the base.
SEES = {
    "base": "nothing",
    "in_context": "labels: a few answered examples",
    "train_mean": "nothing",
    "train_best": "its test, to choose by",
    "mean_adapter": "nothing",
    "nearest": "prompts",
    "ridge": "prompts",
    "multi_task_tenth": "nothing",
    "multi_task": "nothing",
    "generated": "prompts",
    "wrong_prompts": "nothing",
    "random_prompts": "nothing",
    "empty_prompts": "nothing",
    "few_shot_8": "labels: 8",
    "few_shot_64": "labels: 64",
    "tuned": "labels: its whole train file",
}
RULE = (
    "No selection: mean of all samples. {samples} adapters a dataset from {samples} seeded draws "
    "of {prompts}, mean and "
    "population standard deviation over them; the generator is the one after its last step."
)
FEW_RULE = " They are repeated until the generator has its {n}."
FORM_RULE = " The condition is of the form {form!r}: it reads the answers of the unseen pools too."
DRAWN_RULE = (
    " Train mean and train best are of {scored} of the {all} training adapters, drawn by the seed."
)
NO_TRAINING_RULE = (
    " Train mean and train best are left out; evaluate.train_adapters=0 scores every training "
    "adapter."
)
ENGINE_RULE = " Scored by {engine}."
PYTORCH = TorchBase.engine  # what scores where no server does
NOT_YET = {"note": "Not measured yet."}
FREE_FORM = (
    "These answers are free text (a chain of thought, a program), of which exact match means "
    "little. EleutherAI's harness scores it: dnd lm-eval --tasks={name}:TASK, where TASK is GSM8K, "
    "HumanEval or another of its tasks."
)
CUT_OFF = (
    "Cut off at evaluate.max_new_tokens = {tokens}, before an end token, and scored as they stand: "
    "{shares} of the answers. Give more tokens unless the adapters should have ended them."
)
CUT_SHARE = 0.01  # of a method's answers to a dataset, from which on it is warned of
LIKELIHOOD_RULE = " An answer is the most likely one of a dataset's labels."


def rule(config: Config, training: int = 0, engine: str = PYTORCH) -> str:
    """How the reported adapters were chosen and asked, in words; fixed before any test. training:
    how many training adapters there are. engine: what scored."""
    n, different = config.condition.num_prompts, config.evaluate.num_prompts
    drawn = "1 prompt" if (different or n) == 1 else f"{different or n} prompts"
    text = RULE.format(samples=config.evaluate.samples, prompts=drawn)
    text += FEW_RULE.format(n=n) if different else ""
    text += (
        FORM_RULE.format(form=config.condition.form) if config.condition.form != "prompt" else ""
    )
    scored = config.evaluate.train_adapters
    text += DRAWN_RULE.format(scored=scored, all=training) if 0 < scored < training else ""
    text += NO_TRAINING_RULE if scored < 0 else ""
    text += ENGINE_RULE.format(engine=engine)
    return text + (LIKELIHOOD_RULE if config.evaluate.answers == "likelihood" else "")


def warnings(unseen: Mapping[str, Mapping], config: Config) -> list[str]:
    """What a reader of the scores must know first: that exact match means little here, or that
    answers were cut off."""
    found = [FREE_FORM.format(name=next(iter(unseen)))] if config.evaluate.free_form else []
    shares = []
    for name, entry in unseen.items():
        cut = {m: share for m, share in entry.get(CUT, {}).items() if share >= CUT_SHARE}
        if cut:
            of_method = ", ".join(f"{TITLES[m]} {share:.0%}" for m, share in cut.items())
            shares.append(f"{name} ({of_method})")
    if shares:
        some = "; ".join(shares[:3]) + (f"; {len(shares) - 3} datasets more" if shares[3:] else "")
        found.append(CUT_OFF.format(tokens=config.evaluate.max_new_tokens, shares=some))
    return found


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

    parts = [measure for measure in (*PARTS, CUT) if all(measure in e for e in entries)]
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
    first = next(iter(runs.values()))
    # Earlier versions did not say by what.
    engine = ", ".join(dict.fromkeys(run.get("engine", PYTORCH) for run in runs.values()))
    unseen = _over_seeds(runs)
    mean = _mean_over_seeds(runs) if len(runs) > 1 else summarise(unseen)
    add_intervals(unseen, mean, runs)
    results = {
        "suite": first["suite"],
        "seeds": list(runs),
        "answers": config.evaluate.answers,
        "engine": engine,
        "rule": rule(config, len(first.get("train", ())), engine),
        "intervals": intervals.NOTE,
        "warnings": warnings(unseen, config),
        "unseen": unseen,
        "mean": mean,
        "overhead": first.get("overhead", NOT_YET),
        "agreement": _agreement([run.get("agreement", NOT_YET) for run in runs.values()]),
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


def _over_seeds(runs: Mapping[int, Mapping]) -> dict[str, dict]:
    """{unseen dataset: its entry}, averaged where several seeds have it."""
    names = dict.fromkeys(name for run in runs.values() for name in run["unseen"])
    unseen = {}
    for name in names:
        entries = [run["unseen"][name] for run in runs.values() if name in run["unseen"]]
        unseen[name] = (
            copy.deepcopy(entries[0])
            if len(entries) == 1
            else {"kind": entries[0]["kind"], **mean_scores(entries)}
        )
    return unseen


def _mean_over_seeds(runs: Mapping[int, Mapping]) -> dict:
    """`summarise` of several seeds, with the generated adapters' spread over them. A seed counts
    once, however many datasets of a kind it has."""
    by_seed = [summarise(run["unseen"]) for run in runs.values()]
    kinds = dict.fromkeys(kind for s in by_seed for kind in s["by_kind"])
    groups = {kind: [s["by_kind"][kind] for s in by_seed if kind in s["by_kind"]] for kind in kinds}
    mean = mean_scores(by_seed)
    mean["by_kind"] = {kind: mean_scores(entries) for kind, entries in groups.items()}
    for entry, entries in ((mean, by_seed), *((mean["by_kind"][k], groups[k]) for k in kinds)):
        scores = [e["generated"]["mean"] for e in entries]
        entry["generated"] |= {"std_over_seeds": statistics.pstdev(scores), "by_seed": scores}
    return mean


def _agreement(found: Sequence[Mapping]) -> Mapping:
    """Of all seeds together; a note when one of them has none."""
    note = next((each for each in found if "note" in each), None)
    if note:
        return note
    counts = ("questions", "answers", "same_answers")
    most = [key for key in ("largest_logit_difference", "largest_logit") if key in found[0]]
    largest = {key: max(each.get(key, 0.0) for each in found) for key in most}
    return {**found[0], **{key: sum(each[key] for each in found) for key in counts}, **largest}
