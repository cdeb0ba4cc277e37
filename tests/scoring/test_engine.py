"""`dnd evaluate` by a server with OpenAI's interface around the real model: the same answers and
scores as PyTorch's, several adapters at once, and what is noticed and refused."""

import dataclasses
import json
import pathlib
import re
import shutil
import threading
import time

import pytest
from imported_run import imported_run, write_base
from openai_server import OpenaiServer
from pipeline import tiny_suite
from safetensors.numpy import load_file, save_file

from dnd_jax.base.served import Served
from dnd_jax.base.served_base import ServedBase
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.data.suite import labels_of, load_suite
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import load_adapter_config
from dnd_jax.lora.served_adapters import served_adapters
from dnd_jax.lora.verify_served import TEXTS
from dnd_jax.main import main
from dnd_jax.scoring.engine import each
from dnd_jax.scoring.evaluate import evaluate
from dnd_jax.scoring.lm_eval import lm_eval_stage

pytestmark = pytest.mark.xdist_group("engine")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return load_suite(tiny_suite(tmp_path_factory.mktemp("suite") / "towns"), 4)


@pytest.fixture(scope="module")
def made(suite, tmp_path_factory):
    """(config, its file, run folder)."""
    return imported_run(tmp_path_factory.mktemp("engine"), "qwen2", suite)


@pytest.fixture(scope="module")
def scored(made, suite, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    """(what PyTorch's scores are, their run folder); with two answered examples in the context."""
    config, _, run = made
    workdir = shutil.copytree(run, tmp_path_factory.mktemp("scored") / "w")
    return evaluate(with_engine(config), suite, config.base.path, workdir), workdir


def with_engine(config, url: str = "", at_once: int = 3, **changes):
    asked = dataclasses.replace(config.evaluate, engine=url, engine_adapters=at_once, **changes)
    controls = dataclasses.replace(config.controls, in_context=2)
    return dataclasses.replace(config, evaluate=asked, controls=controls)


@pytest.fixture
def without_scores(scored, tmp_path) -> pathlib.Path:
    """A copy of the run that has all adapters and no score."""
    workdir = shutil.copytree(scored[1], tmp_path / "w")
    (workdir / "evaluation.json").unlink()
    return workdir


def folders_of(run: pathlib.Path, suite) -> list[str]:
    return [str(run / "adapters" / dataset.name) for dataset in suite.unseen]


@pytest.mark.parametrize("answers", ["greedy", pytest.param("likelihood", marks=pytest.mark.slow)])
def test_scores_are_those_of_pytorch(made, scored, suite, without_scores, tmp_path, answers):
    config, workdir = made[0], without_scores
    server = OpenaiServer(config.base.path, {})
    expected = scored[0]
    if answers == "likelihood":
        by_torch = shutil.copytree(workdir, tmp_path / "by_torch")
        asked = with_engine(config, answers=answers)
        expected = evaluate(asked, suite, config.base.path, by_torch)
    with server.running() as url:
        asked = with_engine(config, url, answers=answers)
        found = evaluate(asked, suite, config.base.path, workdir)
        assert not server.adapters  # all are unloaded
    assert found.pop("engine") == "tests 1.2.3" and expected["engine"] == "PyTorch"
    assert found == {key: value for key, value in expected.items() if key != "engine"}
    assert "in_context" in found["unseen"][suite.unseen[0].name]
    # Log-probabilities are asked for one after the other.
    assert 1 < server.together <= 3 if answers == "greedy" else server.together == 1
    kept = json.loads((workdir / "evaluation.json").read_text())
    assert kept["engines"] == ["tests 1.2.3"] and url not in json.dumps(kept)


def test_answers_are_those_of_pytorch(made, scored, suite):
    """Token by token, of every adapter, some cut and some not; and the likeliest labels."""
    config = made[0]
    folders, base = folders_of(scored[1], suite), config.base.path
    questions, labels = suite.unseen[0].test, labels_of(suite.unseen[0])
    in_torch, lengths = TorchBase(base, 4, 6), set()
    with OpenaiServer(base, {}).running() as url:
        served = ServedBase(base, Served(url), 4, 6)
        assert served.positions == in_torch.positions == 128
        with served_adapters(served, folders) as names:
            served = served.knowing(names)
            for folder in (None, *folders):
                in_torch.use(folder)
                served.use(folder)
                theirs = in_torch.answer_ids(questions)
                assert served.answer_ids(questions) == theirs
                assert served.decode(theirs) == in_torch.decode(theirs)
                assert served.choose(questions, labels) == in_torch.choose(questions, labels)
                lengths |= {tuple(row) for row in theirs}
    assert len(lengths) > 3  # the adapters answer differently


def test_a_server_that_ignores_an_adapter(made, scored, suite, without_scores):
    config, workdir = made[0], without_scores
    server = OpenaiServer(config.base.path, {}, "ignores")
    with server.running() as url, pytest.raises(CheckFailed, match=r"the server ignores .*change"):
        evaluate(with_engine(config, url), suite, config.base.path, workdir)
    assert not server.adapters and not (workdir / "evaluation.json").is_file()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_names_that_fit_nothing_and_an_adapter_that_is_none(made, scored, suite, tmp_path):
    """PEFT only warns of the first, as vLLM does."""
    folder, base = folders_of(scored[1], suite)[0], made[0].base.path
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    tensors = load_file(wrong / "adapter_model.safetensors")
    renamed = {key.replace("layers", "stages"): value for key, value in tensors.items()}
    save_file(renamed, wrong / "adapter_model.safetensors", {"format": "pt"})
    none = save_adapter(
        tmp_path / "none",
        {k.removeprefix("base_model.model."): 0 * v for k, v in tensors.items()},
        load_adapter_config(folder),
    )
    with OpenaiServer(base, {}).running() as url:
        served = ServedBase(base, Served(url), 4, 4)
        with served_adapters(served, [str(none), folder]) as names:
            assert len(set(names.values())) == 2
        with (
            pytest.raises(CheckFailed, match=r"ignores .*wrong"),
            served_adapters(served, [folder, str(wrong)]),
        ):
            pass


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("static", r"load_lora_adapter: 404, .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ("ids", r"must know `return_token_ids`"),
        ("early", r"ended an answer after 1 of 3 tokens"),
        ("begins", r"read \d+ tokens, not the \d+ it was sent"),
        ("echo", r"`echo` and `logprobs`"),
        ("nonsense", r"OpenAI's interface"),
        ("500", r"500, it is broken"),
    ],
)
def test_a_server_that_cannot_score(made, suite, without_scores, fault, says, capsys):
    _, file, _ = made
    server = OpenaiServer(made[0].base.path, {}, fault)
    with server.running() as url:
        words = f"--config={file}", f"--workdir={without_scores}", f"--config.evaluate.engine={url}"
        assert main(["evaluate", *words]) == 2
        line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dnd: ")]
        assert len(line) == 1 and re.search(says, line[0]) and url in line[0], line
    assert not server.adapters and not (without_scores / "evaluation.json").is_file()


