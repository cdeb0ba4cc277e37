"""Stage `lm-eval`: the same adapters, scored by EleutherAI's lm-evaluation-harness (`pip install
dnd-jax[lm-eval]`).

    dnd lm-eval --config=... --workdir=... [--tasks=NAME,NAME:TASK,NAME:TASK@DATA] \\
        [--limit=100] [--unsafe-code]

NAME is an unseen dataset of the suite: its own test questions become a task of the harness
(WORKDIR/lm_eval/tasks/NAME.yaml, which the `lm_eval` command runs too). NAME:TASK scores NAME's
adapters on a task of the harness: any of its names, or ARC-c, ARC-e, OBQA, BoolQ, PIQA, HellaSwag,
WinoGrande, GSM8K, HumanEval. @DATA reads that task's data from a local `datasets` folder instead of
the hub. Tasks that run what a model writes (HumanEval) are refused without --unsafe-code: nothing
shields the machine from that code.

Columns, rule and intervals are those of results.json; WORKDIR/lm_eval.json holds them.
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence

from tqdm import tqdm

from dnd_jax.base.chat import render
from dnd_jax.base.hub import packages_of
from dnd_jax.base.pretrain import find_base
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.schema import Config
from dnd_jax.core import digests, packages
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError, first_line, listed
from dnd_jax.core.files import replacing, write_json
from dnd_jax.core.formats import write_numbered
from dnd_jax.core.stage import ALLOW, ON_SUITE, Flag, Given, Stage
from dnd_jax.core.stopping import stop
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import Dataset, Suite, labels_of
from dnd_jax.scoring import intervals, report
from dnd_jax.scoring.candidates import make_candidates
from dnd_jax.scoring.evaluate import (
    FORMAT,
    by_method,
    evaluation_settings,
    read_kept,
    score_keys,
    scored_on,
)
from dnd_jax.scoring.results import add_intervals, pack, rule, summarise, unpack

lm_eval = packages.deferred("lm_eval")
SCORES = "lm_eval/scores{}.json"  # a file for each --limit
NAMES = {
    "ARC-c": "arc_challenge",
    "ARC-e": "arc_easy",
    "OBQA": "openbookqa",
    "BoolQ": "boolq",
    "PIQA": "piqa",
    "HellaSwag": "hellaswag",
    "WinoGrande": "winogrande",
    "GSM8K": "gsm8k",
    "HumanEval": "humaneval",
}
METRICS = (
    "acc_norm",
    "exact_match",
    "pass@1",
    "acc",
)  # the first of them that a task has is reported
FEWSHOT_SEED = 1234  # the harness's own default
FILTER = "strict-match"  # where a task reads answers in several ways (GSM8K)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A task of the harness, and the unseen dataset whose adapters it scores."""

    dataset: str
    task: str  # the harness's name; empty: the dataset's own questions
    data: str = ""  # a folder that replaces the task's dataset

    @property
    def title(self) -> str:
        task = f"{self.dataset}:{self.task}" if self.task else self.dataset
        return f"{task}@{self.data}" if self.data else task


def parse_tasks(texts: Sequence[str], suite: Suite) -> list[Wanted]:
    """--tasks; none: the questions of every unseen dataset. Raises InputError that lists what names
    no dataset or folder."""
    names = [d.name for d in suite.unseen]
    wanted, faults = [], []
    for text in texts or names:
        name, _, task = text.partition(":")
        task, _, data = task.partition("@")
        if name not in names:
            faults.append(f"{name!r} is none of the unseen datasets {', '.join(names)}")
        elif data and not pathlib.Path(data).is_dir():
            faults.append(f"{data} is no folder with a dataset")
        else:
            wanted.append(Wanted(name, NAMES.get(task, task), data))
    if faults:
        raise listed("--tasks", faults)
    return wanted


