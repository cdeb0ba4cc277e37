"""A real vLLM with a real LLM, and adapters of `dnd serve` by the plug-in: `make test-servers`,
which makes vLLM's environment .venv-vllm."""

import json
import pathlib
import shutil

import httpx
import pytest
from safetensors.numpy import load_file, save_file
from serve import order, serving
from vllm_server import FILE, MARKS, NAME, generator_for, vllm

from dnd_jax.base.hub import resolve
from dnd_jax.main import main

pytestmark = MARKS


@pytest.fixture(scope="module")
def base() -> pathlib.Path:
    """SmolLM2 as a Hugging Face folder."""
    return resolve(FILE)


@pytest.fixture(scope="module")
def servers(base, tmp_path_factory):
    """(URL of vLLM, URL of `dnd serve`, a folder)."""
    root = tmp_path_factory.mktemp("servers")
    _, run = generator_for(root / "run", base)
    with serving(run, root / "dnd") as (service, _):
        of_plugin = {"DND_SERVER": service, "DND_BASE": NAME, "DND_ADAPTERS": str(root / "fetched")}
        with vllm(base, root, environment=of_plugin) as url:
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
