"""What leaves the library: adapters, their cards, merged models, uploads, and the proof in numbers
that they work."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from hub_server import running_hub, sent_files
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import fill, write_encoder, write_qwen
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.hub import push
from dnd_jax.base.torch_base import load_torch_base
from dnd_jax.core.digests import of_texts
from dnd_jax.core.errors import InputError
from dnd_jax.costs.bench import torch_generator
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.lora.adapter import load_adapter, save_adapter, verify_adapter
from dnd_jax.lora.card import VLLM_RANKS, card
from dnd_jax.lora.layout import MODULE_ORDER
from dnd_jax.lora.merge import merge_adapter
from dnd_jax.lora.names import PEFT_PREFIX
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.main import main

PROMPTS = ["where is the bird ?", "who is six ?", "what is ten ?", "where is one ?"]
IDS = torch.tensor([[3, 5, 7, 9, 11, 4], [8, 8, 2, 1, 12, 6]])


def lora(
    base: pathlib.Path, rank: int = 2, seed: int = 0, size: float = 0.2
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = load_base_config(base).lora_shapes(rank, MODULE_ORDER)
    return {key: rng.normal(size=shape).astype(np.float32) * size for key, shape in shapes.items()}


def logits(model) -> np.ndarray:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float().numpy()


def with_peft(base: pathlib.Path, adapter: pathlib.Path, dtype=torch.float32) -> np.ndarray:
    return logits(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter
        ).eval()
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """base/ (bfloat16, in several files), generator/ (a released one of random weights, imported),
    prompts.txt."""
    root = tmp_path_factory.mktemp("made")
    write_qwen(root / "base", torch.bfloat16, shard="4KB")
    write_encoder(root / "encoder")
    torch.manual_seed(0)
    # The tokens of rank 2: 58 chunks of 8, as tests/generator/test_released.py counts them.
    torch.save(
        torch_generator.Generator([(4, 6, 8), (16, 6, 8), (58, 4, 10)], 3).state_dict(),
        root / "x.pth",
    )
    arguments = [
        f"--config.base.path={root / 'base'}",
        "--config.lora.rank=2",
        "--config.lora.alpha=4",
    ]
    arguments += [f"--config.condition.encoder={root / 'encoder'}", f"--out={root / 'generator'}"]
    assert main(["import-generator", str(root / "x.pth"), *arguments]) == 0
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def generate(made: pathlib.Path, *options: str) -> list[str]:
    return [
        "generate",
        f"--generator={made / 'generator'}",
        f"--prompts={made / 'prompts.txt'}",
        *map(str, options),
    ]


# --- Adapters and their cards
# --------------------------------------------------------------------------------------------------


def test_bfloat16_adapter_is_the_float32_one_rounded(made, tmp_path):
    assert main(generate(made, f"--out={tmp_path / 'f'}")) == 0
    assert main(generate(made, f"--out={tmp_path / 'b'}", "--dtype=bfloat16")) == 0
    full, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "fb")
    assert full.keys() == half.keys()
    for key, value in full.items():
        assert value.dtype == np.float32 and half[key].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(half[key], value.astype(ml_dtypes.bfloat16))
    base = tmp_path / "base32"
    write_qwen(base)
    plain, adapted = (
        logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)),
        with_peft(base, tmp_path / "f"),
    )
    change = np.abs(adapted - plain).max()
    assert np.abs(with_peft(base, tmp_path / "b") - adapted).max() < 0.05 * change


def test_what_is_read_back_is_compared_bit_for_bit(made, tmp_path):
    tensors = lora(made / "base")
    folder = save_adapter(
        tmp_path / "a", tensors, AdapterConfig("x/y", 2, 4.0, MODULE_ORDER), dtype="bfloat16"
    )
    verify_adapter(folder, tensors, "bfloat16")
    with pytest.raises(InputError, match="differs from what was written"):
        verify_adapter(folder, tensors, "float32")
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match="differs from what was written"):
        verify_adapter(folder, tensors, "bfloat16")


def test_fewer_prompts_are_repeated_for_a_generator_that_has_met_fewer(made, tmp_path, capsys):
    """Trained with train.few_prompts it takes 2 and 3 of its 4; another one refuses them."""
    shutil.copytree(made / "generator", tmp_path / "g")
    file = tmp_path / "g" / "generator.json"
    stored = json.loads(file.read_text())
    stored["settings"].setdefault("train", {})["few_prompts"] = 0.5
    file.write_text(json.dumps(stored))
    (tmp_path / "three.txt").write_text("\n".join(PROMPTS[:3]))
    again = np.sort([0, 1, 2, *np.random.default_rng(0).choice(3, 1)])
    (tmp_path / "four.txt").write_text("\n".join(PROMPTS[i] for i in again))
    (tmp_path / "one.txt").write_text(PROMPTS[0])

    def run(name: str, generator: pathlib.Path = tmp_path / "g") -> int:
        words = generate(made, f"--out={tmp_path / name}", f"--prompts={tmp_path / name}.txt")
        kept = [w for w in words if "prompts.txt" not in w and "--generator" not in w]
        return main([*kept, f"--generator={generator}"])

    assert run("four") == 0 and "note" not in capsys.readouterr().err
    assert run("three") == 0
    assert "three.txt: 3 prompts, repeated to 4" in capsys.readouterr().err
    three, four = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("three", "four"))
    for key, value in three.items():
        np.testing.assert_array_equal(value, four[key], err_msg=key)
    assert run("one") == 2
    assert "one.txt: 1 prompt(s), this generator takes 2 to 4; add 1" in capsys.readouterr().err
    assert run("three", made / "generator") == 2
    assert "3 prompt(s), this generator takes 4; add 1 more" in capsys.readouterr().err


def test_card_says_what_made_it(made, tmp_path):
    assert main(generate(made, f"--out={tmp_path / 'a'}", "--seed=7")) == 0
    generator, text = (
        TrainedGenerator(made / "generator"),
        (tmp_path / "a" / "README.md").read_text(),
    )
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "peft" and "lora" in front["tags"]
    assert "base_model" not in front, (
        "a local folder is no model of the hub, which would refuse the card"
    )
    assert f"base: `{made / 'base'}`" in text
    assert (
        f"generator: sha256 {generator.fingerprint[:16]}" in text
        and generator.config_hash[:16] in text
    )
    assert f"seed 7 (sha256 {of_texts(generator.draw(PROMPTS, 7))[:16]})" in text
    assert "rank 2, alpha 4 (scale 2)" in text and "PeftModel.from_pretrained" in text
    assert "--enable-lora --max-lora-rank 8 " in text, "the smallest of vLLM's ranks that holds 2"
    assert str(made / "generator") not in text, "paths of the machine stay there"


@pytest.mark.parametrize(
    "base",
    [
        "Qwen/Qwen2.5-0.5B-Instruct",
        "org/na.me_with-all",
        "/data/models/my model",
        'odd: "name" #1',
        "",
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_front_matter_is_yaml_for_any_base(base, merged):
    text = card(
        AdapterConfig(base, 600 if merged else 16, 32.0, ("q_proj",)),
        "0",
        "0" * 64,
        ["a", "b"],
        1,
        merged,
    )
    data = ModelCard(text).data.to_dict()
    assert data.get("base_model") == (base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None)
    assert data["library_name"] == ("transformers" if merged else "peft")
    assert "vllm serve" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_files_are_what_vllm_and_llama_cpp_expect(made, tmp_path):
    """The rules, as both read adapters:

    vLLM (vllm/lora/peft_helper.py, lora/utils.py parse_fine_tuned_lora_name, config/lora.py):
    adapter_config.json has an integer r, lora_alpha and target_modules; bias "none",
    modules_to_save null, no DoRA; the scale is lora_alpha / r, / sqrt(r) for rsLoRA; rank_pattern
    and alpha_pattern are not read. Names end in .lora_A.weight or .lora_B.weight after an optional
    "base_model.model."; the module's last part must be one that the model supports. r is at most
    --max-lora-rank, which is one of 1, 8, 16, 32, 64, 128, 256, 320, 512 (16 by default). Tensors
    are floating point; they are cast to the base's dtype.

    llama.cpp (convert_lora_to_gguf.py): adapter_model.safetensors beside adapter_config.json, of
    which only lora_alpha is read, so rsLoRA would be lost; every name is "base_model.model." + the
    base's tensor name with .lora_A.weight or .lora_B.weight in place of .weight; A is (r, n), B is
    (m, r), both are there; bfloat16, float16 or float32.
    """
    for dtype in ("float32", "bfloat16"):
        assert main(generate(made, f"--out={tmp_path / dtype}", f"--dtype={dtype}")) == 0
        settings = json.loads((tmp_path / dtype / "adapter_config.json").read_text())
        assert isinstance(settings["r"], int) and type(settings["lora_alpha"]) is int, (
            "vLLM declares both as int"
        )
        assert (
            settings["peft_type"] == "LORA"
            and settings["bias"] == "none"
            and settings["modules_to_save"] is None
        )
        assert (
            not settings["use_dora"]
            and not settings["use_rslora"]
            and not settings["fan_in_fan_out"]
        )
        assert not any(
            settings.get(key) for key in ("rank_pattern", "alpha_pattern", "layers_to_transform")
        )
        assert set(settings["target_modules"]) == set(MODULE_ORDER)
        assert any(settings["r"] <= rank for rank in VLLM_RANKS)
        base = {}
        for shard in (made / "base").glob("*.safetensors"):
            with safe_open(shard, framework="numpy") as file:
                keys = file.keys()
                base |= {key: file.get_slice(key).get_shape() for key in keys}
        with safe_open(tmp_path / dtype / "adapter_model.safetensors", framework="numpy") as file:
            names = set(file.keys())
            for name in names:
                match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
                assert match and match[1].split(".")[-1] in settings["target_modules"], name
                rows, columns = base[f"{match[1]}.weight"]
                part = file.get_slice(name)
                assert part.get_shape() == (
                    [settings["r"], columns] if match[2] == "A" else [rows, settings["r"]]
                )
                assert part.get_dtype() == {"float32": "F32", "bfloat16": "BF16"}[dtype]
                assert (
                    name.replace("lora_A", "lora_B") in names
                    and name.replace("lora_B", "lora_A") in names
                )
            assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dtype=float16"], "--dtype=float16: none of float32, bfloat16"),
        (["--push-to-hub=me"], "--push-to-hub=me: expected USER/NAME"),
        (["--push-to-hub=a/b", "--samples=2"], "takes one adapter"),
        (["--samples=0"], "--samples=0: at least 1"),
        (["--merge=OUT", "--base=/nowhere"], "/nowhere: no such model folder"),
        (["--base=/nowhere"], "--base is for --merge=FOLDER"),
    ],
)
def test_options_of_generate(made, options, expected, tmp_path, capsys):
    options = [option.replace("OUT", str(tmp_path / "merged")) for option in options]
    assert main(generate(made, f"--out={tmp_path / 'a'}", *options)) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error
    assert not (tmp_path / "merged").exists() and not (tmp_path / "a").exists()


def test_nothing_that_exists_is_replaced(made, tmp_path, capsys):
    """Only an adapter that we generated is: one can generate again into the same place."""
    for name in ("precious", "peft", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    adapter = save_adapter(
        tmp_path / "peft",
        lora(made / "base"),
        AdapterConfig(str(made / "base"), 2, 4.0, MODULE_ORDER),
    )
    (adapter / "README.md").write_text("as PEFT writes it")
    shutil.copytree(made / "base", tmp_path / "base")
    before = {
        path: path.read_bytes()
        for path in (*tmp_path.rglob("*"), *made.rglob("*"))
        if path.is_file()
    }
    out, base = f"--out={tmp_path / 'a'}", f"--base={tmp_path / 'base'}"
    for arguments, folder, flag in (
        (["suite", f"--out={tmp_path / 'precious'}"], tmp_path / "precious", "out"),
        (generate(made, f"--out={tmp_path / 'precious'}"), tmp_path / "precious", "out"),
        (generate(made, f"--out={made / 'generator'}"), made / "generator", "out"),
        (generate(made, f"--out={adapter}"), adapter, "out"),
        (generate(made, out, f"--merge={tmp_path / 'base'}", base), tmp_path / "base", "merge"),
        (generate(made, out, f"--merge={tmp_path / 'precious'}"), tmp_path / "precious", "merge"),
    ):
        assert main(arguments) == 2
        assert (
            capsys.readouterr().err
            == f"dnd: --{flag}={folder}: exists already; choose another --{flag}\n"
        )
    for inside in ("", "deeper"):
        assert (
            main(
                generate(
                    made, f"--out={tmp_path / 'a' / inside}", f"--merge={tmp_path / 'a'}", base
                )
            )
            == 2
        )
        assert "would replace the adapter in --out=" in capsys.readouterr().err
    assert before == {
        path: path.read_bytes()
        for path in (*tmp_path.rglob("*"), *made.rglob("*"))
        if path.is_file()
    }
    for seed in (0, 1):
        (tmp_path / "empty" / ".DS_Store").touch()  # which macOS leaves in any folder
        assert main(generate(made, f"--out={tmp_path / 'empty'}", f"--seed={seed}")) == 0
    again = load_adapter(tmp_path / "empty")
    assert (
        main(
            generate(
                made, f"--out={tmp_path / 'more'}", f"--merge={tmp_path / 'm'}", base, "--samples=2"
            )
        )
        == 0
    )
    second = load_adapter(tmp_path / "more" / "sample_1")
    assert all(np.array_equal(second[key], value) for key, value in again.items())
    assert (tmp_path / "m" / "sample_1" / "config.json").is_file()


def test_a_generator_that_makes_no_numbers_makes_no_adapter(made, tmp_path, capsys):
    shutil.copytree(made / "generator", tmp_path / "g")
    tensors = load_file(tmp_path / "g" / "model.safetensors")
    tensors["decoder/stage_1/bias_n"][0] = np.nan
    save_file(tensors, tmp_path / "g" / "model.safetensors")
    out = tmp_path / "a"
    words = generate(made, f"--out={out}")
    assert main([words[0], f"--generator={tmp_path / 'g'}", *words[2:]]) == 2
    assert f"dnd: {tmp_path / 'g'}: makes NaN or Inf, in " in capsys.readouterr().err
    assert not out.exists()


def test_another_name_of_the_base_has_no_commit_of_the_first(made, tmp_path):
    shutil.copytree(made / "generator", tmp_path / "g")
    file = tmp_path / "g" / "generator.json"
    raw = json.loads(file.read_text())
    raw["adapter"] |= {"base": "org/base", "revision": "c0ffee"}
    file.write_text(json.dumps(raw))
    for name, revision in (("", "c0ffee"), ("org/base", "c0ffee"), ("org/copy", "")):
        adapter = TrainedGenerator(tmp_path / "g", base_name=name).adapter
        assert (adapter.base, adapter.revision) == (name or "org/base", revision)


# --- Merged models
# --------------------------------------------------------------------------------------------------


def test_merged_model_is_an_ordinary_folder(made, tmp_path):
    assert len(list((made / "base").glob("model-*.safetensors"))) == 3
    assert (
        main(generate(made, f"--out={tmp_path / 'a'}", f"--merge={tmp_path / 'm'}", "--seed=1"))
        == 0
    )
    base, merged = made / "base", tmp_path / "m"
    assert {p.name for p in merged.iterdir()} == {p.name for p in base.iterdir()} | {"README.md"}
    tensors, adapted = load_adapter(tmp_path / "a"), 0
    for shard in sorted(base.glob("*.safetensors")):
        before, after = load_file(shard), load_file(merged / shard.name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            module = key.removesuffix(".weight")
            expected = value
            if f"{module}.lora_A.weight" in tensors:
                delta = (
                    2.0
                    * tensors[f"{module}.lora_B.weight"].astype(np.float64)
                    @ tensors[f"{module}.lora_A.weight"]
                )
                expected, adapted = value.astype(np.float64) + delta, adapted + 1
                assert np.abs(delta).max() > 1e-3
            assert after[key].dtype == value.dtype == ml_dtypes.bfloat16
            np.testing.assert_allclose(
                after[key].astype(np.float64), expected.astype(np.float64), rtol=2**-8, atol=1e-7
            )
            assert (
                f"{module}.lora_A.weight" in tensors or after[key].tobytes() == value.tobytes()
            ), key
    assert adapted == 14
    found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    expected = with_peft(base, tmp_path / "a")
    assert np.abs(found - expected).max() < 0.5 * np.abs(expected - plain).max(), (
        "bfloat16 rounds the sum, PEFT does not"
    )
    assert AutoTokenizer.from_pretrained(merged)("who is six")["input_ids"]
    assert (
        yaml.safe_load((merged / "README.md").read_text().split("---\n")[1])["library_name"]
        == "transformers"
    )


def test_merged_float32_model_equals_peft(tmp_path):
    base = write_qwen(tmp_path / "base", tie_word_embeddings=False)
    folder = save_adapter(
        tmp_path / "a", lora(base), AdapterConfig(str(base), 2, 5.0, MODULE_ORDER)
    )
    merge_adapter(base, folder, tmp_path / "m")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32))
    np.testing.assert_allclose(found, with_peft(base, folder), atol=1e-5)


@pytest.mark.parametrize("stored", ["as transformers saves it", "as PEFT names it"])
def test_merged_model_of_text_and_images_equals_peft(tmp_path, stored):
    """Qwen2.5-VL's files say model.layers, PEFT model.language_model.layers."""
    text = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": 16, "patch_size": 4},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    torch.manual_seed(0)
    kind = Qwen2_5_VLForConditionalGeneration
    kind(config).save_pretrained(tmp_path / "base")
    targets = r".*language_model.*(q_proj|v_proj|down_proj)"
    model = get_peft_model(
        kind.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path / "a")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = model(ids).logits.numpy()
        plain = model.unload().eval()(ids).logits.numpy()
    shard = tmp_path / "base" / "model.safetensors"
    names = load_file(shard)
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert any(".language_model.layers.0." in key for key in load_adapter(tmp_path / "a"))
    if stored == "as PEFT names it":
        renamed = {
            k.replace("model.layers.", "model.language_model.layers."): v for k, v in names.items()
        }
        save_file(renamed, shard, {"format": "pt"})
    merge_adapter(tmp_path / "base", tmp_path / "a", tmp_path / "m")
    assert load_file(shard).keys() == load_file(tmp_path / "m" / "model.safetensors").keys()
    with torch.no_grad():
        found = kind.from_pretrained(tmp_path / "m").eval()(ids).logits.numpy()
    assert np.abs(expected - plain).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-5)

    both = dict(names) | {
        "language_model.model.layers.0.mlp.down_proj.weight": names[
            "model.layers.0.mlp.down_proj.weight"
        ]
    }
    save_file(both, shard, {"format": "pt"})
    with pytest.raises(InputError, match="layers.0.mlp.down_proj.weight is one of .* and "):
        merge_adapter(tmp_path / "base", tmp_path / "a", tmp_path / "n")


