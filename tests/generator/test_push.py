"""Generators that travel: pushed to a hub with a card, found there by name, or in a package."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import yaml
from hub_server import running_hub, sent_files
from pipeline import ROOT, tiny_generator

from dnd_jax.generator.folder import FILES, find_generator
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.main import main

PROMPTS = [f"where is town {i} ?" for i in range(4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A generator whose adapters name a base of the hub."""
    root = tiny_generator(tmp_path_factory.mktemp("run"))
    file = root / "generator/generator.json"
    raw = json.loads(file.read_text())
    raw["adapter"]["base"] = "some/base"
    file.write_text(json.dumps(raw))
    return root


def test_it_is_pushed_with_a_card_and_nothing_else(run, tmp_path):
    with running_hub(tmp_path) as (server, environment):
        done = subprocess.run(
            [sys.executable, "-m", "dnd_jax", "push-generator", run, "--to=me/mine"],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0 and "pushed: " in done.stdout, done.stderr
    sent = sent_files(server)
    assert sent.keys() == {*FILES, "README.md"}
    assert all(sent[name] == (run / "generator" / name).read_bytes() for name in FILES)
    text = sent["README.md"].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "some/base" and "drag-and-drop-llms" in front["tags"]
    assert "takes 4 prompts" in text and "trained on 3 tasks: " in text and str(run) not in text
    assert "--generator=me/mine" in text
    asked = json.loads(next(body for path, body in server.got if path == "/api/repos/create"))
    assert (asked.get("visibility") or asked.get("private")) in ("private", True)


def test_one_of_a_base_or_encoder_that_nobody_has_is_refused(run, tmp_path, capsys):
    for section, key, says in (
        ("adapter", "base", "its base is '/some/where'"),
        ("condition", "encoder", "its encoder is '/some/where'"),
    ):
        folder = tmp_path / section
        folder.mkdir()
        for name in FILES:
            (folder / name).write_bytes((run / "generator" / name).read_bytes())
        raw = json.loads((folder / "generator.json").read_text())
        (raw if section == "adapter" else raw["settings"])[section][key] = "/some/where"
        (folder / "generator.json").write_text(json.dumps(raw))
        assert main(["push-generator", str(folder), "--to=me/mine"]) == 2
        assert says in capsys.readouterr().err
        assert not folder.with_name(f"{folder.name}_on_hub").exists()
    assert main(["push-generator", str(run), "--to=mine"]) == 2
    assert "--to=mine: expected USER/NAME" in capsys.readouterr().err
    assert main(["push-generator", str(run)]) == 2
    assert "--to is needed" in capsys.readouterr().err


def alike(one, other) -> bool:
    return all(np.array_equal(value, other[key]) for key, value in one.items())


def test_it_is_found_on_the_hub_by_name(run, tmp_path, monkeypatch, capsys):
    """In the hub's cache, as the client keeps what it has fetched."""
    commit = "0" * 40
    snapshot = tmp_path / "models--me--mine/snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in FILES:
        (snapshot / name).write_bytes((run / "generator" / name).read_bytes())
    (tmp_path / "models--me--mine/refs").mkdir()
    (tmp_path / "models--me--mine/refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_generator("me/mine") == snapshot
    expected = TrainedGenerator(run).tensors(PROMPTS)
    assert alike(expected, TrainedGenerator("me/mine").tensors(PROMPTS))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'out'}"
    assert main(["generate", "--generator=me/mine", *words]) == 0
    assert main(["generate", "--generator=me/another", *words]) == 2
    assert "me/another: neither a folder here nor reachable" in capsys.readouterr().err


def test_it_is_found_in_a_package(run, tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in FILES:
        (package / "model" / name).write_bytes((run / "generator" / name).read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_generator("package:some_package/model")
    assert found == pathlib.Path(package, "model")