def write_task(folder: pathlib.Path, dataset: Dataset, tokenizer, config: Config) -> pathlib.Path:
    """Writes FOLDER/NAME.jsonl and NAME.yaml, the test questions of a dataset as a task dnd_NAME of
    the harness.

    Questions are rendered with the base's template as in training, system text included. Answers
    are asked for as config.evaluate.answers says: generated and compared (spaces at the ends do not
    count), or chosen among the labels.
    """
    path = folder.absolute() / f"{dataset.name}.jsonl"
    rows: list[dict] = [
        {"text": render(tokenizer, e.prompt, e.system), "answer": e.response} for e in dataset.test
    ]
    task = {
        "task": f"dnd_{dataset.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "doc_to_text": "text",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    if config.evaluate.answers == "likelihood":
        labels = labels_of(dataset)
        for row, example in zip(rows, dataset.test, strict=True):
            row |= {
                "labels": [label + tokenizer.eos_token for label in labels],
                "right": labels.index(example.response),
            }
        task |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "labels",
            "doc_to_target": "right",
        }
        task["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    else:
        generation = {
            "until": [tokenizer.eos_token],
            "max_gen_toks": config.evaluate.max_new_tokens,
            "do_sample": False,
        }
        task |= {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": generation,
        }
        exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        task["metric_list"] = [exact | {"regexes_to_ignore": [r"^\s+", r"\s+$"]}]
    with replacing(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    write_json(path.with_suffix(".yaml"), task)  # JSON is YAML
    return path.with_suffix(".yaml")


def load_tasks(
    wanted: Sequence[Wanted], folder: pathlib.Path, unsafe_code: bool
) -> dict[str, object]:
    """{title: lm_eval Task}. folder: where `write_task` wrote; a task with @DATA becomes a file
    there too.

    Raises InputError for an unknown task, one that runs code without unsafe_code, and data that
    cannot be had.
    """
    named = [w for w in wanted if w.task]
    manager = packages.load("lm_eval.tasks").TaskManager(
        include_defaults=bool(named)
    )  # thousands of files
    unknown = [w.task for w in named if w.task not in manager.all_subtasks]
    if unknown:
        raise InputError(
            f"--tasks: {', '.join(unknown)}: no single task of lm_eval; `lm_eval ls tasks` lists "
            "them"
        )
    runs_code = [w.task for w in named if (manager.task_index[w.task].cfg or {}).get("unsafe_code")]
    if runs_code and not unsafe_code:
        raise InputError(
            f"--tasks: {', '.join(runs_code)} runs code that a model wrote; allow it here by "
            "--unsafe-code"
        )
    tasks = {}
    for w in wanted:
        spec = w.task or str(folder.absolute() / f"{w.dataset}.yaml")
        if w.data:
            data = str(pathlib.Path(w.data).absolute())
            name = f"{w.dataset}_{w.task}_{digests.of_text(data)[:8]}"
            spec = str(folder.absolute() / f"{name}.yaml")
            of_harness = {
                "include": str(manager.task_index[w.task].yaml_path),
                "task": f"dnd_{name}",
            }
            write_json(spec, of_harness | {"dataset_path": data, "dataset_name": None})
        try:
            task = next(iter(manager.load([spec])["tasks"].values()))
        # datasets, its readers, the hub client and the tasks' own code all raise their own
        except Exception as error:
            reason = first_line(error)
            raise InputError(
                f"{w.title}: its data cannot be had ({reason}); give a folder: "
                f"{w.dataset}:{w.task}@FOLDER"
            ) from None
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        tasks[w.title] = task
    return tasks


def sample_scores(title: str, samples: Sequence[Mapping]) -> tuple[str, list[float]]:
    """(metric, its value question by question) of the harness's logged samples. Raises InputError
    when no metric is a number."""
    filters = list(dict.fromkeys(s["filter"] for s in samples))
    kept = [s for s in samples if s["filter"] == (FILTER if FILTER in filters else filters[0])]
    kept.sort(key=lambda s: s["doc_id"])
    found = [
        m for m in (*METRICS, *kept[0]["metrics"]) if isinstance(kept[0].get(m), bool | int | float)
    ]
    if not found:
        raise InputError(
            f"{title}: no metric of it ({', '.join(kept[0]['metrics'])}) is a number a question"
        )
    return found[0], [float(s[found[0]]) for s in kept]


def score(
    base, tasks: Mapping[str, object], own: set[str], batch_size: int, limit: int, unsafe_code: bool
) -> dict:
    """{title: (metric, values)} of the adapter in use. own: titles of the suite's questions, which
    are rendered already."""
    found = {}
    for rendered in (True, False):
        some = {title: task for title, task in tasks.items() if (title in own) == rendered}
        if not some:
            continue
        chat = not rendered and base.tokenizer.chat_template is not None
        model = packages.load("lm_eval.models.huggingface").HFLM(
            pretrained=base.model,
            tokenizer=base.tokenizer,
            backend="causal",
            batch_size=batch_size,
            add_bos_token=False if rendered or chat else None,
            enable_thinking=False,
        )
        for title, task in some.items():
            # Not simple_evaluate, which indexes every task of the harness and describes the machine
            # again and again.
            result = lm_eval.evaluate(
                lm=model,
                task_dict={title: task},
                limit=limit or None,
                bootstrap_iters=0,
                apply_chat_template=chat,
                confirm_run_unsafe_code=unsafe_code,
            )
            found[title] = sample_scores(title, next(iter(result["samples"].values())))
    return found


def lm_eval_stage(
    config: Config,
    suite: Suite,
    base_path,
    workdir: pathlib.Path,
    tasks: Sequence[str] = (),
    limit: int = 0,
    unsafe_code: bool = False,
    allowed: Collection[str] = (),
) -> dict:
    """Runs the stage and returns what it writes to WORKDIR/lm_eval.json; a stopped one goes on.

    Raises InputError as parse_tasks and load_tasks do.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wanted = parse_tasks(tasks, suite)
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    base = TorchBase(base_path, config.evaluate.batch_size, config.evaluate.max_new_tokens)
    folder = workdir / "lm_eval" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    datasets = {d.name: d for d in suite.unseen}
    for w in wanted:
        if not w.task:
            write_task(folder, datasets[w.dataset], base.tokenizer, config)
    loaded = load_tasks(wanted, folder, unsafe_code)
    candidates = make_candidates(config, suite, workdir)

    path = workdir / SCORES.format(f"_{limit}" if limit else "")
    settings = evaluation_settings(config, suite.fingerprint) | {"lm_eval": lm_eval.__version__}
    scores = read_kept(path, settings, base_path, allowed)["scores"]
    keys = score_keys(candidates, base_path)
    jobs: dict[str, tuple[str, dict[str, None]]] = {}
    for w in wanted:
        for label in scored_on(candidates, w.dataset):
            jobs.setdefault(keys[label], (label, {}))[1][w.title] = None
    own = {w.title for w in wanted if not w.task}
    for key, (label, titles) in tqdm(
        jobs.items(), desc="lm-eval", unit="adapter", dynamic_ncols=True
    ):
        todo = {title: loaded[title] for title in titles if title not in scores.get(key, {})}
        if todo:
            stop.check()
            base.use(None if label == "base" else label)
            found = score(base, todo, own, config.evaluate.batch_size, limit, unsafe_code)
            new = {
                title: {"metric": metric, "values": pack(values)}
                for title, (metric, values) in found.items()
            }
            scores[key] = scores.get(key, {}) | new
            write_numbered(path, FORMAT, {"settings": settings, "scores": scores})
    return finish(
        config,
        suite,
        wanted,
        candidates,
        {label: scores.get(key) for label, key in keys.items()},
        workdir,
    )


def finish(
    config: Config,
    suite: Suite,
    wanted: Sequence[Wanted],
    candidates,
    scores: Mapping,
    workdir: pathlib.Path,
) -> dict:
    """Writes WORKDIR/lm_eval.json from the scores of every label and prints its table."""
    entries, questions = {}, {}
    for w in wanted:
        values, each, training = by_method(
            candidates, w.dataset, lambda label, w=w: unpack(scores[label][w.title]["values"])
        )
        metric = scores["base"][w.title]["metric"]
        entries[w.title] = {
            "kind": suite.kinds[w.dataset],
            "metric": metric,
            **values,
            "training": training,
        }
        questions[w.title] = {"exact": each}
    mean = summarise(entries)
    add_intervals(entries, mean, {config.seed: {"unseen": entries, "questions": questions}})
    results = {
        "suite": suite.name,
        "seed": config.seed,
        "rule": rule(config),
        "intervals": intervals.NOTE,
    }
    results |= {"unseen": entries, "mean": mean}
    write_numbered(workdir / paths.HARNESS, FORMAT, results)
    metrics = ", ".join(f"{title} {entry['metric']}" for title, entry in entries.items())
    print(
        "\nlm-eval "
        f"({metrics})\n{report.table(results)}\n\n{results['rule']}\n{results['intervals']}"
    )
    print(f"results: {(workdir / paths.HARNESS).absolute()}", flush=True)
    return results


FLAGS = (
    Flag("tasks", list, [], "NAME (an unseen dataset's questions), NAME:TASK or NAME:TASK@DATA"),
    Flag("limit", int, 0, "questions a task; 0: all"),
    Flag("unsafe-code", bool, False, "allow tasks that run what a model wrote"),
)


def _run(given: Given) -> None:
    suite = open_suite(given.config, given.workdir, given["strict"], scored=True)
    base = find_base(given.config, given.workdir)
    lm_eval_stage(
        given.config,
        suite,
        base,
        given.workdir,
        given["tasks"],
        given["limit"],
        given["unsafe-code"],
        given["allow"],
    )


def _needs(given: Given) -> tuple[str, ...]:
    return ("torch", "peft", "lm_eval", *packages_of(given.config.base.path))


STAGE = Stage(_run, (*ON_SUITE, ALLOW, *FLAGS), _needs, writes=True)
