"""Collections of LoRA checkpoints: every layout in use, one scale, streamed statistics, cached
token arrays, bounded memory."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_sets import NAMES, opened, qwen_shapes
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from small_models import condition_by, write_qwen, write_vectors
from transformers import AutoModelForCausalLM

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.encoders.cache import PromptEncoder
from dnd_jax.lora.adapter import as_folder, load_adapter, save_adapter
from dnd_jax.lora.checkpoints import (
    IMPORTANCE,
    TOKENS,
    Checkpoints,
    make_target,
    token_array,
)
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.listing import checkpoint_folders
from dnd_jax.lora.moments import Moments, importance_weights
from dnd_jax.lora.names import PEFT_PREFIX
from dnd_jax.lora.peft_settings import AdapterConfig, load_adapter_config
from dnd_jax.lora.targets import ChunkTarget, ElementTarget

SHAPES = qwen_shapes(8, 4, 12, 2, 2)


def lora(seed: int, shapes=SHAPES, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: (rng.normal(size=shape) * 0.1).astype(dtype) for key, shape in shapes.items()}


def settings(**changes) -> dict:
    plain = AdapterConfig(
        "org/base",
        2,
        4.0,
        ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"),
    ).to_peft()
    return plain | changes


def write(folder: pathlib.Path, tensors, **changes) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {PEFT_PREFIX + key: value for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings(**changes)))
    return folder


def write_all(root: pathlib.Path, steps=(1, 2, 10), **changes) -> pathlib.Path:
    for i, name in enumerate(NAMES):
        for step in steps:
            write(root / name / f"checkpoint-{step}", lora(100 * i + step), **changes)
    return root


# --- How collections lie on disk
# -------------------------------------------------------------------------------------------


def test_llama_factory_folders_in_the_order_of_their_numbers(tmp_path):
    """A run leaves checkpoint-N folders, trainer files, and the last adapter beside them."""
    root = write_all(tmp_path)
    write(root / "birds", lora(99))
    (root / "birds" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (root / "birds" / "checkpoint-2" / "optimizer.pt").write_bytes(b"x")
    found = opened(root).folders
    assert [path.name for path in found["birds"]] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-10",
    ]
    assert [path.name for path in found["fish"]] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-10",
    ]


@pytest.mark.parametrize("where", ["beside each dataset's files", "once above them"])
def test_the_originals_flat_files(where, tmp_path):
    folders, flat = write_all(tmp_path / "folders"), tmp_path / "flat"
    for i, name in enumerate(NAMES):
        (flat / name).mkdir(parents=True)
        for step in (1, 2, 10):
            tensors = {PEFT_PREFIX + key: value for key, value in lora(100 * i + step).items()}
            save_file(tensors, flat / name / f"{step}.safetensors")
        where_to = flat / name if where.startswith("beside") else flat
        (where_to / "adapter_config.json").write_text(json.dumps(settings()))
    one, other = opened(folders), opened(flat)
    assert [path.name for path in other.folders["fish"]] == [
        "1.safetensors",
        "2.safetensors",
        "10.safetensors",
    ]
    assert one.layout == other.layout and one.adapter == other.adapter
    for name in NAMES:
        arrays = [
            token_array(c, name, ChunkTarget(c.layout), tmp_path / f"cache{i}")
            for i, c in enumerate((one, other))
        ]
        np.testing.assert_array_equal(arrays[0].targets, arrays[1].targets)
    written = as_folder(other.folders["fish"][-1], tmp_path / "peft")
    assert load_adapter_config(written) == other.adapter
    assert all(
        np.array_equal(load_adapter(written)[key], value) for key, value in lora(110).items()
    )
    assert (
        as_folder(one.folders["fish"][0], tmp_path / "no") == one.folders["fish"][0]
        and not (tmp_path / "no").exists()
    )


def test_flat_files_without_settings_and_mixed_kinds(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
    save_file(lora(1), tmp_path / "birds" / "1.safetensors")
    (tmp_path / "fish" / "checkpoint-3").mkdir()
    (tmp_path / "fish" / "checkpoint-3" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError) as caught:
        checkpoint_folders(tmp_path, [*NAMES, "nothing"])
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}: expected DATASET/*/adapter_model.safetensors or DATASET/N.safetensors"
    )
    assert "checkpoint-3: no adapter_model.safetensors and no adapter_config.json" in message
    assert "adapter_model.bin is there, which is pickled: save it as safetensors" in message
    assert "no checkpoints for nothing: no folder nothing (there are birds, fish)" in message
    write(tmp_path / "fish" / "checkpoint-3", lora(3))
    with pytest.raises(
        InputError,
        match=r"1\.safetensors: no adapter_config.json in .*flat checkpoints need the one",
    ):
        opened(tmp_path)
    write(tmp_path / "birds" / "step_4", lora(4))
    with pytest.raises(
        InputError, match=r"birds holds both 1 adapter folders and 1 flat files \(1.safetensors"
    ):
        opened(tmp_path)


# --- One layout, one scale
# --------------------------------------------------------------------------------------------------


def test_any_subset_of_modules(tmp_path):
    some = {key: shape for key, shape in SHAPES.items() if "v_proj" in key or "down_proj" in key}
    for name in NAMES:
        for step in (1, 2):
            write(
                tmp_path / name / str(step),
                lora(step, some),
                target_modules=["v_proj", "down_proj"],
            )
    found = opened(tmp_path)
    assert found.adapter.targets == ("down_proj", "v_proj")
    assert [m.split(".")[-1] for m in found.layout.modules] == ["v_proj", "down_proj"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    ],
    ids=["pattern", "layers", "exclusion"],
)
def test_a_choice_of_layers_is_exported_as_whole_paths(changes, tmp_path):
    """PEFT attaches what we write to exactly the modules that it came from."""
    base = write_qwen(tmp_path / "base")
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(r=2, **changes)
    )
    attached = {name for name in peft.state_dict() if "lora_" in name}
    peft.save_pretrained(tmp_path / "a")
    tensors, config = load_adapter(tmp_path / "a"), load_adapter_config(tmp_path / "a")
    assert set(config.targets) == set(LoraLayout.from_tensors(tensors).modules)
    save_adapter(tmp_path / "b", tensors, config)
    again = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig.from_pretrained(tmp_path / "b"),
    )
    assert {name for name in again.state_dict() if "lora_" in name} == attached


def test_scales_are_folded(tmp_path):
    """rsLoRA into alpha, an alpha of a module's own into its B: the change of every weight is
    PEFT's."""
    changes = {
        "use_rslora": True,
        "alpha_pattern": {"k_proj": 12, r"layers\.1\.mlp\.up_proj": 1, "proj": 99, "q_proj": 5},
    }
    folder = write(tmp_path / "a", lora(1), **changes)
    config, tensors = load_adapter_config(folder), load_adapter(folder)
    assert config.alpha == pytest.approx(4 * 2**0.5) and config.scale == pytest.approx(4 / 2**0.5)
    assert not config.to_peft()["use_rslora"]
    alphas = {
        "layers.0.self_attn.k_proj": 12,
        "layers.1.mlp.up_proj": 1,
        "layers.0.mlp.up_proj": 4,
        "layers.0.self_attn.q_proj": 5,
    }
    # PEFT's patterns match whole parts of a path: "proj" is none.
    for module, alpha in alphas.items():
        key = f"model.{module}.lora_B.weight"
        np.testing.assert_allclose(
            config.scale * tensors[key], alpha / 2**0.5 * lora(1)[key], rtol=1e-6, err_msg=module
        )


