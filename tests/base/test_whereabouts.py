"""A folder that is no model's, or not a whole one's, is refused in one line that says what is
there; so is a tokenizer that does not fit the embeddings."""

import json
import pathlib
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_models import tokenizer as words
from small_models import write_encoder, write_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

from dnd_jax.base.folder import load_base, load_tokenizer
from dnd_jax.core.errors import InputError
from dnd_jax.encoders.load import load_encoder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    return write_qwen(tmp_path_factory.mktemp("whole") / "base")


def copied(base: pathlib.Path, target: pathlib.Path, *without: str) -> pathlib.Path:
    return shutil.copytree(base, target, ignore=shutil.ignore_patterns(*without))


def refused(path, *loads) -> str:
    """The one line of all of these, which is the same."""
    lines = set()
    for load in loads or (load_base, load_encoder):
        with pytest.raises(InputError) as caught:
            load(path)
        lines.add(str(caught.value))
    (line,) = lines
    assert "\n" not in line
    return line


# --- No model's folder
# --------------------------------------------------------------------------------------------------


def gguf_file(base, root):
    (root / "smol.gguf").write_bytes(b"GGUF")
    return root / "smol.gguf"


def gguf_folder(base, root):
    return gguf_file(base, root).parent


def weights_file(base, root):
    return base / "model.safetensors"


def misspelt(base, root):
    copied(base, root / "qwen-small")
    return root / "qwen-smal"


def empty(base, root):
    return root


def a_folder_up(base, root):
    copied(base, root / "base")
    return root


def a_folder_down(base, root):
    (copied(base, root / "base") / "1_Pooling").mkdir()
    (root / "base" / "1_Pooling" / "notes").touch()
    return root / "base" / "1_Pooling"


def hub_cache(base, root):
    copied(base, root / "models--Qwen--Q" / "snapshots" / ("a" * 40))
    (root / "models--Qwen--Q" / "refs").mkdir()
    return root / "models--Qwen--Q"


def hub_cache_of_several(base, root):
    hub_cache(base, root)
    return root


def trainer(base, root):
    for step in (500, 1000):
        copied(base, root / f"checkpoint-{step}")
    (root / "trainer_state.json").touch()
    return root


def sentence_transformers_of_old(base, root):
    copied(base, root / "0_Transformer")
    (root / "modules.json").write_text("[]")
    return root


def metas(base, root):
    (root / "params.json").touch()
    (root / "consolidated.00.pth").touch()
    return root


def adapter(base, root):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root)
    return root


def tokenizer_alone(base, root):
    return copied(base, root / "t", "*.safetensors", "config.json", "generation_config.json")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (gguf_file, ["smol.gguf: not a whole GGUF file", "copy it again"]),
        (gguf_folder, ["config.json: no such file", "give the file itself:", "/smol.gguf"]),
        (misspelt, ["no such model folder; did you mean qwen-small?"]),
        (empty, ["config.json: no such file; the folder is empty"]),
        (a_folder_up, ["there is one in base; give the folder", "/base"]),
        (a_folder_down, ["there is one a folder up; give", "/base"]),
        (hub_cache, [f"there is one in snapshots/{'a' * 40}; give the folder"]),
        (hub_cache_of_several, [f"there is one in models--Qwen--Q/snapshots/{'a' * 40}"]),
        (trainer, ["checkpoint-500, checkpoint-1000; give one of", "/checkpoint-1000"]),
        (sentence_transformers_of_old, ["there is one in 0_Transformer"]),
        (metas, ["Meta's or Mistral's own format (consolidated.00.pth, params.json)"]),
        (adapter, ["it is a PEFT adapter of", "give its base, or merge"]),
        (tokenizer_alone, ["there is", "tokenizer.json", "give a whole model folder"]),
    ],
)
def test_no_model_there(make, parts, base, tmp_path):
    path = make(base, tmp_path)
    line = refused(path)
    assert all(part in line for part in [str(path), *parts]), line