def test_another_base(made, suite, tmp_path, scored):
    base = made[0].base.path
    other = write_base(tmp_path / "other", "gemma", suite)
    with OpenaiServer(other, {}).running() as url:
        says = rf"serves 'the-base' from '{other}', which is not known to be {base}; start"
        with pytest.raises(InputError, match=says):
            ServedBase(base, Served(url), 4, 4)
    same = shutil.copytree(base, tmp_path / "same")  # other files with the same contents
    with OpenaiServer(same, {}).running() as url:
        assert ServedBase(base, Served(url), 4, 4).served_base == "the-base"
    other = r"has another tokenizer than"
    with OpenaiServer(base, {}, "reads").running() as url, pytest.raises(CheckFailed, match=other):
        ServedBase(base, Served(url), 4, 4)


def test_a_stopped_scoring_goes_on(made, scored, suite, without_scores):
    """With what had finished, none of which is asked again; whatever lies on the server."""
    config, path = made[0], without_scores / "evaluation.json"
    whole = OpenaiServer(config.base.path, {})
    with whole.running() as url:
        before = len(json.loads((scored[1] / "evaluation.json").read_text())["scores"])
        adapters = before - 1 - len(suite.unseen)  # the base, and with examples in its context
        of_proof = 1 + len(TEXTS) * (2 + adapters)
        broken = OpenaiServer(config.base.path, {}, at_most=of_proof + 6)
        with broken.running() as other, pytest.raises(InputError, match="500, it is broken"):
            evaluate(with_engine(config, other), suite, config.base.path, without_scores)
        done = json.loads(path.read_text())["scores"]
        assert 0 < len(done) < before
        left = whole.adapters.setdefault
        left("unrelated", "nowhere")
        found = evaluate(with_engine(config, url), suite, config.base.path, without_scores)
    expected = scored[0]["questions"]
    assert found["questions"] == expected
    assert set(whole.adapters) == {"unrelated"}