def test_rank_patterns_that_come_to_one_rank(tmp_path):
    folder = write(tmp_path / "a", lora(1), r=8, rank_pattern={r".*_proj": 2})
    assert load_adapter_config(folder).rank == 2 and load_adapter_config(folder).scale == 2.0


def test_mixed_ranks_are_listed(tmp_path):
    tensors = lora(1)
    for name in ("k_proj", "v_proj"):
        module = f"model.layers.1.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = (
            np.ones((3, 8)),
            np.ones((4, 3)),
        )
    folder = write(tmp_path / "a", tensors, rank_pattern={r"layers\.1\.self_attn\.(k|v)_proj": 3})
    with pytest.raises(InputError) as caught:
        load_adapter_config(folder)
    expected = (
        "most have 2: model.layers.1.self_attn.k_proj has 3; model.layers.1.self_attn.v_proj has 3"
    )
    assert str(caught.value) == f"{folder}: tokens need one rank for all modules; {expected}"
    folder = write(tmp_path / "b", tensors)
    with pytest.raises(
        InputError,
        match=r"not the settings of adapter_model.safetensors: .*k_proj has rank 3, the settings "
        r"say 2",
    ):
        load_adapter_config(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"peft_type": "OFT"},
        {"r": None},
        {"task_type": "CHAT"},
        {"task_type": ["CAUSAL_LM"]},
        {"rank_pattern": {"(": 1}, "alpha_pattern": {"(": 1}},
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused_by_name(changes, tmp_path):
    folder = write(tmp_path / "a", lora(1), **changes)
    with pytest.raises(InputError) as caught:
        load_adapter_config(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/adapter_config.json: ") and "\n" not in message
    assert next(iter(changes)) in message or "not a LoRA configuration" in message


def test_what_cannot_be_read_is_listed_beside_what_differs(tmp_path):
    root = write_all(tmp_path)
    write(root / "fish" / "checkpoint-2", lora(2), lora_alpha=8)
    cut = [root / "birds" / "checkpoint-1", root / "fish" / "checkpoint-1"]
    for folder in cut:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError) as caught:
        opened(root)
    message = str(caught.value)
    assert "checkpoint-2 has alpha" in message and "LoRAs that cannot be read: " in message
    assert all(f"{folder}/adapter_model.safetensors: " in message for folder in cut)


