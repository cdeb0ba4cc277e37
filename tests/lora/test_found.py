"""The line says what is there, and what to do, where a LoRA adapter was expected."""

import json
import os
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from dnd_jax.core.errors import InputError
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.found import CONFIG, WEIGHTS
from dnd_jax.lora.listing import checkpoint_folders
from dnd_jax.lora.peft_settings import AdapterConfig, load_adapter_config, read_shapes

LAYER = "model.layers.0.self_attn.q_proj"


def adapter(folder: pathlib.Path) -> pathlib.Path:
    tensors = {f"{LAYER}.lora_A.weight": np.ones((2, 8)), f"{LAYER}.lora_B.weight": np.ones((8, 2))}
    return save_adapter(folder, tensors, AdapterConfig("org/base", 2, 4.0, ("q_proj",)))


def files(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def named(folder):
    adapter(folder / "my_task")


def without_settings(folder):
    adapter(folder)
    (folder / CONFIG).unlink()


def lfs(folder):
    adapter(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (folder / WEIGHTS).write_text(pointer)


def marked(folder):
    adapter(folder)
    (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding="utf-8-sig")


def integers(folder):
    adapter(folder)
    save_file({f"{LAYER}.lora_A.weight": np.ones((2, 8), np.int8)}, folder / WEIGHTS)


def mlx(folder):
    files(folder, "adapters.safetensors")
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {}}))


HERE = {
    "pickled": (
        lambda f: files(f, "adapter_model.bin", CONFIG),
        "adapter_model.bin is there, which is pickled: save it as safetensors",
    ),
    "torchtune's": (lambda f: files(f, "adapter_0.pt"), "adapter_0.pt is there, which is pickled"),
    "saved under a name": (named, "there are adapters in my_task: of one that PEFT saved under a"),
    "without settings": (without_settings, "adapter_model.safetensors is there: copy adapter_con"),
    "in several files": (
        lambda f: files(f, CONFIG, f"{WEIGHTS}.index.json"),
        "its weights are in several files",
    ),
    "a pointer of git-lfs": (lfs, "pointer of git-lfs.*git lfs pull"),
    "not finished": (lambda f: files(f, f"{WEIGHTS}.tmp", CONFIG), "which was not finished"),
    "of integers": (integers, "lora_A.weight is stored as I8; save it as float32"),
    "MLX's": (mlx, "an adapter of MLX"),
    "a whole model": (
        lambda f: files(f, "config.json", "model-00001-of-00002.safetensors"),
        "a whole model, fine-tuned without LoRA; only LoRAs are read",
    ),
    "DeepSpeed's state": (
        lambda f: files(f, "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"),
        "global_step10 is a state of DeepSpeed",
    ),
    "FSDP's shards": (
        lambda f: files(f, "pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin"),
        "sharded by FSDP; merge it: accelerate merge-weights",
    ),
    "Orbax's": (lambda f: files(f, "_CHECKPOINT_METADATA", "d/0"), "it is a checkpoint of Orbax"),
    "a GGUF": (lambda f: files(f, "lora.gguf"), "lora.gguf is there; only PEFT's form is read"),
    "a run": (
        lambda f: (adapter(f / "other" / "x"), files(f, "checkpoint-10/y"))[0],
        "it has checkpoint-10: give one checkpoint, .*checkpoint-10",
    ),
    "anything": (lambda f: files(f, "notes.txt", "b.csv"), "there are b.csv, notes.txt"),
    "nothing": (lambda f: f.mkdir(), "the folder is empty"),
}


@pytest.mark.parametrize(("make", "said"), HERE.values(), ids=HERE)
def test_what_is_there(tmp_path, make, said):
    make(tmp_path / "a")
    with pytest.raises(InputError, match=said) as caught:
        load_adapter_config(tmp_path / "a")
    line = str(caught.value)
    assert str(tmp_path / "a") in line and "\n" not in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "no such folder; adapters are read from folders .*hf download"),
        ("org/absent", "no such folder"),
        ("a.pth", "pickled, not a PEFT adapter, which is a folder with"),
        ("a.gguf", "a file, not a PEFT adapter"),
    ],
)
def test_what_is_no_folder(tmp_path, name, said):
    if "." in name:
        files(tmp_path, name)
    with pytest.raises(InputError, match=said):
        read_shapes(tmp_path / name)