def test_a_file_of_the_folder(base):
    line = refused(base / "model.safetensors", load_base)
    assert f"a file; give the folder {base}" in line
    assert "a file; give the folder" in refused(base / "config.json", load_base, load_tokenizer)


def test_a_relative_file_is_not_asked_of_the_hub(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gguf_file(base, tmp_path)
    assert refused("smol.gguf", load_base).startswith("smol.gguf: not a whole GGUF file")
    assert refused("no/smol.gguf", load_base).startswith("no/smol.gguf: no such GGUF file")


# --- Not a whole one
# --------------------------------------------------------------------------------------------------


def torch_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "training_args.bin").touch()


def renamed_to(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def in_a_folder(name):
    def make(folder):
        (folder / name).mkdir()
        (folder / name / "x").touch()

    return make


def file_of(name, text=""):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (torch_bin, ["only safetensors are read, and there is pytorch_model.bin; save it again"]),
        (file_of("pytorch_model-00001-of-00002.bin"), ["pytorch_model-00001-of-00002.bin"]),
        (file_of("tf_model.h5"), ["only safetensors are read, and there is tf_model.h5"]),
        (renamed_to("model.fp16.safetensors"), ["there is model.fp16.safetensors; rename it"]),
        (renamed_to("consolidated.safetensors"), ["there is consolidated.safetensors"]),
        (
            renamed_to("model-00001-of-00001.safetensors"),
            ["without model.safetensors.index.json; copy that file too"],
        ),
        (file_of("smol.gguf"), ["there is smol.gguf; give the file itself:"]),
        (in_a_folder("pytorch_model_fsdp_0"), ["pytorch_model_fsdp_0", "accelerate merge-weights"]),
        (in_a_folder("global_step5"), ["global_step5", "zero_to_fp32.py"]),
        (lambda folder: None, ["copy the weights too"]),
    ],
)
def test_no_weights_there(make, parts, base, tmp_path):
    folder = copied(base, tmp_path / "base")
    make(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    line = refused(folder)
    expected = [f"{folder}/model.safetensors: no such file; ", *parts]
    assert all(part in line for part in expected), line


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("config.json", POINTER.encode(), ["a pointer of git-lfs", "git lfs pull"]),
        ("config.json", None, ["begins with a byte order mark; save it as UTF-8 without one"]),
        ("config.json", '{"a": 1}'.encode("utf-16"), ["is UTF-16"]),
        ("config.json", b"", ["config.json:1: not JSON"]),
        ("config.json", b"[]", ["not a model's configuration"]),
        ("model.safetensors", POINTER.encode(), ["a pointer of git-lfs", "git lfs pull"]),
        ("model.safetensors", b"", ["not a readable safetensors file"]),
        ("model.safetensors.index.json", POINTER.encode(), ["a pointer of git-lfs"]),
    ],
)
def test_damaged_files(name, content, parts, base, tmp_path):
    folder = copied(base, tmp_path / "base")
    if name.endswith(".index.json"):
        (folder / "model.safetensors").unlink()
    marked = b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()
    (folder / name).write_bytes(marked if content is None else content)
    line = refused(folder)
    assert all(part in line for part in [f"{folder}/{name}", *parts]), line


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer.json", POINTER, "tokenizer.json: a pointer of git-lfs"),
        ("tokenizer.json", "{", "tokenizer.json:1: not JSON"),
        ("tokenizer_config.json", "\ufeff{}", "tokenizer_config.json: begins with a byte order"),
    ],
)
def test_damaged_tokenizers(name, content, part, base, tmp_path):
    folder = copied(base, tmp_path / "base")
    (folder / name).write_text(content)
    assert part in refused(folder, load_tokenizer)


