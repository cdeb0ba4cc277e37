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
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

from tqdm import tqdm

from dnd_jax.base.chat import ends_of, render, until_end
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.found import find_base
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.schema import Config
from dnd_jax.core import packages
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.formats import write_numbered
from dnd_jax.core.stage import Given
from dnd_jax.core.stopping import stop
from dnd_jax.data.opened import open_suite
from dnd_jax.data.rows import digest_of
from dnd_jax.data.suite import Suite
from dnd_jax.scoring import intervals, report
from dnd_jax.scoring.candidates import Candidates, make_candidates
from dnd_jax.scoring.evaluate import (
    FORMAT,
    by_method,
    evaluation_settings,
    read_kept,
    score_keys,
    scored_on,
)
from dnd_jax.scoring.lm_eval_tasks import Wanted, load_tasks, parse_tasks, write_task
from dnd_jax.scoring.results import FREE_FORM, add_intervals, pack, rule, summarise, unpack

lm_eval = packages.deferred("lm_eval")
SCORES = "lm_eval/scores{}.json"  # a file for each --limit
# The first of these that a task has is reported.
METRICS = ("acc_norm", "exact_match", "pass@1", "acc")
FILTER = "strict-match"  # where a task reads answers in several ways (GSM8K)


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


def chat_text(tokenizer, said: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
    """A question of the harness as the base is asked elsewhere. said: at most a system text, the
    question, and the beginning of its answer."""
    texts = {message["role"]: message["content"] for message in said}
    if len(texts) < len(said):
        raise InputError("lm-eval asks in several turns, which chat templates are not checked for")
    asked = render(tokenizer, texts["user"], texts.get("system", ""))
    return asked + texts.get("assistant", "")


def answer_of(
    base: TorchBase, whole: bool, tokens: int | Sequence[int], skip_special_tokens: bool = True
) -> str:
    """The text of an answer's tokens, up to the first that ends it; of a single token, itself.
    whole: special tokens are shown, as `TorchBase.decode` does."""
    skip_special_tokens = skip_special_tokens and not whole
    if isinstance(tokens, Sequence):
        tokens = until_end(tokens, base.ends)
    return base.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)


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
        )
        model.apply_chat_template = functools.partial(chat_text, base.tokenizer)
        model.tok_decode = functools.partial(answer_of, base, rendered)
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

    Raises InputError as parse_tasks and load_tasks do, before anything is generated.
    """
    if config.evaluate.engine:
        raise InputError(
            f"config.evaluate.engine = {config.evaluate.engine!r}: `dnd lm-eval` scores in "
            "PyTorch; leave it out"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    wanted = parse_tasks(tasks, suite)
    loaded = _tasks(wanted, suite, base_path, config, workdir, unsafe_code)
    # Examples in the context are the harness's own affair: num_fewshot of a task.
    candidates = dataclasses.replace(make_candidates(config, suite, base_path, workdir), shots={})
    keys = score_keys(candidates, base_path)
    path = workdir / SCORES.format(f"_{limit}" if limit else "")
    settings = evaluation_settings(config, suite.fingerprint) | {"lm_eval": lm_eval.__version__}
    own = {w.title for w in wanted if not w.task}
    scores = dict(read_kept(path, settings, allowed)["scores"])
    base = TorchBase.of(base_path, config.evaluate)

    def scored(tasks: Mapping[str, object]) -> dict:
        return score(base, tasks, own, config.evaluate.batch_size, limit, unsafe_code)

    score_all(wanted, loaded, candidates, keys, base, scored, path, settings, scores)
    of_label = {label: scores.get(key) for label, key in keys.items()}
    return finish(config, suite, wanted, candidates, of_label, workdir)


def _tasks(
    wanted: Sequence[Wanted],
    suite: Suite,
    base_path,
    config: Config,
    workdir: pathlib.Path,
    unsafe_code: bool,
) -> dict[str, object]:
    """`load_tasks`, those of the suite's own questions written first."""
    folder, tokenizer = workdir / "lm_eval" / "tasks", load_tokenizer(base_path)
    ends = ends_of(base_path, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    datasets = {d.name: d for d in suite.unseen}
    for w in wanted:
        if not w.task:
            write_task(folder, datasets[w.dataset], tokenizer, ends, config)
    return load_tasks(wanted, folder, unsafe_code)


def score_all(
    wanted: Sequence[Wanted],
    loaded: Mapping[str, object],
    candidates: Candidates,
    keys: Mapping[str, str],
    base: TorchBase,
    scored: Callable[[Mapping[str, object]], dict],
    path: pathlib.Path,
    settings: dict,
    scores: dict,
) -> None:
    """Adds what `scores`, {key: {title: {"metric", "values" packed}}}, lacks of the adapters;
    `path` keeps each when it is scored, of own data with their digest. scored: `score` of the
    adapter in use."""
    data = {w.title: {"data": digest_of(w.data)} for w in wanted if w.data}
    jobs: dict[str, tuple[str, dict[str, None]]] = {}
    for w in wanted:
        for label in scored_on(candidates, w.dataset):
            jobs.setdefault(keys[label], (label, {}))[1][w.title] = None
    progress = tqdm(jobs.items(), desc="lm-eval", unit="adapter", dynamic_ncols=True)
    for key, (label, titles) in progress:
        kept = scores.get(key, {})
        todo = {
            title: loaded[title]
            for title in titles
            if title not in kept or not data.get(title, {}).items() <= kept[title].items()
        }
        if not todo:
            continue
        stop.check()
        base.use(None if label == "base" else label)
        new = {
            title: {"metric": metric, "values": pack(values), **data.get(title, {})}
            for title, (metric, values) in scored(todo).items()
        }
        scores[key] = kept | new
        write_numbered(path, FORMAT, {"settings": settings, "scores": scores})


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
        "rule": rule(config, len(candidates.training)),
        "intervals": intervals.NOTE,
    }
    results |= {"unseen": entries, "mean": mean}
    write_numbered(workdir / paths.HARNESS, FORMAT, results)
    metrics = ", ".join(f"{title} {entry['metric']}" for title, entry in entries.items())
    print(f"\nlm-eval ({metrics})\n{report.table(results)}\n")
    if config.evaluate.free_form and not all(w.task for w in wanted):
        print(FREE_FORM.format(name=wanted[0].dataset))
    print(results["rule"], results["intervals"], sep="\n")
    print(f"results: {(workdir / paths.HARNESS).absolute()}", flush=True)
    return results


def run(given: Given) -> None:
    """Runs the stage."""
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
