"""`dnd export-gguf`: the file, read back by llama.cpp's own package, says what PEFT does to the
base. tests/lora/test_llama_cpp.py has llama.cpp itself do it."""

import json
import os
import pathlib

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

from gguf_files import gguf_name, model_of, permuted, write_gguf  # noqa: E402
from lora_sets import PATTERNS, random_lora  # noqa: E402

from dnd_jax.base.gguf import header  # noqa: E402
from dnd_jax.core import files  # noqa: E402
from dnd_jax.main import main  # noqa: E402

HEAD = {"llama": 16, "qwen2": 16, "qwen3": 128, "mistral": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(files.CACHE, str(tmp_path / "cache"))


def made(root: pathlib.Path, kind: str = "llama", **settings) -> tuple[pathlib.Path, pathlib.Path]:
    """(the folder of a base, one of an adapter that names it)."""
    model_of(kind).save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    return root / "base", random_lora(base, root / "adapter", **settings)


def exported(adapter: pathlib.Path, *words: str) -> pathlib.Path:
    out = adapter.parent / "lora.gguf"
    assert main(["export-gguf", str(adapter), f"--out={out}", *words]) == 0
    return out


def values(tensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def changes_of(file: pathlib.Path) -> dict[str, np.ndarray]:
    """{tensor: what llama.cpp adds to it}, by its rule."""
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    parts = {tensor.name: values(tensor) for tensor in reader.tensors}
    names = {name.rpartition(".")[0] for name in parts}
    found = {}
    for name in names:
        a, b = (parts.pop(f"{name}.lora_{side}") for side in "ab")
        found[name] = alpha / b.shape[1] * (b @ a)
    assert not parts
    return found


def changes_by_peft(base: pathlib.Path, adapter: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """The same by PEFT, under llama.cpp's names and in its order of rows."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            change = module.get_delta_weight("default").detach().numpy()
            turned = kind in ("llama", "mistral") and name.endswith(("q_proj", "k_proj"))
            found[f"{gguf_name(name)}.weight"] = (
                permuted(change, len(change) // HEAD[kind]) if turned else change
            )
    return found


@pytest.mark.parametrize("settings", [{}, PATTERNS], ids=["plain", "patterns"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_it_changes_the_base_as_peft_does(tmp_path, kind, settings):
    base, adapter = made(tmp_path, kind, **settings)
    file = exported(adapter)
    reader = gguf.GGUFReader(file)
    said = {
        key: reader.fields[key].contents()
        for key in ("general.architecture", "general.type", "adapter.type")
    }
    architecture = "llama" if kind == "mistral" else kind
    assert [*said.values()] == [architecture, "adapter", "lora"]
    found, expected = changes_of(file), changes_by_peft(base, adapter, kind)
    assert found.keys() == expected.keys() and len(found) == 14
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, rtol=1e-5, atol=1e-5)
    alphas = {tensor.data.shape[0] for tensor in reader.tensors if tensor.name.endswith("lora_a")}
    assert alphas == ({2, 3, 4} if settings else {2})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_as_the_base_makes_the_same(tmp_path, kind):
    _, adapter = made(tmp_path, kind)
    first = exported(adapter).read_bytes()
    model = write_gguf(tmp_path / "base.gguf", kind)
    (tmp_path / "lora.gguf").unlink()
    assert exported(adapter, f"--base={model}").read_bytes() == first
    assert not (tmp_path / "cache").exists(), "no weights are read"


@pytest.mark.parametrize(("dtype", "off"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_as_large(tmp_path, dtype, off):
    _, adapter = made(tmp_path)
    whole = exported(adapter)
    full, size = changes_of(whole), whole.stat().st_size
    whole.unlink()
    half = exported(adapter, f"--dtype={dtype}")
    assert half.stat().st_size < 0.7 * size
    for name, change in changes_of(half).items():
        assert 0 < np.abs(change - full[name]).max() < off * np.abs(full[name]).max()


def test_what_is_said_of_the_base(tmp_path):
    """A hub id, and no path of this machine."""
    base, adapter = made(tmp_path)
    assert str(tmp_path).encode() not in exported(adapter).read_bytes()
    settings = adapter / "adapter_config.json"
    raw = json.loads(settings.read_text())
    settings.write_text(json.dumps(raw | {"base_model_name_or_path": "org/Tiny"}))
    (tmp_path / "lora.gguf").unlink()
    file = gguf.GGUFReader(exported(adapter, f"--base={base}"))
    assert file.fields["general.base_model.0.repo_url"].contents().endswith("co/org/Tiny")


# --- What is refused
# --------------------------------------------------------------------------------------------------


def refused(capsys, adapter: pathlib.Path, *words: str) -> str:
    """The one line of a refusal that leaves nothing behind."""
    out, before = adapter.parent / "lora.gguf", sorted(os.listdir(adapter.parent))
    capsys.readouterr()
    assert main(["export-gguf", str(adapter), f"--out={out}", *words]) == 2
    assert sorted(os.listdir(adapter.parent)) == before
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "a LoRA of an embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "a whole weight"),
    ],
)
def test_what_llama_cpp_has_no_place_for(tmp_path, capsys, settings, says):
    _, adapter = made(tmp_path, **settings)
    line = refused(capsys, adapter)
    assert says in line and str(adapter) in line


def test_a_head(tmp_path, capsys):
    """llama.cpp knows one of bases whose head is not tied; PEFT saves it with the whole head."""
    _, adapter = made(tmp_path, target_modules=["q_proj", "lm_head"])
    file = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "base_layer" not in k}, file)
    assert "layers alone: lm_head is no module of" in refused(capsys, adapter)


def test_a_base_of_other_sizes(tmp_path, capsys):
    _, adapter = made(tmp_path)
    other = write_gguf(tmp_path / "x.gguf", model=model_of("llama", num_hidden_layers=1))
    line = refused(capsys, adapter, f"--base={other}")
    assert "model.layers.1.mlp.down_proj is no module of" in line and "x.gguf" in line
    other = write_gguf(tmp_path / "y.gguf", model=model_of("llama", intermediate_size=64))
    assert "has shape (2, 96), the base's would be (2, 64)" in refused(
        capsys, adapter, f"--base={other}"
    )


def test_a_base_that_is_not_known(tmp_path, capsys):
    base, adapter = made(tmp_path)
    file = base / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"model_type": "gemma2"}))
    line = refused(capsys, adapter)
    assert "model_type 'gemma2' is not supported" in line and "--base=FILE.gguf" in line
    for heads in (3, 64, 128):
        keys = {"llama.attention.head_count": ("uint32", heads)}
        other = write_gguf(tmp_path / "x.gguf", keys=keys)
        assert "llama.attention.head_count" in refused(capsys, adapter, f"--base={other}")
    assert "no such" in refused(capsys, adapter, f"--base={tmp_path / 'none.gguf'}").lower()
    settings = adapter / "adapter_config.json"
    raw = json.loads(settings.read_text())
    settings.write_text(json.dumps(raw | {"base_model_name_or_path": ""}))
    assert "names no base" in refused(capsys, adapter)


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (np.nan, "float32", "blk.0.attn_q.weight.lora_a would hold NaN or Inf in float32"),
        (1e6, "float16", "NaN or Inf in float16; take --dtype=float32"),
    ],
)
def test_numbers_without_room(tmp_path, capsys, value, dtype, says):
    _, adapter = made(tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key][0, 0] = value
    save_file(tensors, file, {"format": "pt"})
    assert says in refused(capsys, adapter, f"--dtype={dtype}")


def test_an_alpha_that_llama_cpp_would_take_for_none(tmp_path, capsys):
    _, adapter = made(tmp_path, lora_alpha=1e-60)
    assert "alpha 1e-60 has no room in float32" in refused(capsys, adapter)


def test_words_that_cannot_be(tmp_path, capsys):
    _, adapter = made(tmp_path)
    assert "--dtype=int8: none of float32, float16, bfloat16" in refused(
        capsys, adapter, "--dtype=int8"
    )
    assert main(["export-gguf", str(adapter)]) == 2
    assert "--out is needed" in capsys.readouterr().err
    (tmp_path / "lora.gguf").write_text("mine")
    assert "exists already" in refused(capsys, adapter)
    assert (tmp_path / "lora.gguf").read_text() == "mine"


def test_a_file_that_reads_back_otherwise_is_refused(tmp_path, capsys, monkeypatch):
    _, adapter = made(tmp_path)
    write = gguf.GGUFWriter.write_tensors_to_file

    def flipped(self, *given, **more):
        write(self, *given, **more)
        for file in self.fout:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", flipped)
    assert "what was read back differs" in refused(capsys, adapter)


def test_it_is_no_base(tmp_path):
    """The other way round the file is refused, as an adapter."""
    _, adapter = made(tmp_path)
    with pytest.raises(Exception, match="a LoRA adapter, no language model"):
        header.Gguf(exported(adapter))
