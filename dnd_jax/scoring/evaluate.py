"""Stage `evaluate`: adapters for every unseen dataset, their competitors, and the scores of all of
them, in PyTorch or by a running server.

    dnd evaluate --config=configs/mini.py --workdir=runs/mini

The rule, fixed before any test: S adapters a dataset, from S seeded draws of N prompts of its train
file (no response is read); mean and spread over the S are reported, nothing is selected. Ridge and
nearest are given the same draws, the wrong-prompts control as many of another dataset.
WORKDIR/adapters/NAME is the first. Scores are kept by question, for the report's intervals.

Adapters are kept while their cards name this generator, these prompts and checkpoints by their
hashes, scores by a hash of the adapter's files.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Collection, Mapping

import numpy as np
from tqdm import tqdm

from dnd_jax.base.asked_base import AskedBase
from dnd_jax.base.found import find_base
from dnd_jax.base.identity import base_digest
from dnd_jax.config.records import SAME_NUMBERS, check_same_run
from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_object
from dnd_jax.core.formats import read_numbered, write_numbered
from dnd_jax.core.stage import Given
from dnd_jax.core.stopping import stop
from dnd_jax.core.workdir import timed
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.lora.adapter import fingerprint
from dnd_jax.scoring.answers import RULE, Scorer
from dnd_jax.scoring.candidates import Candidates, make_candidates
from dnd_jax.scoring.draws import wrong_task
from dnd_jax.scoring.engine import Answers, answers_to, each, open_engine, with_adapters
from dnd_jax.scoring.measured import MEASURES, measure
from dnd_jax.scoring.report import publish, publish_measured
from dnd_jax.scoring.results import CUT, METHODS, PARTS, PYTORCH, pack, unpack

FORMAT = 1  # of evaluation.json
A_SERVER = "a server"  # in the place of its URL
# Settings that no score depends on: the last three choose the adapters, whose scores are kept by
# their contents.
NOT_OF_A_SCORE = (
    *SAME_NUMBERS,
    *(f"evaluate.{key}" for key in ("samples", "num_prompts", "train_adapters")),
)


def in_context(name: str) -> str:
    """The label of the base with answered examples of a dataset in its context."""
    return f"in the context of {name}"


def scored_on(candidates: Candidates, name: str) -> list[str]:
    """Labels of what is scored on an unseen dataset: "base", it with answered examples in its
    context, and folders of adapters."""
    folders = *candidates.everywhere.values(), *candidates.of_nearest(name)
    return [
        "base",
        *[in_context(name)] * bool(candidates.shots.get(name)),
        *dict.fromkeys(map(str, folders)),
        *map(str, sum(candidates.by_dataset[name].values(), [])),
    ]


def score_keys(candidates: Candidates, base_path) -> dict[str, str]:
    """{label: what its scores are kept under}, hashes of the base's and the adapter's files, so
    that another one in the place of either is not it."""
    labels = dict.fromkeys(
        label for name in candidates.by_dataset for label in scored_on(candidates, name)
    )
    base = base_digest(base_path)
    shown = {in_context(name): shots for name, shots in candidates.shots.items()}

    def key(label: str) -> str:
        if label in shown:
            texts = (text for e in shown[label] for text in (e.prompt, e.response))
            return f"{digests.of_texts(list(texts))} in the context of {base}"
        return base if label == "base" else f"{fingerprint(label)} on {base}"

    return {label: key(label) for label in labels}


def read_kept(path: pathlib.Path, settings: dict, allowed: Collection[str] = ()) -> dict:
    """What a stopped or finished stage has kept, its "scores" by score_keys; nothing of one by
    another rule for answers, or with other settings that are allowed to differ. Raises InputError
    for settings that are not."""
    if not path.is_file():
        return {"scores": {}}
    stored = read_numbered(path, FORMAT)
    then = stored["settings"]
    by_rule = then.get("rule") == RULE
    then = then | {"rule": RULE}
    same = check_same_run(path, then, settings, allowed, free=NOT_OF_A_SCORE)
    if same and by_rule:
        return stored
    why = "of other settings" if by_rule else "by an earlier version's rule for answers"
    print(f"{path}: its scores are {why}, all is scored anew", flush=True)
    return {"scores": {}}


def with_room_for_shots(candidates: Candidates, suite: Suite, base) -> Candidates:
    """Without the answered examples that the base cannot be shown: its template takes no turns
    before a question, or its positions end first. Says so."""
    shots = dict(candidates.shots)
    for dataset in suite.unseen:
        shown = shots.get(dataset.name)
        try:
            longest = max(map(len, base.prompt_ids(dataset.test, shown))) if shown else 0
            why = "" if longest + base.max_new_tokens <= base.positions else "they are too long"
        except InputError as error:
            why = str(error)
        if why:
            shots[dataset.name] = ()
            print(f"{dataset.name}: no {len(shown)} examples in the context ({why})", flush=True)
    return dataclasses.replace(candidates, shots=shots)


def score_all(
    suite: Suite,
    candidates: Candidates,
    keys: dict[str, str],
    base: AskedBase,
    path: pathlib.Path,
    settings: dict,
    stored: Mapping,
    at_once: int = 1,
) -> dict:
    """Scores every candidate by a base of `open_engine`; `path` keeps what is done, so that a
    stopped run goes on. keys: score_keys. stored: what read_kept gives, whose scores are not made
    again. at_once: adapters that a server is asked together.

    Returns {key: {unseen dataset: {"exact", "content", "format", "cut"}}}; each value is the list
    of scores question by question, packed. "cut" is there where answers may have no end, and was
    not kept by earlier versions.
    """
    scores = dict(stored["scores"])
    kept = {key: value for key, value in stored.items() if key not in ("format", "adapters")}
    scorers = {d.name: Scorer([e.response for e in d.test]) for d in suite.unseen}
    shots = {in_context(name): shown for name, shown in candidates.shots.items()}
    jobs: dict[str, tuple[str, list[Dataset]]] = {}  # {key: (label, what is to be scored)}
    for dataset in suite.unseen:
        for label in scored_on(candidates, dataset.name):
            if dataset.name not in scores.get(keys[label], {}):
                jobs.setdefault(keys[label], (label, []))[1].append(dataset)
    alone = {"base", *shots}

    def ask(base: AskedBase, key: str) -> tuple[str, dict[str, Answers]]:
        stop.check()
        label, datasets = jobs[key]
        base.use(None if label in alone else label)
        how = settings["evaluate"]["answers"]
        return key, answers_to(base, datasets, how, shots.get(label, ()))

    folders = [label for label, _ in jobs.values() if label not in alone]
    with with_adapters(base, folders, at_once) as bases:
        answered = each(bases, list(jobs), ask)
        for key, found in tqdm(
            answered, desc="evaluate", unit="adapter", total=len(jobs), dynamic_ncols=True
        ):
            new = {}
            for name, answers in found.items():
                values = scorers[name].each(answers.texts)
                values |= {CUT: answers.cut} if answers.cut is not None else {}
                new[name] = {measure: pack(of) for measure, of in values.items()}
            scores[key] = scores.get(key, {}) | new
            write_numbered(path, FORMAT, {**kept, "settings": settings, "scores": scores})
    return scores


def by_method(
    candidates: Candidates, name: str, questions: Callable[[str], list[float]]
) -> tuple[dict, dict, dict]:
    """Scores of an unseen dataset from those of each label (an adapter's folder, "base") question
    by question.

    Returns ({method: score}, "generated" with its spread; {method: its score question by question,
    packed}; {training dataset: score of its adapter, of those scored on every unseen dataset}).
    """
    training = {n: str(folder) for n, folder in candidates.everywhere.items()}
    of_training = {n: statistics.fmean(questions(label)) for n, label in training.items()}
    labels = {
        "base": ["base"],
        **({"in_context": [in_context(name)]} if candidates.shots.get(name) else {}),
        "nearest": list(map(str, candidates.of_nearest(name))),
        **{
            method: list(map(str, folders))
            for method, folders in candidates.by_dataset[name].items()
        },
    }
    if training:
        labels["train_mean"] = list(training.values())
        labels["train_best"] = [training[max(of_training, key=of_training.get)]]
    scores, each_question = {}, {}
    for method in METHODS:
        if labels.get(method):
            of_each = [statistics.fmean(questions(label)) for label in labels[method]]
            scores[method] = statistics.fmean(of_each)
            if method == "generated":
                scores[method] = {
                    "mean": scores[method],
                    "std": statistics.pstdev(of_each),
                    "scores": of_each,
                }
            each_question[method] = pack(
                np.mean([questions(label) for label in labels[method]], axis=0).tolist()
            )
    return scores, each_question, of_training


def evaluation_settings(config: Config, suite: str) -> dict:
    """What the scores in WORKDIR/evaluation.json depend on; suite: its fingerprint. Of an engine
    that it is a server, not where."""
    asked = {
        key: value
        for key, value in dataclasses.asdict(config.evaluate).items()
        if f"evaluate.{key}" not in NOT_OF_A_SCORE
    }
    asked["engine"] = A_SERVER if config.evaluate.engine else ""
    return {"seed": config.seed, "evaluate": asked, "suite": suite, "rule": RULE}


def evaluate(
    config: Config, suite: Suite, base_path, workdir: pathlib.Path, allowed: Collection[str] = ()
) -> dict:
    """Makes and scores all adapters and returns {"train": names, "engine": what scored, "unseen":
    {NAME: scores}, "questions"}, kept in WORKDIR/evaluation.json too, with what `measure` has found
    of the same adapters. "questions": {NAME: {measure: {method: scores question by question,
    packed}}}."""
    path = workdir / paths.EVALUATION
    settings = evaluation_settings(config, suite.fingerprint)
    candidates = make_candidates(config, suite, base_path, workdir)
    keys = score_keys(candidates, base_path)
    made_of = {
        "adapters": [keys[label] for d in suite.unseen for label in scored_on(candidates, d.name)],
        "everywhere": list(candidates.everywhere),
    }
    firsts = [keys[str(of["generated"][0])] for of in candidates.by_dataset.values()]
    # Earlier versions did not say which, and scored every training adapter.
    stored = {"everywhere": list(candidates.training)} | read_kept(path, settings, allowed)
    if made_of.items() <= stored.items():
        return stored["result"]
    same = stored.get("result", {}) if stored.get("measured_of") == firsts else {}
    base = open_engine(base_path, config.evaluate)
    candidates = with_room_for_shots(candidates, suite, base)
    # Earlier versions did not say by what.
    before = stored.get("engines", [PYTORCH] * bool(stored["scores"]))
    stored["engines"] = list(dict.fromkeys([*before, base.engine]))
    at_once = config.evaluate.engine_adapters
    scores = score_all(suite, candidates, keys, base, path, settings, stored, at_once)
    entries = {d.name: _entry(suite, candidates, d.name, scores, keys) for d in suite.unseen}
    result = {
        "train": list(candidates.training),
        "engine": ", ".join(stored["engines"]),
        "unseen": {name: entry for name, (entry, _) in entries.items()},
        "questions": {name: questions for name, (_, questions) in entries.items()},
        **{name: same[name] for name in MEASURES if name in same},
    }
    kept = {"settings": settings, "scores": scores, "engines": stored["engines"]}
    kept |= {"measured_of": firsts, "result": result}
    write_numbered(path, FORMAT, kept | made_of)
    return result


def _entry(
    suite: Suite, candidates: Candidates, name: str, scores: Mapping, keys: Mapping
) -> tuple[dict, dict]:
    """(an unseen dataset's entry of results.json, its scores question by question) from those of
    score_all."""

    def methods(measure: str) -> tuple[dict, dict, dict]:
        return by_method(candidates, name, lambda label: unpack(scores[keys[label]][name][measure]))

    exact, each, training = methods("exact")
    entry = {
        "kind": suite.kinds[name],
        "nearest_dataset": statistics.mode(candidates.nearest[name]),  # of most draws
        "wrong_dataset": wrong_task(suite, name).name,
        **exact,
        "training": training,
    }
    questions = {"exact": each}
    for part in PARTS:
        entry[part], questions[part], _ = methods(part)
    if all(CUT in scores[keys[label]][name] for label in scored_on(candidates, name)):
        shares, _, _ = methods(CUT)
        shares["generated"] = shares["generated"]["mean"]
        entry[CUT] = {m: share for m, share in shares.items() if m != "train_best"}
    return entry, questions


def run_of(suite: Suite, evaluation: Mapping, workdir: pathlib.Path) -> dict:
    """What a report says of one seed."""
    return {
        "suite": suite.name,
        "fingerprint": suite.fingerprint,
        **evaluation,
        "seconds": read_object(workdir / paths.SECONDS),
    }


def _check_seeds(given: Given) -> None:
    """Raises InputError where a table of several seeds would be replaced by one of this seed."""
    path = given.workdir / paths.RESULTS
    seeds = read_object(path).get("seeds") if path.is_file() else []
    if not isinstance(seeds, list):
        raise InputError(f"{path}: seeds = {seeds!r} is no list; move the file away")
    if len(seeds) > 1:
        again = " --remeasure" if given["remeasure"] else ""
        raise InputError(
            f"{path} is of the seeds {', '.join(map(str, seeds))}, and `dnd evaluate` scores one; "
            f"go on with `dnd quickstart --workdir={given.workdir}{again}`"
        )


def run(given: Given) -> None:
    """Runs the stage."""
    _check_seeds(given)
    config, workdir = given.config, given.workdir
    suite = open_suite(config, workdir, given["strict"], scored=True)
    base = find_base(config, workdir)
    with timed(workdir, "evaluate"):
        evaluation = evaluate(config, suite, base, workdir, given["allow"])
    runs = {config.seed: run_of(suite, evaluation, workdir)}
    publish(runs, config, workdir)
    runs[config.seed] |= measure(config, suite, base, workdir, again=given["remeasure"])
    publish_measured(runs, config, workdir)
