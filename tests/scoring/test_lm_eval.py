"""EleutherAI's lm-evaluation-harness on a small random Qwen2 with PEFT adapters, question by
question against our own scorer."""

import os
import pathlib
import shutil
import types

import datasets
import numpy as np
import pytest
import torch
from small_models import random_qwen2

from dnd_jax.base.chat import render
from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, Suite, labels_of
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.scoring.answers import Scorer
from dnd_jax.scoring.candidates import Candidates
from dnd_jax.scoring.engine import answers_to
from dnd_jax.scoring.lm_eval import answer_of, sample_scores, score, score_all
from dnd_jax.scoring.lm_eval_tasks import Wanted, load_tasks, parse_tasks, write_task

QUESTIONS = [
    f"what is {'really ' * (i % 3)}number {i} of {'iron' if i % 2 else 'wood'} ?" for i in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TorchBase:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer([*QUESTIONS, "[A] [B] [C] answer : Question choose"], 400)
    random_qwen2(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TorchBase(folder, batch_size=4, max_new_tokens=5)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> list[pathlib.Path | None]:
    """No adapter and two that change the answers."""
    rng = np.random.default_rng(0)
    shapes = load_base_config(base.base).lora_shapes(2, ("q_proj", "down_proj"))
    folders = []
    for i in range(2):
        tensors = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        folder = tmp_path_factory.mktemp("adapters") / f"a{i}"
        folders.append(
            save_adapter(
                folder, tensors, AdapterConfig(str(base.base), 2, 2.0, ("q_proj", "down_proj"))
            )
        )
    return [None, *folders]


def configured(answers: str):
    config = load_file("tests/tiny.py")
    config.evaluate.update(answers=answers, batch_size=4, max_new_tokens=5)
    return freeze(config)


def dataset_of(base, adapters, answers: str) -> Dataset:
    """Each adapter answers some of its questions right: the answers are what one of them says, or
    labels."""
    examples = [Example(q, "x", "be brief" if i % 4 else "") for i, q in enumerate(QUESTIONS)]
    if answers == "likelihood":
        rows = [
            Example(e.prompt, ["[A]", "[B]", "[C]"][i % 3], e.system)
            for i, e in enumerate(examples)
        ]
        return Dataset("mine", tuple(rows), tuple(rows))
    said = []
    for adapter in adapters:
        base.use(adapter)
        said.append(base.decode(base.answer_ids(examples)))
    rows = [
        Example(e.prompt, said[i % 3][i].strip() or "nothing", e.system)
        for i, e in enumerate(examples)
    ]
    return Dataset("mine", tuple(rows), tuple(rows))


@pytest.mark.parametrize("answers", ["greedy", "likelihood"])
def test_the_suites_questions_score_as_in_our_own_scorer(base, adapters, tmp_path, answers):
    config = configured(answers)
    dataset = dataset_of(base, adapters, answers)
    write_task(tmp_path, dataset, base.tokenizer, base.ends, config)
    tasks = load_tasks([Wanted("mine", "")], tmp_path, unsafe_code=False)
    scorer, every = Scorer([e.response for e in dataset.test]), []
    for adapter in adapters:
        base.use(adapter)
        metric, theirs = score(base, tasks, {"mine"}, 4, 0, False)["mine"]
        ours = scorer.each(answers_to(base, [dataset], answers)["mine"].texts)["exact"]
        assert metric == {"greedy": "exact_match", "likelihood": "acc"}[answers]
        assert theirs == ours
        every.append(ours)
    # The adapters differ, and are seen to.
    assert 0 < np.mean(every) < 1 and len(set(map(tuple, every))) == 3
    base.use(adapters[1])
    assert score(base, tasks, {"mine"}, 4, 5, False)["mine"][1] == every[1][:5]  # --limit


SAME = ("( oslo 3 )", "2024-01-02", "caf\u00e9 .", "it is\nso !", "[A]", "yes", "1.5", "None")
SAID = ("(oslo 3)", " 2024 - 01-02", "cafe\u0301.", "it  is so!", "[ A ]", "no", "15", "none")


@pytest.mark.parametrize("answers", ["greedy", "likelihood"])
def test_both_scorers_have_one_notion_of_the_same_answer(base, tmp_path, answers):
    """Inner spaces, line breaks, composed letters, texts that look like dates: in the harness's own
    reading of the files that it is given."""
    folder = tmp_path / "w ?{a,b}[0-9]*"
    folder.mkdir()
    rows = tuple(Example(f"number {i}", text) for i, text in enumerate(SAME))
    write_task(folder, Dataset("d", rows, rows), base.tokenizer, base.ends, configured(answers))
    task = load_tasks([Wanted("d", "")], folder, unsafe_code=False)["d"]
    documents = list(task.test_docs())
    assert [task.doc_to_text(d) for d in documents] == [render(base.tokenizer, e[0]) for e in rows]
    if answers == "greedy":
        theirs = [
            task.process_results(d, [s])["exact_match"]
            for d, s in zip(documents, SAID, strict=True)
        ]
        assert theirs == Scorer(SAME).each(SAID)["exact"] == [1, 1, 1, 1, 1, 0, 0, 0]
    else:
        labels = labels_of(Dataset("d", rows, rows))
        chosen = [[(float(label == text), False) for label in labels] for text in SAME]
        theirs = [task.process_results(d, c)["acc"] for d, c in zip(documents, chosen, strict=True)]
        assert theirs == [1.0] * len(SAME)
        assert task.process_results(documents[0], chosen[1])["acc"] == 0.0


@pytest.mark.slow
def test_a_task_of_the_harness_on_local_data(base, adapters, tmp_path):
    """arc_easy as the harness defines it, its data from a folder; acc_norm computed by hand for the
    chat template."""
    rows = [
        {
            "question": q,
            "choices": {"text": ["iron", "wood number", "of"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i, q in enumerate(QUESTIONS)
    ]
    for split in ("train", "validation", "test"):
        (tmp_path / "arc").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "arc" / f"{split}.parquet")
    suite = Suite("s", tmp_path, (), (), (Dataset("mine", (), ()),), {"mine": "unseen"}, "")
    wanted = parse_tasks([f"mine:ARC-e@{tmp_path / 'arc'}"], suite)
    assert (
        wanted == [Wanted("mine", "arc_easy", str(tmp_path / "arc"))]
        and wanted[0].title == f"mine:arc_easy@{tmp_path / 'arc'}"
    )
    tasks = load_tasks(wanted, tmp_path, unsafe_code=False)
    for adapter in adapters[:2]:
        base.use(adapter)
        metric, theirs = score(base, tasks, set(), 4, 0, False)[wanted[0].title]
        expected = []
        for i, row in enumerate(rows):
            asked = render(base.tokenizer, f"Question: {row['question']}\nAnswer:")
            prompt = base.tokenizer(asked, add_special_tokens=False)["input_ids"]
            scores = []
            for text in row["choices"]["text"]:
                answer = base.tokenizer(text, add_special_tokens=False)["input_ids"]
                with torch.inference_mode():
                    logits = base.model(input_ids=torch.tensor([prompt + answer])).logits[
                        0, len(prompt) - 1 : -1
                    ]
                scores.append(
                    float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
                    / len(text)
                )
            expected.append(float(np.argmax(scores) == i % 3))
        assert metric == "acc_norm" and theirs == expected
    other = shutil.copytree(tmp_path / "arc", tmp_path / "other")
    both = load_tasks(
        [*wanted, Wanted("mine", "arc_easy", str(other))], tmp_path, unsafe_code=False
    )
    # Other data is another task.
    assert len({task.get_config("dataset_path") for task in both.values()}) == 2
    with pytest.raises(
        InputError,
        match="mine:openbookqa: its data cannot be had .*give a folder: mine:openbookqa@FOLDER",
    ):
        load_tasks([Wanted("mine", "openbookqa")], tmp_path, False)
    with pytest.raises(
        InputError, match="humaneval runs code that a model wrote; allow it here by --unsafe-code"
    ):
        load_tasks([Wanted("mine", "humaneval")], tmp_path, False)
    with pytest.raises(InputError, match="mmlu, arc_esy: no single task of lm_eval"):
        load_tasks([Wanted("mine", "mmlu"), Wanted("mine", "arc_esy")], tmp_path, False)


class Said:
    """What stands for a base that answers with these tokens."""

    def __init__(self, tokenizer, ends):
        self.tokenizer, self.ends = tokenizer, ends

    decode = TorchBase.decode


def test_special_tokens_are_part_of_an_answer():
    """A call of a tool begins with one; where an answer ends is known from its tokens."""
    tokenizer = build_tokenizer(["call the tool ?"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    ids = tokenizer("<call> the tool", add_special_tokens=False)["input_ids"]
    base = Said(tokenizer, (tokenizer.eos_token_id,))
    ended = [*ids, tokenizer.eos_token_id, ids[1]]
    assert base.decode([ids]) == [answer_of(base, True, ended)] == ["<call> the tool"]
    assert answer_of(base, False, ended).split() == ["the", "tool"]  # as the harness has it
    assert Scorer(["<call> the tool"]).each(base.decode([ids]))["exact"] == [1.0]


def test_scores_on_data_that_was_replaced_are_made_anew(tmp_path):
    """What is kept of a task with its own folder of data is of these contents."""
    data = tmp_path / "data"
    data.mkdir()
    suite = Suite("s", tmp_path, (), (), (Dataset("one", (), ()),), {"one": "unseen"}, "")
    wanted = parse_tasks(["one", f"one:arc_easy@{data}"], suite)
    titles, asked, scores = [w.title for w in wanted], [], {}
    candidates = Candidates({"one": {}}, {"t": "lora"}, {"one": ("t",)})
    keys = {"base": "b", "lora": "b"}

    def scored(tasks) -> dict:
        asked.append(list(tasks))
        return {title: ("acc", [1.0]) for title in tasks}

    def again() -> list[str]:
        asked.clear()
        base, path = types.SimpleNamespace(use=lambda folder: None), tmp_path / "scores.json"
        loaded = dict.fromkeys(titles)
        score_all(wanted, loaded, candidates, keys, base, scored, path, {}, scores)
        return sum(asked, [])

    for text, expected in (("1", titles), ("1", []), ("2", titles[1:]), ("2", [])):
        (data / "test.jsonl").write_text(text)
        os.utime(data / "test.jsonl", (1e9, 1e9))
        assert again() == expected
    assert scores["b"][titles[0]] == {"metric": "acc", "values": "1"}


def test_task_names(tmp_path):
    suite = Suite("s", tmp_path, (), (), tuple(Dataset(n, (), ()) for n in ("one", "two")), {}, "")
    assert [w.title for w in parse_tasks([], suite)] == ["one", "two"]
    parsed = parse_tasks(["two:GSM8K", "one:hellaswag", "one"], suite)
    assert parsed == [Wanted("two", "gsm8k"), Wanted("one", "hellaswag"), Wanted("one", "")]
    with pytest.raises(InputError) as error:
        parse_tasks(["three:GSM8K", f"one:arc_easy@{tmp_path / 'none'}"], suite)
    assert "'three' is none of the unseen datasets one, two" in str(
        error.value
    ) and "none is no folder" in str(error.value)


def test_values_question_by_question():
    """GSM8K reads answers in two ways: the strict one counts. Order is that of the questions, not
    of the log."""
    both = [
        {
            "doc_id": i,
            "filter": f,
            "metrics": ["exact_match"],
            "exact_match": float(f == "strict-match" and i == 1),
        }
        for f in ("flexible-extract", "strict-match")
        for i in (2, 1, 0)
    ]
    assert sample_scores("t", both) == ("exact_match", [0.0, 1.0, 0.0])
    code = [{"doc_id": 0, "filter": "create_test", "metrics": ["pass@1"], "pass@1": 1.0}]
    assert sample_scores("t", code) == ("pass@1", [1.0])
    with pytest.raises(
        InputError, match="t: no metric of it .word_perplexity. is a number a question"
    ):
        sample_scores(
            "t",
            [
                {
                    "doc_id": 0,
                    "filter": "none",
                    "metrics": ["word_perplexity"],
                    "word_perplexity": (1.0, 2),
                }
            ],
        )


def test_task_file_is_what_the_lm_eval_command_reads(base, tmp_path):
    from lm_eval.tasks._yaml_loader import load_yaml

    dataset = dataset_of(base, [None] * 3, "likelihood")
    path = write_task(tmp_path, dataset, base.tokenizer, base.ends, configured("likelihood"))
    task = load_yaml(path)
    assert task["task"] == "dnd_mine" and task["output_type"] == "multiple_choice"
    rows = datasets.Dataset.from_parquet(task["dataset_kwargs"]["data_files"]["test"]).to_list()
    assert rows[1]["text"] == render(base.tokenizer, QUESTIONS[1], "be brief")
    assert rows[1]["choices"] == [" [A]<end>", " [B]<end>", " [C]<end>"]
    assert rows[1]["labels"] == ["[A]", "[B]", "[C]"] and rows[1]["right"] == 1