def test_a_mixed_collection_lists_what_differs(tmp_path):
    root = write_all(tmp_path)
    write(root / "fish" / "checkpoint-2", lora(2), lora_alpha=8)
    few = {key: value for key, value in lora(3).items() if "layers.1.mlp.up_proj" not in key}
    (
        few["model.layers.1.mlp.router.lora_A.weight"],
        few["model.layers.1.mlp.router.lora_B.weight"],
    ) = (
        np.ones((2, 8)),
        np.ones((8, 2)),
    )
    targets = [*settings()["target_modules"], "router"]
    write(root / "fish" / "checkpoint-10", few, target_modules=targets)
    wide = lora(4)
    wide["model.layers.0.mlp.up_proj.lora_A.weight"] = np.ones((2, 16))
    write(root / "birds" / "checkpoint-10", wide)
    write(root / "birds" / "checkpoint-11", lora(5, qwen_shapes(8, 4, 12, 2, 3)), r=3)
    with pytest.raises(InputError) as caught:
        opened(root)
    message = str(caught.value)
    assert message.startswith(
        f"checkpoints of another layout or scale than {root / 'birds/checkpoint-1'}: "
    )
    for part in (
        "fish/checkpoint-2 has alpha 8.0 instead of 4.0",
        "fish/checkpoint-10 has 2 tensors missing (model.layers.1.mlp.up_proj.lora_A.weight), 2 "
        "tensors more (model.layers.1.ml",
        "birds/checkpoint-10 has 1 tensors of another shape "
        "(model.layers.0.mlp.up_proj.lora_A.weight (2, 16) instead of (2, 8))",
        "birds/checkpoint-11 has rank 3 instead of 2",
    ):
        assert part in message, part
    assert "birds/checkpoint-2" not in message and "\n" not in message


def test_one_base_under_several_names(tmp_path, capsys):
    """A hub id, a quantised copy and a folder: the base that is given decides, with a note."""
    root = write_all(tmp_path)
    names = ("unsloth/base-bnb-4bit", str(tmp_path / "local"))
    for step, name in zip((1, 2), names, strict=True):
        path = root / "fish" / f"checkpoint-{step}"
        write(path, lora(100 + step), base_model_name_or_path=name)
    with pytest.raises(InputError, match=r"name several bases .*'org/base' in .*config.base.path="):
        opened(root)
    config = load_file("configs/mini.py")
    config.train.checkpoints, config.base.path = str(root), "org/base"
    suite = Suite("s", root, (), tuple(Dataset(name, (), ()) for name in NAMES), (), {}, "")
    assert Checkpoints(freeze(config), suite, tmp_path / "w").adapter.base == "org/base"
    said = capsys.readouterr().out
    assert said.startswith("note: the LoRA checkpoints' base is org/base; they name ")
    assert all(name in said for name in names)
    assert Checkpoints(freeze(config), suite, tmp_path, "me/mine").adapter.base == "me/mine"
    config.train.checkpoints = str(write_all(tmp_path / "elsewhere"))
    found = Checkpoints(freeze(config), suite, tmp_path / "w")
    assert found.adapter.base == "org/base" and not capsys.readouterr().out


