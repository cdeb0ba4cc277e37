"""A base is its files, under any spelling of its path; its name is one that holds elsewhere."""

import os
import pathlib
import shutil

import huggingface_hub
import pytest

from dnd_jax.base.hub import keep_revision, kept_revision, resolve, revision_of
from dnd_jax.base.identity import base_digest, base_name, means_base, one_name
from dnd_jax.core.errors import InputError

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
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        other = shutil.copytree(base, tmp_path / f"other_{name}")
        (other / name).write_bytes((other / name).read_bytes() + b"\n")
        assert base_digest(other) != before, name


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
    with pytest.raises(InputError, match=r"'Qwen/\S+', 'unsloth/\S+'\); .*--config.base.path="):
        one_name(spelled, None)
    assert one_name(spelled[:1], None) == spelled[0]
    assert one_name(spelled, "Qwen/Qwen2.5-0.5B") == spelled[0]
    assert "note: the LoRA checkpoints' base is Qwen/Qwen2.5-0.5B; " in capsys.readouterr().out
    assert one_name([os.path.relpath(base)], base) == str(base)  # one folder, two spellings
    # LoRAs that name no base say nothing, wherever they are read.
    assert one_name(["", spelled[0]], None) == spelled[0] and one_name([""], None) == ""
    assert one_name([""], spelled[0]) == spelled[0]
    assert not capsys.readouterr().out


def test_records_that_name_a_path(base, tmp_path):
    assert means_base(str(base), base)
    assert means_base(os.path.relpath(base), base)
    assert means_base("runs/gone/base", base)  # pretrained in a workdir that has moved
    assert not means_base("runs/gone/other", base)
    (base / "pretrain.json").unlink()
    assert not means_base("runs/gone/base", base)
    assert not means_base(None, base)


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
