"""An input that was replaced under its name, with size and time as before, is another input in
every record: of bases, LoRAs, encoders, generators to start from, and suites."""

import dataclasses
import os
import pathlib
import time

import pytest
from pipeline import random_loras, tiny_suite
from small_models import condition_by, write_encoder, write_qwen

from dnd_jax.base.identity import base_digest
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core import digests, files
from dnd_jax.data.suite import load_suite
from dnd_jax.encoders.cache import identify
from dnd_jax.generator.folder import DESCRIPTION, MODEL
from dnd_jax.generator.record import settings_of
from dnd_jax.lora.adapter import fingerprint
from dnd_jax.lora.checkpoints import Checkpoints

CONFIG = freeze(load_file(str(pathlib.Path(__file__).parent / "tiny.py")))


@pytest.fixture(autouse=True)
def every_digest_is_kept(tmp_path, monkeypatch):
    """Small files too, however young: only what changes of a file makes it be read again."""
    monkeypatch.setenv(files.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "SETTLED", -(2**62))


def replace(path: pathlib.Path) -> None:
    """Another byte in the place of one, in place; `touch -r` hides it."""
    time.sleep(0.02)  # clocks of file systems tick in milliseconds
    before, raw = path.stat(), bytearray(path.read_bytes())
    at = next(i for i in range(len(raw) - 1, -1, -1) if chr(raw[i]).isalnum() or raw[i] > 127)
    raw[at] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_ino == before.st_ino


def check_each(names, folder: pathlib.Path, record) -> None:
    """Each of the files, replaced, makes another record; all are different."""
    seen = [record()]
    assert record() == seen[0]
    for name in names:
        replace(folder / name)
        seen.append(record())
    assert len(set(map(str, seen))) == len(seen), names


def test_a_base(tmp_path):
    base = write_qwen(tmp_path / "base", shard="4KB")
    shards = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(shards) > 1
    settings = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    (base / "chat_template.jinja").write_text("{{ messages }} a")
    found = [*settings, "chat_template.jinja", *shards]
    check_each(found, base, lambda: base_digest(base))


@pytest.fixture
def suite(tmp_path) -> pathlib.Path:
    return tiny_suite(tmp_path / "suite")


def test_loras(tmp_path, suite):
    root = random_loras(tmp_path / "loras", suite, CONFIG)
    train = dataclasses.replace(CONFIG.train, checkpoints=str(root))
    config = dataclasses.replace(CONFIG, train=train)
    found = Checkpoints(config, load_suite(suite, 3), tmp_path / "run")
    first = found.folders[min(found.folders)][0]
    check_each(["adapter_model.safetensors"], first, found.digest)
    settings = first / "adapter_config.json"
    before = found.digest(), fingerprint(first)
    settings.write_text(settings.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    after = found.digest(), fingerprint(first)
    check_each(["adapter_model.safetensors"], first, lambda: fingerprint(first))
    assert before[0] != after[0] and before[1] != after[1]


def test_an_encoder(tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    condition = condition_by(encoder)
    check_each(
        ["config.json", "model.safetensors", "tokenizer.json"], encoder, lambda: identify(condition)
    )


def test_a_generator_to_start_from(tmp_path, suite):
    start = tmp_path / "start"
    start.mkdir()
    (start / DESCRIPTION).write_text("{}")
    (start / MODEL).write_bytes(b"parameters")
    train = dataclasses.replace(CONFIG.train, init_from=str(start))
    config, opened = dataclasses.replace(CONFIG, train=train), load_suite(suite, 3)
    check_each([MODEL], start, lambda: settings_of(config, opened))


def test_a_suite(suite):
    """Its description, and the rows of each dataset and of the corpus."""
    rows = sorted(str(path.relative_to(suite)) for path in suite.rglob("*.jsonl"))
    assert len(rows) > 5
    seen = {load_suite(suite, 3).fingerprint}
    for name in rows:
        path = suite / name
        time.sleep(0.02)
        before, text = path.stat(), path.read_text()
        key = "response" if '"response"' in text else "prompt"
        head, _, tail = text.partition(f'"{key}": "')
        path.write_text(f'{head}"{key}": "{"x" if tail[0] != "x" else "y"}{tail[1:]}')
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        seen.add(load_suite(suite, 3).fingerprint)
    assert len(seen) == 1 + len(rows)