# --- Datasets


def whole_model(root):
    files(root / "birds", "config.json", "model.safetensors")


def one_broken(root):
    adapter(root / "birds" / "step_1")
    files(root / "birds" / "step_2", "adapter_model.bin", CONFIG)


def one_named(root):
    (root / "birds" / "runs").mkdir(parents=True)
    adapter(root / "birds" / "step_2" / "task")


def half_copied(root):
    adapter(root / "birds" / "step_1")
    files(root / "birds" / "step_2", f".{WEIGHTS}.a1B2c3")


DATASETS = {
    "of other capitals": (lambda r: adapter(r / "Birds" / "s"), "no folder birds, but Birds: ren"),
    "another one": (lambda r: adapter(r / "fish" / "s"), r"no folder birds \(there are fish\)"),
    "empty": (lambda r: (r / "birds").mkdir(), "birds: the folder is empty"),
    "one adapter": (lambda r: adapter(r / "birds"), "is one adapter: put it into a folder of its"),
    "a whole model": (whole_model, "a whole model, fine-tuned without LoRA"),
    "one of them pickled": (one_broken, "step_2: no adapter_model.safetensors; adapter_model.bin"),
    "one of them named": (one_named, "step_2: .*there are adapters in task"),
    "one of them half copied": (
        half_copied,
        "step_2: .*adapter_model.safetensors.a1B2c3 is there, which was not finished",
    ),
    "states alone": (
        lambda r: files(r / "birds" / "checkpoint-9", "global_step9/x.pt", "latest"),
        "checkpoint-9: global_step9 is a state of DeepSpeed",
    ),
    "no root": (lambda r: None, "no folder birds"),
}


@pytest.mark.parametrize(("make", "said"), DATASETS.values(), ids=DATASETS)
def test_what_is_there_of_a_dataset(tmp_path, make, said):
    if said != "no folder birds":
        (tmp_path / "loras").mkdir()
    make(tmp_path / "loras")
    with pytest.raises(InputError, match=said) as caught:
        checkpoint_folders(tmp_path / "loras", ["birds"])
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    adapter(tmp_path / "plain")
    marked(tmp_path / "marked")
    assert load_adapter_config(tmp_path / "marked") == load_adapter_config(tmp_path / "plain")


def test_a_link_to_a_checkpoint_is_not_another_one(tmp_path):
    """As trainers leave beside them; checkpoints that lie elsewhere may all be links."""
    birds, elsewhere = tmp_path / "birds", tmp_path / "elsewhere"
    for step in (1, 2):
        adapter(birds / f"step_{step}")
        adapter(elsewhere / f"step_{step + 2}")
        (birds / f"step_{step + 2}").symlink_to(elsewhere / f"step_{step + 2}")
    (birds / "latest").symlink_to("step_2")
    (birds / "best").symlink_to(elsewhere / "step_3")
    (birds / "gone").symlink_to("step_0")
    found = checkpoint_folders(tmp_path, ["birds"])["birds"]
    assert [path.name for path in found] == ["step_1", "step_2", "step_3", "step_4"]


def test_what_lies_beside_checkpoints_is_no_fault(tmp_path):
    """Logs, hidden folders, and what training states of other steps left."""
    adapter(tmp_path / "birds" / "checkpoint-2")
    files(tmp_path / "birds", "runs/events", "trainer_state.json", "checkpoint-1/optimizer.pt")
    adapter(tmp_path / "birds" / ".ipynb_checkpoints")
    adapter(tmp_path / "birds" / "old" / "checkpoint-1")
    found = checkpoint_folders(tmp_path, ["birds"])["birds"]
    assert [os.path.basename(path) for path in found] == ["checkpoint-2"]