def test_a_merged_model_has_what_its_base_ships(tmp_path):
    """Licences, code and templates; no other weights, no README of the base, no path of its
    maker."""
    base = write_qwen(tmp_path / "base", tie_word_embeddings=False)
    shipped = [
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "modeling_x.py",
        "tokenizer.model",
        "x.jinja",
    ]
    left = [
        "README.md",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "q4.gguf",
        ".gitattributes",
    ]
    for name in shipped + left:
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    (base / "original").mkdir()
    config = json.loads((base / "config.json").read_text())
    path = {"_name_or_path": "/home/me/base"}
    left_by_its_maker = path | {"text_config": {"layers": 2, **path}, "towers": [path]}
    (base / "config.json").write_text(json.dumps(config | left_by_its_maker))
    before = {path.name for path in base.iterdir()}
    folder = save_adapter(tmp_path / "a", lora(base), AdapterConfig("x/y", 2, 5.0, MODULE_ORDER))
    merge_adapter(base, folder, tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == before - {*left, "original"}
    assert (tmp_path / "m" / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == config | {
        "text_config": {"layers": 2},
        "towers": [{}],
    }


def test_shards_that_do_not_count_leave_no_index(tmp_path):
    """Servers take from a folder with an index what the index names."""
    base = write_qwen(tmp_path / "base")
    shard = "model-00001-of-00001.safetensors"
    shutil.copyfile(base / "model.safetensors", base / shard)
    names = dict.fromkeys(load_file(base / shard), shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    folder = save_adapter(tmp_path / "a", lora(base), AdapterConfig("x/y", 2, 5.0, MODULE_ORDER))
    merge_adapter(base, folder, tmp_path / "m")
    assert [p.name for p in (tmp_path / "m").glob("model*")] == ["model.safetensors"]


def test_an_adapter_beside_the_base_is_not_merged_away(made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "base")
    config = AdapterConfig("x/y", 2, 5.0, MODULE_ORDER)
    folder = save_adapter(tmp_path / "a", lora(made / "base"), config)
    shutil.copyfile(folder / "adapter_config.json", tmp_path / "base" / "adapter_config.json")
    with pytest.raises(InputError, match="which transformers loads on top of the model"):
        merge_adapter(tmp_path / "base", folder, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_merged_model_holds_no_infinity(made, tmp_path, value):
    tensors = lora(made / "base")
    tensors["model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] = value
    folder = save_adapter(tmp_path / "a", tensors, AdapterConfig("x/y", 2, 50.0, MODULE_ORDER))
    with pytest.raises(InputError, match="layers.0.mlp.up_proj.weight would hold NaN or Inf in bf"):
        merge_adapter(made / "base", folder, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_what_cannot_be_merged_leaves_nothing(made, tmp_path):
    tensors, config = lora(made / "base"), AdapterConfig("x/y", 2, 4.0, MODULE_ORDER)
    renamed = {
        key.replace("layers.1.self_attn.q_proj", "layers.7.self_attn.q_proj"): value
        for key, value in tensors.items()
    }
    renamed["model.layers.0.mlp.up_proj.lora_A.weight"] = np.ones((2, 12), np.float32)
    folder = save_adapter(tmp_path / "a", renamed, config)
    with pytest.raises(InputError) as caught:
        merge_adapter(made / "base", folder, tmp_path / "m")
    assert "model.layers.7.self_attn.q_proj.weight is missing" in str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight is (24, 16) BF16, the adapter is for (24, 12)" in str(
        caught.value
    )
    folder = save_adapter(tmp_path / "b", tensors, config)
    shutil.copytree(made / "base", tmp_path / "cut")
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(InputError, match=f"{shard.name}: not a readable safetensors file"):
        merge_adapter(tmp_path / "cut", folder, tmp_path / "m")
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: no such file"):
        merge_adapter(tmp_path / "cut", folder, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))


# --- verify-adapter
# --------------------------------------------------------------------------------------------------


def verified(capsys, *arguments) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["verify-adapter", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + (captured.err if status else "")


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern + r" ([-+.e\d]+)", text)[1])


def test_a_good_adapter_is_proved_by_numbers(made, tmp_path, capsys):
    assert main(generate(made, f"--out={tmp_path / 'a'}")) == 0
    status, text = verified(capsys, tmp_path / "a")
    assert status == 0 and "modules attached: 14 of 14, rank 2, scale 2" in text, text
    assert number("random tokens:", text) == pytest.approx(
        number("merged by hand:", text), rel=1e-3
    )
    assert number("random tokens:", text) > 1e-3 > number("largest deviation:", text)
    write_qwen(tmp_path / "other", hidden_size=32)
    status, text = verified(capsys, tmp_path / "a", f"--base={tmp_path / 'other'}")
    assert status == 1 and "PEFT does not load it" in text


def test_scales_that_we_fold_are_those_of_peft(made, tmp_path, capsys):
    """An adapter that PEFT itself writes with rsLoRA and an alpha for some modules: our reading,
    merged by hand, agrees with it."""
    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        alpha_pattern={"k_proj": 3, "layers.1.mlp.up_proj": 11},
        target_modules="all-linear",
    )
    peft = get_peft_model(model, settings)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value) * 0.3)
    peft.save_pretrained(tmp_path / "a")
    status, text = verified(capsys, tmp_path / "a", f"--base={made / 'base'}")
    assert status == 0 and "scale 3" in text, text
    merge_adapter(write_qwen(tmp_path / "base32"), tmp_path / "a", tmp_path / "m")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32))
    np.testing.assert_allclose(found, with_peft(tmp_path / "base32", tmp_path / "a"), atol=1e-4)