# --- Streamed statistics and cached arrays
# -----------------------------------------------------------------------------------


def importance_of(tokens) -> np.ndarray:
    moments = Moments()
    for of_checkpoint in tokens:
        moments.add(of_checkpoint)
    return importance_weights(moments)


@given(st.integers(2, 7), st.integers(0, 2**32 - 1), st.booleans())
def test_streamed_statistics_equal_those_of_the_stack(count, seed, padded):
    """Importance weights and the element target's statistics against NumPy on the whole stack;
    blocks of one token and of all."""
    layout = LoraLayout.from_shapes(SHAPES, 3 if padded else None)
    sets = [{key: value + 3 for key, value in lora(seed % 1000 + i).items()} for i in range(count)]
    tokens = np.stack([layout.tokenize(s) for s in sets])
    std = tokens.astype(np.float64).std(axis=0)
    expected = np.nanmean(std, axis=(1, 2)) / np.nansum(std) * np.count_nonzero(~np.isnan(std))
    np.testing.assert_allclose(importance_of(tokens), expected, rtol=1e-6)

    chunks = np.stack([layout.cut(s) for s in sets]).astype(np.float64)
    reads = []
    target = ElementTarget.fit(
        layout, lambda: (reads.append(i) or (str(i), s) for i, s in enumerate(sets))
    )
    assert reads == list(range(count)), "one pass"
    np.testing.assert_allclose(target.mean, chunks.mean(axis=0), rtol=1e-6)
    square = np.nanmean((chunks - chunks.mean(axis=0)) ** 2, axis=(0, 2, 3))
    np.testing.assert_allclose(target.scale, np.sqrt(square), rtol=1e-6)


