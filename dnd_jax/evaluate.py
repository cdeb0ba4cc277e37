"""Stage `evaluate`: adapters for every unseen dataset, their competitors, and the scores of all of them in PyTorch.

    dnd evaluate --config=configs/mini.py --workdir=runs/mini

The rule, fixed before any test: S adapters a dataset, from S seeded draws of N prompts of its train file (no response is read);
mean and spread over the S are reported, nothing is selected. WORKDIR/adapters/NAME is the first of them. The wrong-prompts control
does the same with another unseen dataset's prompts. Every score is kept question by question, for the intervals of the report.

Adapters are kept while their cards name this generator, these prompts and checkpoints by their hashes, and scores by a hash of the
adapter's files: another generator in the same workdir gets its own.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import numpy as np
from tqdm import tqdm

from dnd_jax import loop, scoring
from dnd_jax.adapters import (
    as_folder,
    dataset_checkpoints,
    fingerprint,
    is_made_from,
    load_adapter,
    load_adapter_config,
    save_adapter,
)
from dnd_jax.card import digest
from dnd_jax.collection import Checkpoints
from dnd_jax.competitors import Ridge, mean_weights, nearest, running_mean
from dnd_jax.config import Config
from dnd_jax.errors import InputError
from dnd_jax.files import read_json, write_json
from dnd_jax.forms import condition_texts
from dnd_jax.generate import TrainedGenerator, draw_prompts
from dnd_jax.generator_folder import read_record
from dnd_jax.models import hf
from dnd_jax.overhead import measure_overhead
from dnd_jax.results import METHODS, pack, unpack
from dnd_jax.stopping import stop
from dnd_jax.suite import Dataset, Suite
from dnd_jax.targets import ElementTarget

EVALUATION = "evaluation.json"
RIDGE_DRAWS = 16
COMPARED = 32  # questions of a dataset on which JAX and PyTorch are compared: logits of a large vocabulary are gigabytes
TIMED = 100  # steps of tuning that are timed for the overhead


def wrong_task(suite: Suite, name: str) -> Dataset:
    """The unseen dataset whose prompts serve as the wrong ones for `name`: the next of its kind, or else the next of all."""
    same = [d for d in suite.unseen if suite.kinds[d.name] == suite.kinds[name]]
    pool = same if len(same) > 1 else suite.unseen if len(suite.unseen) > 1 else [*suite.unseen, *suite.train]
    at = [d.name for d in pool].index(name)
    return pool[(at + 1) % len(pool)]


def repeat_few(prompts: Sequence[str], different: int, count: int, seed: int) -> Sequence[str]:
    """`different` of the prompts, drawn by the seed and repeated side by side to `count`; all prompts as they are for 0."""
    if not different:
        return prompts
    few = draw_prompts(prompts, different, seed)
    return [few[i * different // count] for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Adapter folders to score: of each unseen dataset by method, and those that every unseen dataset shares."""

    by_dataset: dict[str, dict[str, list[pathlib.Path]]]
    training: dict[str, pathlib.Path]  # the last checkpoint of each training dataset
    nearest: dict[str, str]  # unseen dataset -> training dataset


def check_asked_alike(config: Config, generator: TrainedGenerator) -> None:
    """Raises InputError unless the configuration gives a generator what it was trained on, listing what differs; another suite may
    be asked of it."""
    asked = ("num_prompts", "max_text_length", "layer", "form")
    datasets = read_record(generator.folder)["train"].get("datasets", config.train.datasets)  # an imported one does not say
    then, now = (
        {"condition": {key: getattr(condition, key) for key in asked}, "train": {"datasets": number}}
        for condition, number in ((generator.condition, datasets), (config.condition, config.train.datasets))
    )
    loop.check_same_run(generator.folder, then, now)


