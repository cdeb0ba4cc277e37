"""`dnd evaluate` by a real vLLM with a real LLM, against PyTorch: `make test-servers`, which makes
vLLM's environment .venv-vllm."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from engine_speed import ask, questions, random_adapters, same
from safetensors.numpy import load_file, save_file
from vllm_server import FILE, MARKS, NAME, generator_for, vllm

from dnd_jax.base.hub import resolve
from dnd_jax.base.served import Served
from dnd_jax.base.served_base import ServedBase
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.data.suite import load_suite
from dnd_jax.lora.served_adapters import served_adapters
from dnd_jax.scoring.answers import Scorer
from dnd_jax.scoring.evaluate import evaluate
from dnd_jax.scoring.results import unpack

pytestmark = MARKS
# Of all answers so many have to be the same, and each score within so much: two engines round
# differently, and vLLM from run to run.
LEAST_SAME, MOST_APART = 0.9, 0.05


@pytest.fixture(scope="module")
def base() -> pathlib.Path:
    """SmolLM2 as a Hugging Face folder."""
    return resolve(FILE)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """(config, workdir) of a generator."""
    config, run = generator_for(tmp_path_factory.mktemp("engine") / "run", base)
    return dataclasses.replace(config, base=dataclasses.replace(config.base, path=str(base))), run


@pytest.fixture(scope="module")
def url(base, tmp_path_factory):
    with vllm(base, tmp_path_factory.mktemp("vllm"), "--max-loras=3") as url:
        yield url


def test_answers_are_pytorchs(url, base, made, tmp_path, capsys):
    """Of four adapters at once, more than vLLM computes together; in words of many tokens."""
    folders = random_adapters(tmp_path, base, NAME, 4)
    asked = questions(tmp_path / "skills", 24)
    c = dataclasses.replace(made[0].evaluate, max_new_tokens=16, batch_size=16)
    in_torch = ask(base, c, folders, asked)
    served = ask(base, dataclasses.replace(c, engine=url, engine_adapters=4), folders, asked)
    alike, total = same(in_torch, served)
    tokenizer = TorchBase(base, 1, 1).tokenizer
    with capsys.disabled():
        print(f"\n{alike} of {total} answers of vLLM are PyTorch's")
        for folder, rows in in_torch.answers.items():
            for ours, theirs in zip(rows, served.answers[folder], strict=True):
                if ours != theirs:
                    print(f"  {tokenizer.decode(ours)!r}, by vLLM {tokenizer.decode(theirs)!r}")
    assert total == 96 and alike >= LEAST_SAME * total
    texts = {tokenizer.decode(rows[0]) for rows in served.answers.values()}
    assert len(texts) > 1  # each adapter by its own name
    scorer = Scorer([e.response for e in asked])
    for folder in folders:
        scores = [
            scorer.each(tokenizer.batch_decode(of.answers[folder])) for of in (in_torch, served)
        ]
        for measure in scores[0]:
            ours, theirs = (sum(each[measure]) / len(asked) for each in scores)
            assert abs(ours - theirs) <= MOST_APART


@pytest.mark.parametrize("answers", ["greedy", "likelihood"])
def test_scores_are_pytorchs(url, made, tmp_path, answers):
    config, run = made
    suite = load_suite(run / "suite", 4)
    results = []
    for engine in ("", url):
        workdir = shutil.copytree(run, tmp_path / f"w{len(results)}")
        asked = dataclasses.replace(config.evaluate, answers=answers, engine=engine)
        # The likeliest labels are asked one after the other, so of fewer adapters.
        few = {"samples": 1, "train_adapters": -1} if answers == "likelihood" else {}
        asked = dataclasses.replace(asked, engine_adapters=4, **few)
        controls = dataclasses.replace(config.controls, in_context=1)
        both = dataclasses.replace(config, evaluate=asked, controls=controls)
        results.append(evaluate(both, suite, config.base.path, workdir))
    in_torch, served = results
    assert served["engine"] == "vllm 0.32.0"
    assert not [name for name in Served(url).models() if name.startswith("dnd-")]
    for name, measures in in_torch["questions"].items():
        for measure, methods in measures.items():
            for method, packed in methods.items():
                ours, theirs = unpack(packed), unpack(served["questions"][name][measure][method])
                assert abs(sum(ours) - sum(theirs)) <= MOST_APART * len(ours), (name, method)


def test_names_that_fit_no_module_are_noticed(url, base, tmp_path):
    [right] = random_adapters(tmp_path, base, NAME, 1)
    wrong = shutil.copytree(right, tmp_path / "wrong")
    tensors = load_file(wrong / "adapter_model.safetensors")
    renamed = {
        k.replace("model.layers", "model.language_model.layers"): v for k, v in tensors.items()
    }
    save_file(renamed, wrong / "adapter_model.safetensors", {"format": "pt"})
    served = ServedBase(base, Served(url), 4, 4)
    with served_adapters(served, [right]) as names:
        assert set(names.values()) <= set(Served(url).models())
    with (
        pytest.raises(CheckFailed, match=r"the server ignores .*wrong"),
        served_adapters(served, [right, str(wrong)]),
    ):
        pass


def test_what_vllm_refuses_is_one_line(url, base, tmp_path):
    served = ServedBase(base, Served(url), 4, 4)
    absent = shutil.copytree(random_adapters(tmp_path, base, NAME, 1)[0], tmp_path / "high")
    settings = json.loads((absent / "adapter_config.json").read_text())
    (absent / "adapter_config.json").write_text(json.dumps(settings | {"r": 64}))
    with (
        pytest.raises(InputError, match=r"load_lora_adapter: .*rank.*--max-lora-rank") as refused,
        served_adapters(served, [str(absent)]),
    ):
        pass
    assert "\n" not in str(refused.value)
    long = [e._replace(prompt="bird " * 600) for e in questions(tmp_path / "skills", 1)]
    with pytest.raises(InputError, match=r"completions: 400, .*512"):
        served.answer_ids(long)