def test_adapters_that_lie_on_the_server(made, scored, suite, tmp_path):
    """Of a run that was killed, from the same folder and from one that is another now."""
    folder, base = folders_of(scored[1], suite)[0], made[0].base.path
    copy = str(shutil.copytree(folder, tmp_path / "copy"))
    server = OpenaiServer(base, {})
    with server.running() as url:
        served = ServedBase(base, Served(url), 4, 4)
        with served_adapters(served, [folder]) as names:
            [name] = names.values()
        for there in (folder, copy):
            server._load(name, there)
            with served_adapters(served, [folder]) as names:
                assert server.adapters == {name: folder}
            assert not server.adapters
        with served_adapters(served, [folder, copy]) as names:
            assert names[folder] == names[copy]


def test_engines_do_not_mix(made, scored, suite, tmp_path, capsys):
    config, workdir = made[0], shutil.copytree(scored[1], tmp_path / "w")
    with OpenaiServer(config.base.path, {}).running() as url:
        asked = with_engine(config, url)
        with pytest.raises(InputError, match=r"--allow=evaluate.engine .*'' -> 'a server'"):
            evaluate(asked, suite, config.base.path, workdir)
        found = evaluate(asked, suite, config.base.path, workdir, ["evaluate.engine"])
        assert found["engine"] == "tests 1.2.3"
        assert "all is scored anew" in capsys.readouterr().out
    # Scored, it asks no server, and the next may listen elsewhere.
    elsewhere = with_engine(config, "http://127.0.0.1:9", at_once=1)
    assert evaluate(elsewhere, suite, config.base.path, workdir) == found


def test_the_record_says_what_scored(made, suite, without_scores, tmp_path, capsys):
    """A token is asked for; agreement with PyTorch is not measured."""
    _, file, _ = made
    (tmp_path / "token").write_text("secret\n")
    with OpenaiServer(made[0].base.path, {}, token="secret").running() as url:
        words = [f"--config={file}", f"--workdir={without_scores}"]
        words += [f"--config.evaluate.engine={url}/v1", "--config.evaluate.overhead=False"]
        assert main(["evaluate", *words]) == 2
        assert "401, Unauthorized" in capsys.readouterr().err
        words += [f"--config.evaluate.engine_token_file={tmp_path / 'token'}"]
        assert main(["evaluate", *words]) == 0
    said = capsys.readouterr().out
    assert "Scored by tests 1.2.3." in said and "because a server scored" in said
    results = json.loads((without_scores / "results.json").read_text())
    assert results["engine"] == "tests 1.2.3" and "secret" not in json.dumps(results)
    assert "Scored by tests 1.2.3." in (without_scores / "report.html").read_text()


@pytest.mark.parametrize("url", ["nowhere", "http://", "ftp://x", "http://a b"])
def test_an_engine_that_is_no_url(made, tmp_path, capsys, url):
    words = f"--config={made[1]}", f"--workdir={tmp_path}", f"--config.evaluate.engine={url}"
    assert main(["evaluate", *words]) == 2
    assert "is no URL of a server" in capsys.readouterr().err


def test_the_harness_scores_in_pytorch(made, suite, tmp_path):
    with pytest.raises(InputError, match="scores in PyTorch; leave it out"):
        lm_eval_stage(
            with_engine(made[0], "http://127.0.0.1:9"), suite, made[0].base.path, tmp_path, ["x"]
        )


def test_each_goes_on_until_one_fails():
    """By one in order, by several as they finish; what has begun is not lost."""
    order, begun = [], threading.Barrier(2)

    def work(base, job):
        order.append(job)
        if base:
            begun.wait(5)
        if job == 1:
            raise InputError("one")
        time.sleep(0.2 * bool(base))
        return job

    assert list(each([0], [0, 2, 3], work)) == order == [0, 2, 3]
    order.clear()
    found = each([1, 2], range(8), work)
    assert next(found) == 0
    with pytest.raises(InputError, match="one"):
        next(found)
    assert sorted(order) == [0, 1]
