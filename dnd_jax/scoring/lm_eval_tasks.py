"""What `dnd lm-eval` asks: the suite's own questions as tasks of the lm-evaluation-harness, and the
harness's tasks by name."""

import dataclasses
import glob
import os
import pathlib
import shutil
from collections.abc import Sequence

from dnd_jax.base.chat import answer_text, render
from dnd_jax.config.schema import Config
from dnd_jax.core import digests, packages
from dnd_jax.core.errors import InputError, first_line, listed
from dnd_jax.core.files import as_json, replacing, write_json
from dnd_jax.data.rows import cache_of
from dnd_jax.data.suite import Dataset, Suite, labels_of
from dnd_jax.scoring import answers

datasets = packages.deferred("datasets")

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
FEWSHOT_SEED = 1234  # the harness's own default
# How the suite's own tasks compare answers: this copy of scoring/answers.py lies beside them.
RULE = "dnd_answers.py"
RESULT = "!function dnd_answers.harness_result"


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
        data = os.path.expanduser(data)
        if name not in names:
            faults.append(f"{name!r} is none of the unseen datasets {', '.join(names)}")
        elif data and not pathlib.Path(data).is_dir():
            faults.append(f"{data} is no folder with a dataset")
        else:
            wanted.append(Wanted(name, NAMES.get(task, task), data))
    if faults:
        raise listed("--tasks", faults)
    return wanted


def write_task(
    folder: pathlib.Path, dataset: Dataset, tokenizer, ends: Sequence[int], config: Config
) -> pathlib.Path:
    """Writes FOLDER/NAME.parquet and NAME.yaml, the test questions of a dataset as a task dnd_NAME
    of the harness, and RULE, by which it compares answers as `dnd evaluate` does.

    Questions are rendered with the base's template as in training, system text included. Answers
    are asked for as config.evaluate.answers says: generated up to any of the tokens `ends`, or
    chosen among the labels.
    """
    path = folder.absolute() / f"{dataset.name}.parquet"
    rows: list[dict] = [
        {"text": render(tokenizer, e.prompt, e.system), "answer": e.response} for e in dataset.test
    ]
    task = {
        "task": f"dnd_{dataset.name}",
        "dataset_path": "parquet",  # not JSON, whose reader takes texts for dates
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(path))}},
        "test_split": "test",
        "doc_to_text": "text",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 2},
        "process_results": RESULT,
    }
    if config.evaluate.answers == "likelihood":
        labels = labels_of(dataset)
        for row in rows:
            row["labels"] = labels
            row["choices"] = [answer_text(tokenizer, label) for label in labels]
            row["right"] = labels.index(row["answer"])
        task |= _CHOSEN
    else:
        task |= _generated(_texts_of(tokenizer, ends), config.evaluate.max_new_tokens)
    with replacing(path) as temporary:
        datasets.Dataset.from_list(rows).to_parquet(temporary)
    shutil.copyfile(answers.__file__, folder / RULE)
    # JSON is YAML, but for the tag that names a function.
    text = as_json(task).replace(f'"{RESULT}"', RESULT)
    with replacing(path.with_suffix(".yaml")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path.with_suffix(".yaml")


def _texts_of(tokenizer, ends: Sequence[int]) -> list[str]:
    """What the harness cuts a generated text at, which sees no tokens: the ends that are no plain
    text, and the padding behind them."""
    added = tokenizer.added_tokens_decoder
    texts = tokenizer.batch_decode([[i] for i in (*ends, tokenizer.pad_token_id) if i in added])
    return [text for text in dict.fromkeys(texts) if text.strip()]


_CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _generated(until: Sequence[str], tokens: int) -> dict:
    """How a task asks for greedy answers of so many tokens."""
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": until, "max_gen_toks": tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def load_tasks(
    wanted: Sequence[Wanted], folder: pathlib.Path, unsafe_code: bool
) -> dict[str, object]:
    """{title: lm_eval Task}. folder: where `write_task` wrote; a task with @DATA becomes a file
    there too.

    Raises InputError for an unknown task, one that runs code without unsafe_code, and data or a
    package that cannot be had.
    """
    named = [w for w in wanted if w.task]
    # The defaults are thousands of files.
    manager = packages.load("lm_eval.tasks").TaskManager(include_defaults=bool(named))
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
    return {w.title: _load_task(manager, w, _written(manager, w, folder)) for w in wanted}


def _written(manager, wanted: Wanted, folder: pathlib.Path) -> str:
    """What the harness finds a task by: its name, or the file of one with own questions or data."""
    if not wanted.data:
        return wanted.task or str(folder.absolute() / f"{wanted.dataset}.yaml")
    data = str(pathlib.Path(wanted.data).absolute())
    name = f"{wanted.dataset}_{wanted.task}_{digests.of_text(data)[:8]}"
    file = folder.absolute() / f"{name}.yaml"
    entry = manager.task_index[wanted.task]
    task = {"include": str(entry.yaml_path), "task": f"dnd_{name}"}
    task |= {"dataset_path": data, "dataset_name": None}
    how = (entry.cfg or {}).get("dataset_kwargs") or {}
    write_json(file, task | {"dataset_kwargs": how | {"cache_dir": cache_of(data)}})
    return str(file)


def _load_task(manager, wanted: Wanted, spec: str) -> object:
    try:
        task = next(iter(manager.load([spec])["tasks"].values()))
    except ModuleNotFoundError as error:  # of the task's own code
        raise InputError(
            f"{wanted.title}: it needs {error.name}; {packages.how_to_install([str(error.name)])}"
        ) from None
    # datasets, its readers, the hub client and the tasks' own code all raise their own
    except Exception as error:
        raise InputError(
            f"{wanted.title}: its data cannot be had ({first_line(error)}); give a folder: "
            f"{wanted.dataset}:{wanted.task}@FOLDER"
        ) from None
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task