def make_candidates(config: Config, suite: Suite, workdir: pathlib.Path) -> Candidates:
    """Generates the adapters of all unseen datasets and builds their competitors, as PEFT folders; those that are there and were
    made from this generator, these prompts and checkpoints are kept."""
    suite = suite.with_training(config.train.datasets, config.seed)
    generator = TrainedGenerator(workdir / "generator")
    check_asked_alike(config, generator)
    checkpoints = Checkpoints(config, suite, workdir)
    loras = hashlib.sha256(json.dumps(checkpoints.identity()).encode()).hexdigest()
    encoder, adapter, competitors = generator.encoder, generator.adapter, workdir / "competitors"
    n, samples, different = config.condition.num_prompts, config.evaluate.samples, config.evaluate.num_prompts
    anew: list[pathlib.Path] = []

    def kept(folder: pathlib.Path, card: str, make: Callable[[], object]) -> pathlib.Path:
        """The folder, written by `make` unless it is there and made from what its card is to name."""
        if not is_made_from(folder, card):
            anew.extend([folder] if folder.is_dir() else [])
            make()
        return folder

    def texts(dataset: Dataset) -> list[str]:
        return condition_texts(dataset.pool, config.condition.form, config.seed)

    def pooled(prompts: list[str]) -> np.ndarray:
        return encoder.cached_means(prompts, workdir / "embeddings")

    training = {d.name: pooled(condition_texts(d.train, config.condition.form, config.seed)) for d in suite.train}
    mean_card = f"The mean of the training LoRA checkpoints (sha256 {loras}).\n"
    mean_folder = kept(
        competitors / "mean_adapter",
        mean_card,
        lambda: save_adapter(
            competitors / "mean_adapter", mean_weights(tensors for _, tensors in checkpoints.tensors()), adapter, mean_card
        ),
    )

    @functools.cache
    def ridge() -> Ridge:
        target = generator.target
        if not isinstance(target, ElementTarget):
            target = ElementTarget.fit(generator.layout, checkpoints.tensors)
        tokens = (running_mean(target.encode(x, source) for source, x in checkpoints.tensors(name)) for name in training)
        rng = np.random.default_rng(config.seed)
        draws = [[rng.choice(len(x), n, replace=False) for _ in range(RIDGE_DRAWS)] for x in training.values()]
        return Ridge.fit(target, training, tokens, draws)

    def generated(pool: Sequence[str], folder: pathlib.Path, seed: int, source: str) -> pathlib.Path:
        prompts = repeat_few(pool, different, n, seed)
        card = generator.card(generator.draw(prompts, seed, source), seed)
        return kept(folder, card, lambda: generator.write(prompts, folder, seed, source))

    def predicted(prompts: list[str], folder: pathlib.Path) -> pathlib.Path:
        card = (
            f"Ridge regression from prompts (sha256 {digest(prompts)}), fitted to the training LoRA checkpoints (sha256 {loras}) "
            f"as the tokens of a generator (sha256 {generator.fingerprint}).\n"
        )
        return kept(folder, card, lambda: save_adapter(folder, ridge().tensors(pooled(prompts)), adapter, card))

    by_dataset, closest = {}, {}
    for dataset in tqdm(suite.unseen, desc="generate", unit="dataset", dynamic_ncols=True):
        stop.check()
        name, prompts = dataset.name, texts(dataset)
        wrong = texts(wrong_task(suite, name))
        drawn = draw_prompts(repeat_few(prompts, different, n, 0), n, 0)
        closest[name] = nearest(pooled(drawn), training)
        found: dict[str, list[pathlib.Path]] = {"mean_adapter": [mean_folder], "generated": [], "wrong_prompts": []}
        for seed in range(samples):
            folder = competitors / "generated" / name / f"seed_{seed}" if seed else workdir / "adapters" / name
            found["generated"].append(generated(prompts, folder, seed, f"prompts of {name}"))
            folder = competitors / "wrong_prompts" / name / f"seed_{seed}"
            found["wrong_prompts"].append(generated(wrong, folder, seed, f"prompts of {name}"))
        if len(suite.train) > 2:
            found["ridge"] = [predicted(drawn, competitors / "ridge" / name)]
        tuned = dataset_checkpoints(checkpoints.root / name)
        if tuned:
            found["tuned"] = [as_folder(tuned[-1], competitors / "tuned" / name)]
        by_dataset[name] = found
    last = {name: as_folder(paths[-1], competitors / "training" / name) for name, paths in checkpoints.folders.items()}
    if anew:
        what = "were of another generator, other prompts or other LoRA checkpoints, and are made anew"
        print(f"{workdir}: {len(anew)} adapter(s) {what} ({anew[0].relative_to(workdir)}, ...)", flush=True)
    return Candidates(by_dataset, last, closest)


