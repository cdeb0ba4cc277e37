"""Stage `evaluate`: adapters for every unseen dataset, their competitors, and the scores of all of them in PyTorch.

    dnd evaluate --config=configs/mini.py --workdir=runs/mini

The rule, fixed before any test: S adapters a dataset, from S seeded draws of N prompts of its train file (no response is read);
mean and spread over the S are reported, nothing is selected. WORKDIR/adapters/NAME is the first of them. The wrong-prompts control
does the same with another unseen dataset's prompts. Every score is kept question by question, for the intervals of the report.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import numpy as np
from tqdm import tqdm

from dnd_jax import loop, scoring
from dnd_jax.adapters import as_folder, checkpoint_folders, dataset_checkpoints, load_adapter, save_adapter
from dnd_jax.competitors import Ridge, mean_weights, nearest
from dnd_jax.config import Config
from dnd_jax.files import read_json, write_json
from dnd_jax.forms import condition_texts
from dnd_jax.generate import TrainedGenerator, draw_prompts
from dnd_jax.models import hf
from dnd_jax.overhead import measure_overhead
from dnd_jax.results import METHODS, pack, unpack
from dnd_jax.stopping import stop
from dnd_jax.suite import Dataset, Suite
from dnd_jax.targets import ElementTarget

EVALUATION = "evaluation.json"
RIDGE_DRAWS = 16


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


def make_candidates(config: Config, suite: Suite, workdir: pathlib.Path) -> Candidates:
    """Generates the adapters of all unseen datasets and builds their competitors, as PEFT folders; finished ones are kept."""
    suite = suite.with_training(config.train.datasets, config.seed)
    generator = TrainedGenerator(workdir / "generator")
    root = pathlib.Path(config.train.checkpoints or workdir / "loras")
    folders = checkpoint_folders(root, [d.name for d in suite.train])
    encoder, adapter = generator.encoder, generator.adapter
    n, samples, different = config.condition.num_prompts, config.evaluate.samples, config.evaluate.num_prompts

    def texts(dataset: Dataset) -> list[str]:
        return condition_texts(dataset.train, config.condition.form, config.seed)

    def pooled(prompts: list[str]) -> np.ndarray:
        return encoder.cached_means(prompts, workdir / "embeddings")

    training = {d.name: pooled(texts(d)) for d in suite.train}
    mean_folder = workdir / "competitors" / "mean_adapter"
    if not mean_folder.is_dir():
        every = (load_adapter(f) for per_dataset in folders.values() for f in per_dataset)
        save_adapter(mean_folder, mean_weights(every), adapter)

    ridge = None
    if len(suite.train) > 2 and not all((workdir / "competitors" / "ridge" / d.name).is_dir() for d in suite.unseen):
        target = generator.target
        if not isinstance(target, ElementTarget):
            checkpoints = [(str(f), f) for per_dataset in folders.values() for f in per_dataset]
            target = ElementTarget.fit(generator.layout, lambda: ((name, load_adapter(f)) for name, f in checkpoints))
        weights = {
            name: np.mean([target.encode(load_adapter(f)) for f in per_dataset], axis=0) for name, per_dataset in folders.items()
        }
        rng = np.random.default_rng(config.seed)
        draws = [[rng.choice(len(x), n, replace=False) for _ in range(RIDGE_DRAWS)] for x in training.values()]
        ridge = Ridge.fit(target, training, weights, draws)

    by_dataset, closest = {}, {}
    for dataset in tqdm(suite.unseen, desc="generate", unit="dataset", dynamic_ncols=True):
        stop.check()
        name, prompts = dataset.name, texts(dataset)
        wrong = texts(wrong_task(suite, name))
        drawn = pooled(draw_prompts(repeat_few(prompts, different, n, 0), n, 0))
        closest[name] = nearest(drawn, training)
        found: dict[str, list[pathlib.Path]] = {"mean_adapter": [mean_folder], "generated": [], "wrong_prompts": []}
        for seed in range(samples):
            other = workdir / "competitors" / "generated" / name / f"seed_{seed}"
            found["generated"].append(workdir / "adapters" / name if seed == 0 else other)
            found["wrong_prompts"].append(workdir / "competitors" / "wrong_prompts" / name / f"seed_{seed}")
            for method, pool in (("generated", prompts), ("wrong_prompts", wrong)):
                if not found[method][-1].is_dir():
                    generator.write(repeat_few(pool, different, n, seed), found[method][-1], seed, f"prompts of {name}")
        found["ridge"] = [workdir / "competitors" / "ridge" / name]
        if ridge is not None:
            save_adapter(found["ridge"][0], ridge.tensors(drawn), adapter)
        elif not found["ridge"][0].is_dir():
            del found["ridge"]
        tuned = dataset_checkpoints(root / name)
        if tuned:
            found["tuned"] = [as_folder(tuned[-1], workdir / "competitors" / "tuned" / name)]
        by_dataset[name] = found
    last = {name: as_folder(paths[-1], workdir / "competitors" / "training" / name) for name, paths in folders.items()}
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


def kept_scores(path: pathlib.Path, settings: dict) -> dict[str, dict]:
    """The scores of a stopped stage; none yet without a file. Raises InputError when its settings were others."""
    if not path.is_file():
        return {}
    stored = read_json(path)
    loop.check_same_run(path, stored["settings"], settings)
    return stored["scores"]


def score_all(suite: Suite, candidates: Candidates, base, path: pathlib.Path, settings: dict) -> dict:
    """Scores every candidate in PyTorch; `path` keeps what is done, so that a stopped run goes on.

    Returns {label: {unseen dataset: {"exact", "content", "format"}}}, label an adapter's folder or "base"; each value is the list
    of scores question by question, packed.
    """
    scores = kept_scores(path, settings)
    scorers = {d.name: scoring.Scorer([e.response for e in d.test]) for d in suite.unseen}

    jobs: dict[str, tuple[pathlib.Path | None, list[Dataset]]] = {"base": (None, list(suite.unseen))}
    jobs |= {str(folder): (folder, list(suite.unseen)) for folder in candidates.training.values()}
    for dataset in suite.unseen:
        for folder in sum(candidates.by_dataset[dataset.name].values(), []):
            jobs.setdefault(str(folder), (folder, []))[1].append(dataset)
    todo = {label: job for label, job in jobs.items() if label not in scores}
    for label, (folder, datasets) in tqdm(todo.items(), desc="score in PyTorch", unit="adapter", dynamic_ncols=True):
        stop.check()
        base.use(folder)
        answers = answers_to(base, datasets, settings["evaluate"]["answers"])
        each = {name: scorers[name].each(texts) for name, texts in answers.items()}
        scores[label] = {name: {measure: pack(values) for measure, values in of.items()} for name, of in each.items()}
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
    """How well our base agrees with PyTorch on the generated adapters: all greedy answers, and the logits along them."""
    module, params = hf.load_base(base_path)
    greedy = scoring.make_greedy(module, config.evaluate.max_new_tokens)
    end, pad = base.tokenizer.eos_token_id, base.tokenizer.pad_token_id

    @jax.jit
    def logits_of(params, lora, scale, ids, valid):
        return module.apply({"params": params}, ids, lora, scale, valid)

    same = total = 0
    worst = 0.0
    scale = config.lora.alpha / config.lora.rank
    for dataset in tqdm(suite.unseen, desc="compare with JAX", unit="dataset", dynamic_ncols=True):
        stop.check()
        folder = candidates.by_dataset[dataset.name]["generated"][0]
        base.use(folder)
        theirs, lora = base.answer_ids(dataset.test), load_adapter(folder)
        prompts = base.prompt_ids(dataset.test)
        ours = np.asarray(greedy(params, lora, scale, *scoring.pad_left(prompts, pad), end)).tolist()
        ours = [row[: row.index(end)] if end in row else row for row in ours]
        same += sum(a == b for a, b in zip(ours, theirs, strict=True))
        total += len(theirs)
        rows = [p + a for p, a in zip(prompts, theirs, strict=True)]
        ids, valid = scoring.pad_left(rows, pad)
        difference = np.abs(np.asarray(logits_of(params, lora, scale, ids, valid)) - base.logits(rows))
        worst = max(worst, float((difference * valid[..., None]).max()))
    return {"answers": total, "same_answers": same, "largest_logit_difference": worst}


def evaluation_settings(config: Config, suite: str) -> dict:
    """What WORKDIR/evaluation.json must agree with, beside the adapters; suite: its fingerprint."""
    return {"seed": config.seed, "evaluate": dataclasses.asdict(config.evaluate), "suite": suite}


def evaluate(config: Config, suite: Suite, base_path, workdir: pathlib.Path) -> dict:
    """Runs the whole stage and returns {"train": names, "unseen": {NAME: scores}, "questions", "agreement", "overhead"}, kept in
    WORKDIR/evaluation.json too. "questions": {NAME: {measure: {method: scores question by question, packed}}}."""
    from dnd_jax.torch_scoring import TorchBase

    path = workdir / EVALUATION
    settings = evaluation_settings(config, suite.fingerprint)
    candidates = make_candidates(config, suite, workdir)
    if path.is_file() and "result" in (stored := read_json(path)):
        loop.check_same_run(path, stored["settings"], settings)
        return stored["result"]
    base = TorchBase(base_path, config.evaluate.batch_size, config.evaluate.max_new_tokens)
    scores = score_all(suite, candidates, base, path, settings)

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
                candidates, name, lambda label, name=name, measure=measure: unpack(scores[label][name][measure])
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
        "agreement": agreement(config, suite, candidates, base, base_path),
        "overhead": measure_overhead(config, suite, workdir, base_path),
    }
    write_json(path, {"settings": settings, "scores": scores, "result": result})
    return result
