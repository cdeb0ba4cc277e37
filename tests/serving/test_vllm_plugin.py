"""vLLM's plug-in beside a real `dnd serve`: what it fetches and refuses, and that it imports
nothing but vLLM."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys

import pytest
from pipeline import ROOT
from serve import order

from dnd_jax.lora.adapter import load_adapter
from dnd_jax.serving.vllm_plugin import Fetcher, Refused, register

pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture
def url(service):
    return service[0]


def test_it_imports_neither_jax_nor_the_rest_of_the_package():
    script = (
        "import sys\n"
        "import dnd_jax.serving.vllm_plugin\n"
        "heavy = {'jax', 'numpy', 'flax', 'torch', 'transformers', 'fastapi', 'vllm'}\n"
        "print(sorted(heavy & sys.modules.keys()), "
        "sorted(m for m in sys.modules if m.startswith('dnd_jax')))"
    )
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == (
        "[] ['dnd_jax', 'dnd_jax.serving', 'dnd_jax.serving.vllm_plugin']"
    )


def test_an_adapter_is_fetched_whole(url, tmp_path):
    entry = order(url, "x", name="mine").json()
    fetcher = Fetcher(url, folder=tmp_path)
    folder = fetcher.fetch("mine", "the-base")
    assert folder == tmp_path / entry["id"] == fetcher.fetch(entry["id"], "the-base")
    one, other = load_adapter(folder), load_adapter(pathlib.Path(entry["path"]))
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert [path.name for path in tmp_path.iterdir()] == [entry["id"]]


def test_many_at_once(url, tmp_path):
    order(url, "many", name="many")
    fetcher = Fetcher(url, folder=tmp_path)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        folders = set(pool.map(lambda _: fetcher.fetch("many", "the-base"), range(32)))
    assert len(folders) == 1 and len([*tmp_path.iterdir()]) == 1


def test_what_is_refused(url, tmp_path):
    order(url, "x", name="x")
    fetcher = Fetcher(url, folder=tmp_path / "a")
    with pytest.raises(Refused, match="--base-name=another"):
        fetcher.fetch("x", "another")
    for key in ("none", "../up", "a/b", ""):
        with pytest.raises(Refused, match="404|no `dnd serve`"):
            fetcher.fetch(key, "the-base")
    with pytest.raises(Refused, match="does not answer"):
        Fetcher("http://127.0.0.1:9").fetch("x", "the-base")
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be kept"):
        Fetcher(url, folder=str(tmp_path / "file/x")).fetch("x", "the-base")


def test_without_a_server_it_does_nothing(monkeypatch):
    monkeypatch.delenv("DND_SERVER", raising=False)
    register()  # vLLM is not here


def test_it_is_an_entry_point_of_vllm():
    text = (ROOT / "setup.cfg").read_text()
    assert "vllm.general_plugins =\n    dnd_jax = dnd_jax.serving.vllm_plugin:register" in text