def answers_to(base, datasets: Sequence[Dataset], how: str) -> dict[str, list[str]]:
    """{dataset: answers to its test questions} of the adapter in use; how: config.evaluate.answers."""
    if how == "likelihood":
        return {d.name: base.choose(d.test, scoring.labels_of(d)) for d in datasets}
    answers = base.decode(base.answer_ids([e for d in datasets for e in d.test]))
    found = {}
    for d in datasets:
        found[d.name], answers = answers[: len(d.test)], answers[len(d.test) :]
    return found


def scored_on(candidates: Candidates, name: str) -> list[str]:
    """Labels of what is scored on an unseen dataset: "base", and folders of adapters."""
    return ["base", *map(str, candidates.training.values()), *map(str, sum(candidates.by_dataset[name].values(), []))]


def score_keys(candidates: Candidates, base_path) -> dict[str, str]:
    """{label: what its scores are kept under}, hashes of the base's and the adapter's files, so that another one in the place of
    either is not it."""
    labels = dict.fromkeys(label for name in candidates.by_dataset for label in scored_on(candidates, name))
    base = hf.base_digest(base_path)
    return {label: base if label == "base" else f"{fingerprint(label)} on {base}" for label in labels}


def read_kept(path: pathlib.Path, settings: dict) -> dict:
    """What a stopped or finished stage has kept, its "scores" by score_keys. Raises InputError when its settings were others."""
    if not path.is_file():
        return {"settings": settings, "scores": {}}
    stored = read_json(path)
    loop.check_same_run(path, stored["settings"], settings)
    return stored


def score_all(suite: Suite, candidates: Candidates, keys: dict[str, str], base, path: pathlib.Path, settings: dict) -> dict:
    """Scores every candidate in PyTorch; `path` keeps what is done, so that a stopped run goes on. keys: score_keys.

    Returns {key: {unseen dataset: {"exact", "content", "format"}}}; each value is the list of scores question by question, packed.
    """
    scores = read_kept(path, settings)["scores"]
    scorers = {d.name: scoring.Scorer([e.response for e in d.test]) for d in suite.unseen}
    jobs: dict[str, tuple[str, dict[str, Dataset]]] = {}
    for dataset in suite.unseen:
        for label in scored_on(candidates, dataset.name):
            jobs.setdefault(keys[label], (label, {}))[1][dataset.name] = dataset
    for key, (label, datasets) in tqdm(jobs.items(), desc="evaluate", unit="adapter", dynamic_ncols=True):
        todo = [d for name, d in datasets.items() if name not in scores.get(key, {})]
        if not todo:
            continue
        stop.check()
        base.use(None if label == "base" else label)
        answers = answers_to(base, todo, settings["evaluate"]["answers"])
        each = {name: scorers[name].each(texts) for name, texts in answers.items()}
        new = {name: {measure: pack(values) for measure, values in of.items()} for name, of in each.items()}
        scores[key] = scores.get(key, {}) | new
        write_json(path, {"settings": settings, "scores": scores})
    return scores


def by_method(candidates: Candidates, name: str, questions: Callable[[str], list[float]]) -> tuple[dict, dict, dict]:
    """Scores of an unseen dataset from those of each label (an adapter's folder, "base") question by question.

    Returns ({method: score}, "generated" with its spread; {method: its score question by question, packed}; {training dataset:
    score of its adapter}).
    """
    training = {n: str(folder) for n, folder in candidates.training.items()}
    of_training = {n: statistics.fmean(questions(label)) for n, label in training.items()}
    labels = {
        "base": ["base"],
        "train_mean": list(training.values()),
        "train_best": [training[max(of_training, key=of_training.get)]],
        "nearest": [training[candidates.nearest[name]]],
        **{method: list(map(str, folders)) for method, folders in candidates.by_dataset[name].items()},
    }
    scores, each_question = {}, {}
    for method in METHODS:
        if method in labels:
            of_each = [statistics.fmean(questions(label)) for label in labels[method]]
            scores[method] = statistics.fmean(of_each)
            if method == "generated":
                scores[method] = {"mean": scores[method], "std": statistics.pstdev(of_each), "scores": of_each}
            each_question[method] = pack(np.mean([questions(label) for label in labels[method]], axis=0).tolist())
    return scores, each_question, of_training


