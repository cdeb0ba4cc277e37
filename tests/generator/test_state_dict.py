"""A released generator's state dict, as tools leave it: each reads as the plain one, or the line
says what is there."""

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dnd_jax.core.errors import InputError
from dnd_jax.generator.released import FIRST
from dnd_jax.generator.state_dict import read_state_dict

PLAIN = {
    FIRST: torch.arange(6.0).reshape(2, 3),
    "model.decoder.module_list.0.linear2.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "criterion_weight": torch.zeros(1, 4, 1, 1),
}


def named(rename) -> dict:
    return {rename(key): value for key, value in PLAIN.items()}


def inner(key: str) -> str:
    return key.replace("decoder.", "decoder._orig_mod._fsdp_wrapped_module.")


FORMS = {
    "alone": PLAIN,
    "DDP": named("module.{}".format),
    "torch.compile": named("_orig_mod.{}".format),
    "DDP of a compiled one": named("module._orig_mod.{}".format),
    "parts compiled": named(inner),
    "Lightning": {"state_dict": named("net.{}".format), "epoch": 3, "optimizer_states": [{}]},
    "a training checkpoint": {"model": PLAIN, "optimizer": {"state": {}}, "step": 7},
    "one of DDP": {"model_state_dict": named("module.{}".format), "loss": 0.5},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("old", [False, True])
def test_forms_that_are_read(form, old, tmp_path):
    torch.save(form, tmp_path / "g.pth", _use_new_zipfile_serialization=not old)
    found = read_state_dict(tmp_path / "g.pth", FIRST)
    assert found.keys() == PLAIN.keys()
    for key, value in PLAIN.items():
        np.testing.assert_array_equal(found[key].astype(np.float32), value.float().numpy())


def test_safetensors(tmp_path):
    save_file(named("module.{}".format), tmp_path / "g.safetensors")
    found = read_state_dict(tmp_path / "g.safetensors", FIRST)
    assert found.keys() == PLAIN.keys() and found[FIRST].dtype == np.float32
    assert {v.dtype for v in found.values()} == {np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ({"model": PLAIN, "ema": 1, "generator": PLAIN}, "by name; it has ema, generator, model"),
        ({"weights": PLAIN}, "expected a flat dictionary of tensors by name; it has weights"),
        ([1, 2], "by name, not a list"),
        (PLAIN | {f"_orig_mod.{FIRST}": torch.ones(1)}, "names that come to one"),
    ],
    ids=["two models", "another key", "a list", "twice"],
)
def test_forms_that_are_refused(form, fault, tmp_path):
    torch.save(form, tmp_path / "g.pth")
    with pytest.raises(InputError, match=fault) as caught:
        read_state_dict(tmp_path / "g.pth", FIRST)
    assert "\n" not in str(caught.value)


def test_a_front_of_some_names_alone_stays(tmp_path):
    torch.save(PLAIN | {f"ema.{key}": value for key, value in PLAIN.items()}, tmp_path / "g.pth")
    assert len(read_state_dict(tmp_path / "g.pth", FIRST)) == 6


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (("generator.json", "model.safetensors"), "is a generator of dnd_jax already"),
        (("_CHECKPOINT_METADATA", "d"), "is a checkpoint of Orbax"),
        (("readme", "epoch_9.pth"), r"is a folder; give the \.pth .*; there is .*epoch_9.pth"),
        ((), "is a folder; give the .pth file of the released generator"),
    ],
)
def test_folders(names, fault, tmp_path):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=fault):
        read_state_dict(tmp_path, FIRST)


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "g.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="pointer of git-lfs"):
        read_state_dict(tmp_path / "g.pth", FIRST)


@pytest.mark.parametrize(
    "raw",
    [b"hello\n", b".text", b"", b"{}", b"\x80\x02", b"\x80\xff", b"(lp0\n.", b"I7\n.", b"cos\n"],
)
def test_files_that_are_none(raw, tmp_path):
    (tmp_path / "x.pth").write_bytes(raw)
    with pytest.raises(InputError, match=r"x\.pth: (not a state dict|holds more than)") as caught:
        read_state_dict(tmp_path / "x.pth", FIRST)
    assert "\n" not in str(caught.value)
