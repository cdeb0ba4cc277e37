"""A base is its files, under any spelling of its path; its name is one that holds elsewhere."""

import dataclasses
import json
import os
import pathlib
import shutil

import huggingface_hub
import pytest

from dnd_jax.base.hub import keep_revision, kept_revision, resolve, revision_of
from dnd_jax.base.identity import base_digest, base_name, means_base, one_name
from dnd_jax.core.errors import InputError
from dnd_jax.generator.generate import base_to_merge
from dnd_jax.generator.trained import TrainedGenerator

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "cfc09d1" / "run" / "base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "base")


def test_contents_decide(base, tmp_path, monkeypatch):
    before = base_digest(base)
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(base, tmp_path / "copy")
    assert {base_digest(path) for path in ("base", "link", "./copy", copy)} == {before}
    (copy / "README.md").write_text("a card")
    (copy / "optimizer.safetensors").write_bytes(b"no weights of the model")
    assert base_digest(copy) == before
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    before = base_digest(base)
    names = ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
    for i, name in enumerate([*names, "additional_chat_templates/default.jinja"]):
        other = shutil.copytree(base, tmp_path / f"other_{i}")
        (other / name).write_bytes((other / name).read_bytes() + b"\n")
        assert base_digest(other) != before, name


def test_shards_under_any_name(base):
    """Weights are what the index names, as the base is loaded."""
    shard = (base / "model.safetensors").rename(base / "model_00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": shard.name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    before = base_digest(base)
    shard.write_bytes(shard.read_bytes() + b"other")
    assert base_digest(base) != before


def test_names_hold_elsewhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("base")
    assert base_name("base") == base_name("./link") == str(base)
    assert base_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert base_name("") == ""
    cached = tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    assert base_name(cached) == "Qwen/Qwen2.5-0.5B"
    assert revision_of(cached) == COMMIT
    assert revision_of(base) == ""


def test_several_names_of_one_base(base, capsys):
    spelled = ["Qwen/Qwen2.5-0.5B", "unsloth/Qwen2.5-0.5B-bnb-4bit"]
    both = r"'Qwen/\S+' in \S+, 'unsloth/\S+' in .*--config.base.path="
    with pytest.raises(InputError, match=both):
        one_name(dict.fromkeys(spelled, base), None)
    assert one_name({spelled[0]: base}, None) == spelled[0]
    assert one_name(dict.fromkeys(spelled, base), "Qwen/Qwen2.5-0.5B") == spelled[0]
    assert "note: the LoRA checkpoints' base is Qwen/Qwen2.5-0.5B; " in capsys.readouterr().out
    assert one_name({os.path.relpath(base): base}, base) == str(base)  # one folder, two spellings
    # LoRAs that name no base say nothing, wherever they are read.
    assert one_name({"": base, spelled[0]: base}, None) == spelled[0]
    assert one_name({"": base}, None) == ""
    assert one_name({"": base}, spelled[0]) == spelled[0]
    assert not capsys.readouterr().out


def test_records_that_name_a_path(base, tmp_path):
    assert means_base(str(base), base)
    assert means_base(os.path.relpath(base), base)
    assert means_base("runs/gone/base", base)  # pretrained in a workdir that has moved
    assert not means_base("runs/gone/other", base)
    (base / "pretrain.json").unlink()
    assert not means_base("runs/gone/base", base)
    assert not means_base(None, base)


def test_generation_takes_the_commits_of_the_training(tmp_path, monkeypatch):
    """An encoder's is one of its own name; a base's stands in the workdir."""
    asked = []

    def prompt_encoder(condition, mesh, revision):
        asked.append((condition.encoder, revision))
        raise InterruptedError

    monkeypatch.setattr("dnd_jax.generator.trained.PromptEncoder", prompt_encoder)
    for name in ("", "moved/elsewhere"):
        generator = TrainedGenerator(GOLDEN.parent / "generator", encoder=name)
        known = dataclasses.replace(generator._description, encoder_revision=COMMIT)
        monkeypatch.setattr(generator, "_description", known)
        with pytest.raises(InterruptedError):
            _ = generator.encoder
    assert asked == [(known.condition.encoder, COMMIT), ("moved/elsewhere", "")]

    def snapshot_download(name, revision=None, **_):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    keep_revision("a/b", COMMIT, tmp_path)
    for name in ("a/b", "c/d"):
        base_to_merge(name, tmp_path / "generator")
    assert asked[2:] == [("a/b", COMMIT), ("c/d", None)]


def test_the_commit_that_was_taken_is_asked_for_again(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, revision=None, **_):
        asked.append((name, revision))
        folder = tmp_path / "models--a--b" / "snapshots" / (revision or COMMIT)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve("a/b", revision=kept_revision("a/b", tmp_path))
    keep_revision("a/b", revision_of(found), tmp_path)
    keep_revision("a/b", "f" * 40, tmp_path)  # the first one stays
    assert resolve("a/b", revision=kept_revision("a/b", tmp_path)) == found
    assert asked == [("a/b", None), ("a/b", COMMIT)]
    keep_revision(str(tmp_path), COMMIT, tmp_path)
    assert kept_revision(str(tmp_path), tmp_path) == ""  # a folder has none