def test_blocks_do_not_matter(monkeypatch):
    from dnd_jax.lora import moments as lora_moments

    layout = LoraLayout.from_shapes(SHAPES)
    sets = [lora(i) for i in range(4)]

    def fitted():
        target = ElementTarget.fit(layout, lambda: ((str(i), s) for i, s in enumerate(sets)))
        return importance_of(layout.tokenize(s) for s in sets), target.mean, target.scale

    whole = fitted()
    monkeypatch.setattr(lora_moments, "BLOCK", 1)
    for one, other in zip(whole, fitted(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7)


@pytest.mark.parametrize("kind", ["chunk", "element"])
def test_cached_arrays_are_those_of_the_stack(kind, tmp_path):
    root = write_all(tmp_path / "loras")
    found, config = opened(root), load_file("configs/mini.py")
    config.generator.target = kind
    target = make_target(freeze(config), found, tmp_path / "cache")
    for name in NAMES:
        array = token_array(found, name, target, tmp_path / "cache")
        expected = np.stack([target.encode(tensors) for _, tensors in found.tensors(name)])
        assert isinstance(array.targets, np.memmap) and array.targets.dtype == np.float32
        np.testing.assert_array_equal(array.targets, expected)
        np.testing.assert_allclose(array.importance, importance_of(expected), rtol=1e-6)
        assert np.array_equal(
            np.load(next((tmp_path / "cache" / name).glob("*/tokens.npy"))), expected
        )
    again = make_target(freeze(config), opened(root), tmp_path / "cache")
    assert all(
        np.array_equal(again.statistics()[key], value) for key, value in target.statistics().items()
    )


def test_arrays_are_made_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    root, cache = write_all(tmp_path / "loras"), tmp_path / "cache"
    read = []
    monkeypatch.setattr(
        "dnd_jax.lora.checkpoints.load_adapter",
        lambda path: read.append(path) or load_adapter(path),
    )

    def made(**options) -> int:
        """Checkpoints read for birds, and that one array stands there afterwards."""
        read.clear()
        checkpoints = opened(root)
        target = ChunkTarget(checkpoints.layout, options.pop("bfloat16", False))
        array = token_array(checkpoints, "birds", target, cache, **options)
        np.testing.assert_array_equal(
            array.targets, np.stack([target.encode(t) for _, t in found_tensors(checkpoints)])
        )
        assert len(list((cache / "birds").iterdir())) == 1
        return len(read)

    def found_tensors(checkpoints):
        return ((str(path), load_adapter(path)) for path in checkpoints.folders["birds"])

    assert made() == 3 and made() == 0
    write(root / "fish" / "checkpoint-2", lora(77))
    assert made() == 0, "another dataset's files do not matter"
    write(root / "birds" / "checkpoint-2", lora(77))
    assert made() == 3 and made() == 0
    file = root / "birds" / "checkpoint-1" / "adapter_model.safetensors"
    os.utime(file, ns=(1, 1))
    assert made() == 0, "a copy with another time is the same"
    write(root / "birds" / "checkpoint-1", lora(2))
    os.utime(file, ns=(1, 1))
    assert made() == 3, "other contents of the same size and time are not"
    write(root / "birds" / "checkpoint-1", lora(1), alpha_pattern={"k_proj": 8})
    assert made() == 3, "its tensors are folded otherwise now"
    write(root / "birds" / "checkpoint-30", lora(30))
    assert made() == 4
    assert made(bfloat16=True) == 4
    assert made(importance=False) == 4 and made(importance=False) == 0


@pytest.mark.parametrize("name", [TOKENS, IMPORTANCE])
def test_arrays_that_a_power_cut_left_are_made_again(tmp_path, name, capsys):
    found, cache = opened(write_all(tmp_path / "loras")), tmp_path / "cache"
    target = ChunkTarget(found.layout)
    first = token_array(found, "birds", target, cache)
    values = np.array(first.targets), first.importance
    (path,) = cache.glob(f"birds/*/{name}")
    path.write_bytes(bytes(path.stat().st_size))
    array = token_array(found, "birds", target, cache)
    assert all(map(np.array_equal, (array.targets, array.importance), values))
    assert capsys.readouterr().out.count("made again") == 1
    token_array(found, "birds", target, cache)
    assert not capsys.readouterr().out and len(list((cache / "birds").iterdir())) == 1


def test_clean_up_of_arrays_touches_only_what_it_made(tmp_path):
    """Arrays of another key go; folders whose names begin alike, and what else is there, stay."""
    found, cache = opened(write_all(tmp_path / "loras")), tmp_path / "cache"
    target = ChunkTarget(found.layout)
    token_array(found, "birds", target, cache)
    (arrays,) = (cache / "birds").iterdir()
    other = arrays.rename(arrays.with_name("0" * 24))
    kept = ["base", "adapters", "collect", "0" * 23, "f" * 24]
    for name in kept:
        (cache / "birds" / name).mkdir()
    (cache / "birds" / ("f" * 24) / "diary").touch()
    (cache / "birds" / ("e" * 24)).symlink_to(tmp_path / "loras")
    token_array(found, "birds", target, cache)
    names = {path.name for path in (cache / "birds").iterdir()}
    assert names == {*kept, "e" * 24, arrays.name} and not other.exists()


@pytest.mark.parametrize("damage", ["zeros", "zeros inside", "truncated"])
def test_statistics_that_a_power_cut_left_are_made_again(tmp_path, damage, capsys):
    """And what only looks like them by its name stays."""
    found, cache = opened(write_all(tmp_path / "loras")), tmp_path / "cache"
    config = load_file("configs/mini.py")
    config.generator.target = "element"
    config = freeze(config)
    first = make_target(config, found, cache).statistics()
    (path,) = cache.glob("statistics-*")
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "zeros": bytes(len(content)),
            "zeros inside": content[:half] + bytes(32) + content[half + 32 :],
            "truncated": content[:half],
        }[damage]
    )
    (cache / "statistics-mine.safetensors").touch()
    capsys.readouterr()
    again = make_target(config, found, cache).statistics()
    assert all(np.array_equal(again[key], value) for key, value in first.items())
    assert capsys.readouterr().out.count("made again") == 1
    assert path.read_bytes() == content and (cache / "statistics-mine.safetensors").exists()