def rewritten(
    folder: pathlib.Path,
    rename=lambda key: key,
    keep=lambda key: True,
    change=lambda key, value: value,
) -> pathlib.Path:
    file = folder / "adapter_model.safetensors"
    save_file(
        {rename(k): change(k, v) for k, v in load_file(file).items() if keep(k)},
        file,
        metadata={"format": "pt"},
    )
    return folder


BROKEN = {
    "no prefix": (
        dict(rename=lambda key: key.removeprefix(PEFT_PREFIX)),
        "28 of 28 tensors belong to no module of the base: "
        "model.layers.0.mlp.down_proj.lora_A.weight",
    ),
    "another prefix": (
        dict(rename=lambda key: key.replace("model.layers", "transformer.layers")),
        "; a module of the base is base_model.model.model.layers.0.mlp.down_proj",
    ),
    "one module": (
        dict(
            rename=lambda key: key.replace("layers.1.self_attn.k_proj", "layers.1.attention.k_proj")
        ),
        "2 of 28 tensors belong to no module",
    ),
    "a layer is missing": (
        dict(keep=lambda key: "layers.1." not in key),
        "target_modules names modules that the file has no tensors for: "
        "base_model.model.model.layers.1.",
    ),
    "nothing in it": (
        dict(change=lambda key, value: value * 0 if "lora_B" in key else value),
        "changes nothing: the largest change of a logit is 0, by hand 0",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_load_and_do_nothing_are_found_out(name, made, tmp_path, capsys):
    how, expected = BROKEN[name]
    config = AdapterConfig(str(made / "base"), 2, 4.0, MODULE_ORDER)
    folder = rewritten(save_adapter(tmp_path / "a", lora(made / "base"), config), **how)
    status, text = verified(capsys, folder)
    assert status == 1, text
    line = text.strip().splitlines()[-1]  # after transformers' progress
    assert line.startswith(f"dnd: {folder}: ") and expected in line and text.count("dnd: ") == 1, (
        text
    )


def test_other_numbers_than_the_matrices_say_are_found_out(made, tmp_path, capsys, monkeypatch):
    """A PEFT that scales otherwise than it documents: the scale of the loaded layers is changed
    behind its back."""
    from peft.tuners.lora import LoraLayer

    config = AdapterConfig(str(made / "base"), 2, 4.0, MODULE_ORDER)
    folder = save_adapter(tmp_path / "a", lora(made / "base"), config)
    original = LoraLayer.update_layer

    def update_layer(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.scaling = {name: scale * 1.1 for name, scale in self.scaling.items()}

    for cls in LoraLayer.__subclasses__() + [LoraLayer]:
        if "update_layer" in vars(cls) and cls.__name__ in ("LoraLayer", "Linear"):
            monkeypatch.setattr(cls, "update_layer", update_layer)
    status, text = verified(capsys, folder)
    assert status == 1 and "not what its matrices say" in text, text


def test_a_vision_language_base(tmp_path, capsys):
    """Qwen2.5-VL's architecture, asked for text alone: as transformers and PEFT name its
    modules."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 40, "num_hidden_layers": 2, "num_key_value_heads": 2}
    text |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    }
    vision = {**sizes, "depth": 1, "num_heads": 4, "out_hidden_size": 16}
    settings = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    fill(Qwen2_5_VLForConditionalGeneration(settings)).save_pretrained(tmp_path / "base")
    model = load_torch_base(tmp_path / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    )
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if ".lora_B." in name:
                value.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    status, text = verified(capsys, tmp_path / "adapter", f"--base={tmp_path / 'base'}")
    assert status == 0 and "modules attached: 4 of 4, rank 2, scale 2" in text, text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rank_pattern": None}, "no attribute 'keys'"),
        ({"r": 2.0}, "found element of type float"),
        ({"eva_config": []}, "`EvaConfig` must be"),
        ({"lora_dropout": "x"}, "not supported between"),
    ],
    ids=str,
)
def test_settings_that_peft_cannot_take_are_one_line(made, tmp_path, capsys, changes, why):
    config = AdapterConfig(str(made / "base"), 2, 4.0, MODULE_ORDER)
    folder = save_adapter(tmp_path / "a", lora(made / "base"), config)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | changes))
    status, text = verified(capsys, folder)
    assert status == 1 and f"dnd: {folder}: PEFT does not load it (" in text and why in text


def test_verify_takes_folders_as_peft_does(made, tmp_path, capsys):
    config = AdapterConfig(str(made / "base"), 2, 4.0, MODULE_ORDER)
    folder = save_adapter(tmp_path / "a", lora(made / "base"), config)
    status, text = verified(capsys, folder / "adapter_model.safetensors")
    assert status == 2 and "a file; PEFT loads folders" in text


def test_verify_needs_a_base_that_is_there(made, tmp_path, capsys):
    folder = save_adapter(
        tmp_path / "a", lora(made / "base"), AdapterConfig("", 2, 4.0, MODULE_ORDER)
    )
    assert verified(capsys, folder) == (2, f"dnd: {folder}: names no base; give --base=FOLDER\n")
    status, text = verified(capsys, folder, f"--base={tmp_path}")
    assert status == 2 and "transformers cannot load it" in text
    assert verified(capsys, tmp_path / "none")[0] == 2


# --- The hub
# --------------------------------------------------------------------------------------------------


def test_the_whole_folder_is_handed_to_the_hub(made, tmp_path):
    """The real client, pointed at a server of our own."""
    command = [
        sys.executable,
        "-m",
        "dnd_jax",
        *generate(made, f"--out={tmp_path / 'a'}", "--push-to-hub=me/mine"),
        "--base-name=some/base",
    ]
    with running_hub(tmp_path) as (server, environment):
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=pathlib.Path(__file__).parents[2],
        )
    assert done.returncode == 0, done.stderr
    assert "pushed: " in done.stdout
    sent = sent_files(server)
    assert sent == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} and len(sent) == 3


NAMED = "--base-name=some/base"


def test_what_is_uploaded_is_private_and_names_no_path(made, tmp_path, capsys):
    out, pushed = f"--out={tmp_path / 'a'}", "--push-to-hub=me/mine"
    assert main(generate(made, out, pushed)) == 2
    error = capsys.readouterr().err
    assert "not on the hub; say by --base-name=USER/NAME" in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()
    for flags, message in (
        ([pushed, "--base-name=/some/base"], "would name its base '/some/base', which is not"),
        (["--public"], "--public is for --push-to-hub"),
    ):
        assert main(generate(made, out, *flags)) == 2 and message in capsys.readouterr().err
    assert main(generate(made, out, NAMED, f"--merge={tmp_path / 'm'}")) == 0
    for path in [*(tmp_path / "a").glob("*.[jm]*"), *(tmp_path / "m").glob("*.[jm]*")]:
        assert str(made) not in path.read_text() and made.name not in path.read_text(), path
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == yaml.safe_load((tmp_path / "m" / "README.md").read_text().split("---\n")[1])[
            "base_model"
        ]
    )
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    for key, value in (
        ("cache", str(made)),
        ("text_config.cache", {"cache": str(made)}),
        ("files[1].at", ["x", {"at": str(made)}]),
    ):
        changed = settings | {re.match("[a-z_]+", key)[0]: value}
        (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
        named = f"config.json: {re.escape(key)} is .* a path of this machine"
        with pytest.raises(InputError, match=named):
            push(tmp_path / "m", "me/mine")


@pytest.mark.parametrize("public", [False, True])
def test_only_public_makes_a_public_repository(tmp_path, monkeypatch, public):
    """What the real client asks the hub for; a model that is public already is not filled without
    --public."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    code = (
        "import sys; from dnd_jax.base.hub import push; "
        "push(sys.argv[1], 'me/mine', sys.argv[2] == 'True')"
    )
    with running_hub(tmp_path, private=False) as (server, environment):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "a", str(public)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
    asked = json.loads(next(body for path, body in server.got if path == "/api/repos/create"))
    assert (asked.get("visibility") or asked.get("private")) in (
        ("public", False) if public else ("private", True)
    ), asked
    commits = [path for path, _ in server.got if "/commit/" in path]
    if public:
        assert done.returncode == 0 and commits, done.stderr
    else:
        assert "me/mine: it is there and public; give --public" in done.stderr and not commits
        assert "hf upload" not in done.stderr  # the advice must not publish either


def test_offline_push_is_one_clear_line(made, tmp_path, capsys):
    """conftest.py turns the network off; the adapter stays."""
    assert main(generate(made, f"--out={tmp_path / 'a'}", "--push-to-hub=me/mine", NAMED)) == 2
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("dnd: me/mine: the hub did not take it (")
        and f"hf upload me/mine {tmp_path / 'a'}" in error
    )
    assert "\n" not in error and (tmp_path / "a" / "adapter_model.safetensors").is_file()