def agreement(config: Config, suite: Suite, candidates: Candidates, base, base_path) -> dict:
    """How well our base agrees with PyTorch on the generated adapters: greedy answers to the first COMPARED questions of each
    dataset, and the logits along them. Memory: logits of config.evaluate.batch_size questions."""
    module, params = hf.load_base(base_path)
    greedy = scoring.make_greedy(module, config.evaluate.max_new_tokens)
    end, pad = base.tokenizer.eos_token_id, base.tokenizer.pad_token_id

    @jax.jit
    def logits_of(params, lora, scale, ids, valid):
        return module.apply({"params": params}, ids, lora, scale, valid)

    same = total = 0
    worst = 0.0
    for dataset in tqdm(suite.unseen, desc="compare with JAX", unit="dataset", dynamic_ncols=True):
        folder = candidates.by_dataset[dataset.name]["generated"][0]
        base.use(folder)
        lora, scale = jax.device_put(load_adapter(folder)), load_adapter_config(folder).scale
        questions = dataset.test[:COMPARED]
        for first in range(0, len(questions), config.evaluate.batch_size):
            stop.check()
            batch = questions[first : first + config.evaluate.batch_size]
            prompts, theirs = base.prompt_ids(batch), base.answer_ids(batch)
            ours = np.asarray(greedy(params, lora, scale, *scoring.pad_left(prompts, pad), end)).tolist()
            ours = [row[: row.index(end)] if end in row else row for row in ours]
            same += sum(a == b for a, b in zip(ours, theirs, strict=True))
            total += len(theirs)
            rows = [p + a for p, a in zip(prompts, theirs, strict=True)]
            ids, valid = scoring.pad_left(rows, pad)
            difference = np.abs(np.asarray(logits_of(params, lora, scale, ids, valid)) - base.logits(rows))
            worst = max(worst, float((difference * valid[..., None]).max()))
    questions = sum(len(d.test) for d in suite.unseen)
    return {"questions": questions, "answers": total, "same_answers": same, "largest_logit_difference": worst}


def measured_in_jax(config: Config, suite: Suite, candidates: Candidates, base, base_path, workdir: pathlib.Path) -> dict:
    """{"agreement", "overhead"}; each only a "note" for a base that our own code does not run, whose adapters were imported."""
    try:
        hf.load_base_config(base_path)
    except InputError as error:
        note = f"Not measured, because only PyTorch runs this base. {error}"
        return {"agreement": {"note": note}, "overhead": {"note": note}}
    return {
        "agreement": agreement(config, suite, candidates, base, base_path),
        "overhead": measure_overhead(config, suite, workdir, base_path, TIMED),
    }


def evaluation_settings(config: Config, suite: str) -> dict:
    """What WORKDIR/evaluation.json must agree with; suite: its fingerprint."""
    return {"seed": config.seed, "evaluate": dataclasses.asdict(config.evaluate), "suite": suite}


def evaluate(config: Config, suite: Suite, base_path, workdir: pathlib.Path) -> dict:
    """Runs the whole stage and returns {"train": names, "unseen": {NAME: scores}, "questions", "agreement", "overhead"}, kept in
    WORKDIR/evaluation.json too. "questions": {NAME: {measure: {method: scores question by question, packed}}}."""
    from dnd_jax.torch_scoring import TorchBase

    path = workdir / EVALUATION
    settings = evaluation_settings(config, suite.fingerprint)
    candidates = make_candidates(config, suite, workdir)
    keys = score_keys(candidates, base_path)
    adapters = [keys[label] for dataset in suite.unseen for label in scored_on(candidates, dataset.name)]
    stored = read_kept(path, settings)
    if stored.get("adapters") == adapters:
        return stored["result"]
    base = TorchBase(base_path, config.evaluate.batch_size, config.evaluate.max_new_tokens)
    scores = score_all(suite, candidates, keys, base, path, settings)

    unseen, questions = {}, {}
    for dataset in suite.unseen:
        name = dataset.name
        entry: dict = {
            "kind": suite.kinds[name],
            "nearest_dataset": candidates.nearest[name],
            "wrong_dataset": wrong_task(suite, name).name,
        }
        questions[name] = {}
        for measure in scoring.SCORES:
            values, questions[name][measure], training = by_method(
                candidates, name, lambda label, name=name, measure=measure: unpack(scores[keys[label]][name][measure])
            )
            if measure == "exact":
                entry |= {**values, "training": training}
            else:
                entry[measure] = values
        unseen[name] = entry
    result = {
        "train": list(candidates.training),
        "unseen": unseen,
        "questions": questions,
        **measured_in_jax(config, suite, candidates, base, base_path, workdir),
    }
    write_json(path, {"settings": settings, "scores": scores, "adapters": adapters, "result": result})
    return result