def test_no_tokenizer_there(base, tmp_path):
    """transformers makes one of a single token."""
    folder = copied(base, tmp_path / "base", "tokenizer*")
    assert len(AutoTokenizer.from_pretrained(folder)) == 1
    expected = "no usable tokenizer; tokenizer.json is not there; there is chat_template.jinja"
    assert expected in refused(folder, load_tokenizer)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert "tokenizer.json is not there" in refused(folder, load_tokenizer)
    (folder / "vocab.json").write_text('{"a": 0}')
    assert "vocab.json needs merges.txt" in refused(folder, load_tokenizer)


# --- A tokenizer that does not fit
# --------------------------------------------------------------------------------------------------


def pad(tokenizer, config, generation):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def new_words(tokenizer, config, generation):
    tokenizer.add_tokens(["Turin", "Porto"])


def marks_of_chat(tokenizer, config, generation):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})


def end_of_config(tokenizer, config, generation):
    config["eos_token_id"] = 151645


def pad_of_generation(tokenizer, config, generation):
    generation["pad_token_id"] = config["vocab_size"]


def fewer_rows(tokenizer, config, generation):
    config["vocab_size"] -= 1


def fewer_rows_of_text(tokenizer, config, generation):
    config["text_config"] = {"vocab_size": config.pop("vocab_size") - 1}


def more_rows(tokenizer, config, generation):
    config["vocab_size"] += 64


def no_padding(tokenizer, config, generation):
    config["pad_token_id"] = -1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (pad, ["tokenizer's files give '[PAD]' the id", "config.json: vocab_size", "resize"]),
        (new_words, ["'Turin'", "(and 1 more)", "config.json: vocab_size"]),
        (marks_of_chat, ["'<|im_start|>'", "(and 1 more)"]),
        (end_of_config, ["/config.json: eos_token_id 151645 is beyond the"]),
        (pad_of_generation, ["/generation_config.json: pad_token_id"]),
        (fewer_rows, ["the tokenizer's files give"]),
        (fewer_rows_of_text, ["the tokenizer's files give"]),
        (more_rows, None),
        (no_padding, None),
    ],
)
def test_tokens_that_the_embeddings_lack(change, parts, base, tmp_path):
    folder = copied(base, tmp_path / "base", "*.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config, generation = (
        json.loads((base / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    config["vocab_size"] = len(tokenizer)
    change(tokenizer, config, generation)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if parts is None:
        load_tokenizer(folder)
    else:
        line = refused(folder, load_tokenizer)
        assert all(part in line for part in [str(folder), *parts]), line


def test_a_token_of_pictures_may_have_no_row(base, tmp_path):
    """As in Gemma 3's text models."""
    folder = copied(base, tmp_path / "base")
    file = folder / "tokenizer_config.json"
    for name, refuses in (("image_token", False), ("other_token", True)):
        extra = {"extra_special_tokens": {name: "<image_soft_token>"}}
        file.write_text(json.dumps(json.loads(file.read_text()) | extra))
        assert len(AutoTokenizer.from_pretrained(folder)) == 301
        if refuses:
            assert "'<image_soft_token>' the id 300" in refused(folder, load_tokenizer)
        else:
            load_tokenizer(folder)


def test_a_token_that_an_encoder_lacks(tmp_path):
    folder, tokenizer = write_encoder(tmp_path / "encoder"), words()
    load_encoder(folder)
    tokenizer.add_tokens(["Porto"])
    tokenizer.save_pretrained(folder)
    assert "'Porto'" in refused(folder, load_encoder)


def test_texts_that_sentence_transformers_would_write_small(tmp_path):
    folder = write_encoder(tmp_path / "encoder")
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": false}')
    load_encoder(folder)
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    load_encoder(folder)  # of these words it has no capitals: all are unknown
    tokenizer = words()
    tokenizer.add_tokens(["Which"])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert "'Which'" in refused(folder, load_encoder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    assert "do_lower_case is true" in refused(folder, load_tokenizer_then_encoder)


def load_tokenizer_then_encoder(folder):
    """The encoder without its weights, which have a row fewer."""
    from dnd_jax.encoders.load import _check_case

    _check_case(folder, load_tokenizer(folder))