def test_a_bad_checkpoint_or_a_stop_leaves_no_array(tmp_path):
    root, cache = write_all(tmp_path / "loras"), tmp_path / "cache"
    tensors = lora(10)
    tensors["model.layers.0.mlp.up_proj.lora_A.weight"][0, 3] = np.nan
    write(root / "birds" / "checkpoint-10", tensors)
    found = opened(root)
    with pytest.raises(
        InputError,
        match=r"checkpoint-10 does not fit the LoRA layout: .*up_proj.lora_A.weight holds NaN",
    ):
        token_array(found, "birds", ChunkTarget(found.layout), cache)
    assert list((cache / "birds").iterdir()) == []
    found.folders["fish"] = found.folders["fish"][:1]
    with pytest.raises(InputError, match=r"at least two checkpoints a dataset, got 1 \(fish\)"):
        token_array(found, "fish", ChunkTarget(found.layout), cache)
    assert (
        token_array(found, "fish", ChunkTarget(found.layout), cache, importance=False).importance
        is None
    )
    with pytest.raises(InputError, match=r"are equal \(fish\)"):
        found.folders["fish"] = found.folders["fish"] * 2
        token_array(found, "fish", ChunkTarget(found.layout), cache)


@pytest.mark.parametrize("target", ["chunk", "element"])
def test_a_checkpoint_that_changes_nothing_is_none(tmp_path, target):
    """As PEFT saves a model whose LoRA it could not attach: A at random, B zero."""
    root, cache = write_all(tmp_path / "loras"), tmp_path / "cache"
    tensors = lora(10)
    tensors |= {key: value * 0 for key, value in tensors.items() if ".lora_B." in key}
    write(root / "birds" / "checkpoint-10", tensors)
    config = load_file("configs/mini.py")
    config.generator.target = target
    found = opened(root)
    with pytest.raises(InputError, match="checkpoint-10: every lora_B is zero, so it changes noth"):
        token_array(found, "birds", make_target(freeze(config), found, cache), cache)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None,
    reason="needs root to mount a small file system",
)
def test_a_disk_too_small_is_said_before_anything_is_read(tmp_path):
    found, disk = opened(write_all(tmp_path / "loras")), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        with pytest.raises(
            InputError,
            match="the tokens of birds need 0.0 GB, 0.0 GB are free; use another --workdir",
        ):
            token_array(found, "birds", ChunkTarget(found.layout), disk / "cache")
        assert list((disk / "cache" / "birds").iterdir()) == []
        encoder = PromptEncoder(condition_by(write_vectors(tmp_path)))
        message = (
            r"the states of 100 prompts need 0.0 GB, 0.0 GB are free; .* "
            r"--config.condition.in_graph=true, which keeps none"
        )
        with pytest.raises(InputError, match=message):
            encoder.cached(["the sea"] * 100, disk / "embeddings")
        assert list((disk / "embeddings").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


PREPARE = """
import pathlib, sys
from dnd_jax.costs.bench.case import peak_of_process
from dnd_jax.lora.checkpoints import token_array
from dnd_jax.lora.targets import ChunkTarget
sys.path.insert(0, "tests")
from lora_sets import opened
found = opened(pathlib.Path(sys.argv[1]))
cache = pathlib.Path(sys.argv[2])
print(token_array(found, "birds", ChunkTarget(found.layout), cache).targets.shape)
print(peak_of_process())
"""


@pytest.mark.slow
def test_a_7b_set_prepares_in_minutes_in_little_memory(tmp_path):
    """Ten adapters of 40M parameters in bfloat16; a set has 100, which takes ten times as long and
    not a byte more."""
    shapes, count = qwen_shapes(3584, 512, 18944, 28, 16), 10
    for name, steps in (("birds", range(count)), ("fish", range(1))):
        for step in steps:
            rng = np.random.default_rng(step)
            tensors = {
                k: (rng.standard_normal(s, np.float32) * 0.01).astype(ml_dtypes.bfloat16)
                for k, s in shapes.items()
            }
            write(tmp_path / "loras" / name / str(step), tensors, r=16, lora_alpha=32)
    assert sum(np.prod(s) for s in shapes.values()) == 40_370_176
    started = time.perf_counter()
    command = [sys.executable, "-c", PREPARE, tmp_path / "loras", tmp_path / "cache"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    shape, peak_bytes = done.stdout.splitlines()
    # GiB, of that process alone: other tests' children may have held more.
    peak = int(peak_bytes) / 2**30
    assert shape == "(10, 4928, 18, 514)"
    print(f"\n{count} adapters of 40.4M parameters: {seconds:.1f} s, {peak:.2f} GiB at most")
    assert peak < 4 and seconds / count < 12  # a set in 20 minutes beside other tests
