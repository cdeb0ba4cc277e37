"""Released generators: every version becomes an ordinary generator folder, generates, trains on and
goes back bit for bit."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from pipeline import TINY, dnd, tiny_suite
from safetensors.numpy import load_file, save_file
from small_models import write_encoder, write_qwen

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.core.errors import InputError
from dnd_jax.costs.bench import torch_generator
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.folder import initial_params, read_description
from dnd_jax.generator.state_dict import read_state_dict
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.lora.adapter import load_adapter, save_adapter
from dnd_jax.lora.layout import MODULE_ORDER
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.main import main

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KINDS = ("camera_ready", "first_release", "no_projection")
STAGE = "model.decoder.module_list.{}."


def state_of(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def golden_shapes() -> dict[str, tuple[int, int]]:
    """A LoRA with the golden generators' 9 tokens: rank 3, chunks of 5."""
    shapes = {}
    for name, d_out in (("q_proj", 5), ("k_proj", 10), ("v_proj", 15)):
        module = f"model.layers.0.self_attn.{name}"
        shapes[f"{module}.lora_A.weight"], shapes[f"{module}.lora_B.weight"] = (3, 5), (d_out, 3)
    return shapes


def write_adapter(
    folder, shapes, rank: int, base: str = "some/base", seed: int = 0
) -> pathlib.Path:
    rng = np.random.default_rng(seed)
    tensors = {
        key: rng.normal(size=shape).astype(np.float32) * 0.1 for key, shape in shapes.items()
    }
    targets = tuple(sorted({key.split(".")[-3] for key in shapes}))
    return save_adapter(folder, tensors, AdapterConfig(base, rank, 2.0 * rank, targets))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """adapter/ with the golden generators' layout, encoder/ of their width, and base/, a real
    Qwen2."""
    root = tmp_path_factory.mktemp("folders")
    write_adapter(root / "adapter", golden_shapes(), 3)
    write_encoder(root / "encoder")
    write_qwen(root / "base")
    return root


def import_it(folders, path, out, projection: str = "", *options: str) -> int:
    chosen = [f"--config.generator.length_projection={projection}"] if projection else []
    if not any("condition.encoder" in option for option in options):
        chosen.append(f"--config.condition.encoder={folders / 'encoder'}")
    return main(["import-generator", str(path), f"--out={out}", *chosen, *map(str, options)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_released_version_and_back(kind, folders, tmp_path):
    path, setting = (
        GOLDEN / f"generator_{kind}.pth",
        json.loads((GOLDEN / f"generator_{kind}.json").read_text()),
    )
    projection = setting["length_projection"] or ""
    assert (
        import_it(folders, path, tmp_path / "g", projection, f"--adapter={folders / 'adapter'}")
        == 0
    )
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == [
        "generator.json",
        "model.safetensors",
        "statistics.safetensors",
    ]

    generator = TrainedGenerator(tmp_path / "g")
    assert [list(f) for f in generator.module.spec.features] == setting["features"]
    assert (
        generator.module.spec.kernel_size == setting["kernel_size"]
        and generator.layout.num_tokens == 9
    )
    assert generator.condition.num_prompts == 4
    assert generator.condition.max_text_length == (setting["max_text_length"] if projection else 10)
    with np.load(GOLDEN / f"generator_{kind}.npz") as golden:
        for condition, expected in zip(golden["condition"], golden["output"], strict=True):
            np.testing.assert_allclose(
                generator.tokens(condition), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
            )

    assert main(["export-generator", str(tmp_path / "g"), f"--out={tmp_path / 'back.pth'}"]) == 0
    assert (
        import_it(
            folders,
            tmp_path / "back.pth",
            tmp_path / "h",
            projection,
            f"--adapter={folders / 'adapter'}",
        )
        == 0
    )
    assert main(["export-generator", str(tmp_path / "h"), f"--out={tmp_path / 'again.pth'}"]) == 0
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()
    before, after = state_of(path), state_of(tmp_path / "back.pth")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and after[key].shape == value.shape, key
        assert after[key].numpy().tobytes() == value.numpy().tobytes(), key


def test_bfloat16_weights_keep_their_bits(folders, tmp_path):
    half = {
        key: value.to(torch.bfloat16)
        for key, value in state_of(GOLDEN / "generator_no_projection.pth").items()
    }
    half["criterion_weight"] = half["criterion_weight"].float()
    torch.save(half, tmp_path / "half.pth")
    assert (
        import_it(
            folders, tmp_path / "half.pth", tmp_path / "g", "", f"--adapter={folders / 'adapter'}"
        )
        == 0
    )
    assert main(["export-generator", str(tmp_path / "g"), f"--out={tmp_path / 'back.pth'}"]) == 0
    after = state_of(tmp_path / "back.pth")
    assert all(
        after[k].dtype == v.dtype and torch.equal(after[k].view(torch.uint8), v.view(torch.uint8))
        for k, v in half.items()
    )
    assert np.isfinite(
        TrainedGenerator(tmp_path / "g").tokens(np.ones((4, 10, 8), np.float32))
    ).all()


def test_a_file_before_pytorch_1_6(folders, tmp_path):
    """That format cannot be mapped into memory."""
    torch.save(
        state_of(GOLDEN / "generator_no_projection.pth"),
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    assert (
        import_it(
            folders, tmp_path / "old.pth", tmp_path / "g", "", f"--adapter={folders / 'adapter'}"
        )
        == 0
    )


@pytest.mark.parametrize("by_adapter", [False, True])
def test_a_relative_path_of_the_base_is_made_absolute(folders, tmp_path, monkeypatch, by_adapter):
    """Elsewhere it would read as a hub id."""
    shapes = load_base_config(folders / "base").lora_shapes(2, MODULE_ORDER)
    write_adapter(tmp_path / "adapter", shapes, 2, "base")
    torch.manual_seed(0)
    model = torch_generator.Generator([(4, 6, 8), (16, 6, 8), (2 * 29, 4, 10)], 3)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    monkeypatch.chdir(folders)
    how = ("--config.base.path=base", "--config.lora.rank=2", "--config.lora.alpha=4")
    how = (f"--adapter={tmp_path / 'adapter'}",) if by_adapter else how
    assert import_it(folders, tmp_path / "x.pth", tmp_path / "g", "", *how) == 0
    assert read_description(tmp_path / "g").adapter.base == str((folders / "base").resolve())


def test_layout_from_the_base_alone_then_generate(folders, tmp_path):
    """No adapter of the base at hand: its config.json, the rank and the modules give the same
    layout; PEFT reads what comes out."""
    shapes = load_base_config(folders / "base").lora_shapes(2, MODULE_ORDER)
    write_adapter(tmp_path / "adapter", shapes, 2, str(folders / "base"))
    torch.manual_seed(0)
    # A layer's chunks of 8, A's and B's: q 2+2, k 2+1, v 2+1, o 2+2, up and gate 2+3 each, down
    # 3+2.
    features = [(4, 6, 8), (16, 6, 8), (2 * 29, 4, 10)]
    model = torch_generator.Generator(features, 3)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    base = f"--config.base.path={folders / 'base'}"
    lora = ("--config.lora.rank=2", "--config.lora.alpha=4")
    assert import_it(folders, tmp_path / "x.pth", tmp_path / "g", "", base, *lora) == 0
    assert (
        import_it(
            folders, tmp_path / "x.pth", tmp_path / "h", "", f"--adapter={tmp_path / 'adapter'}"
        )
        == 0
    )
    one, two = (TrainedGenerator(tmp_path / name) for name in "gh")
    assert one.layout == two.layout and one.adapter == two.adapter
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("where is the bird ?\nwho is six ?\nwhat is ten ?\nwhere is one ?\n")
    assert (
        main(
            [
                "generate",
                f"--generator={tmp_path / 'g'}",
                f"--prompts={prompts}",
                f"--out={tmp_path / 'made'}",
            ]
        )
        == 0
    )
    with torch.inference_mode():
        condition = torch.from_numpy(one.encoder.encode(prompts.read_text().splitlines()))[None]
        expected = one.layout.detokenize(model(condition)[0].numpy())
    for key, value in load_adapter(tmp_path / "made").items():
        np.testing.assert_allclose(value, expected[key], atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_training_starts_from_it(folders, tmp_path):
    """Adam's first step moves a parameter by the learning rate at most (and weight decay), so one
    step ends near the released weights, and a little off them."""
    suite = tiny_suite(tmp_path / "towns")
    for i, dataset in enumerate(load_suite(suite).train):
        for step in (1, 2):
            write_adapter(
                tmp_path / "loras" / dataset.name / f"step_{step}",
                golden_shapes(),
                3,
                seed=10 * i + step,
            )
    path = GOLDEN / "generator_no_projection.pth"
    assert import_it(folders, path, tmp_path / "g", "", f"--adapter={folders / 'adapter'}") == 0
    options = (
        f"suite={suite}",
        f"workdir={tmp_path / 'w'}",
        f"config.condition.encoder={folders / 'encoder'}",
        "config.condition.max_text_length=10",
        "config.generator.target=chunk",
        "config.generator.convolution=direct",
        "config.generator.features=((0,0,0),(6,8,8),(0,0,0))",
        f"config.train.checkpoints={tmp_path / 'loras'}",
        f"config.train.init_from={tmp_path / 'g'}",
        "config.train.learning_rate=1e-4",
        "config.train.steps=1",
    )
    done = dnd("train", TINY, *(f"--{option}" for option in options))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"starting from the parameters of {tmp_path / 'g'}" in done.stdout
    released, trained = (
        load_file(tmp_path / p / "model.safetensors") for p in ("g", "w/generator")
    )
    assert released.keys() == trained.keys()
    for key, value in released.items():
        moved = np.abs(trained[key] - value).max()
        assert 0 < moved < 1.1e-4 * (1 + 0.1 * np.abs(value).max()), key
    assert main(["export-generator", str(tmp_path / "w"), f"--out={tmp_path / 'trained.pth'}"]) == 0
    assert state_of(tmp_path / "trained.pth").keys() == state_of(path).keys()


def test_init_from_is_sharded_and_refuses_another_generator(folders, tmp_path):
    path = GOLDEN / "generator_camera_ready.pth"
    assert (
        import_it(folders, path, tmp_path / "g", "camera_ready", f"--adapter={folders / 'adapter'}")
        == 0
    )
    generator = TrainedGenerator(tmp_path / "g")
    settings = json.loads((tmp_path / "g" / "generator.json").read_text())["settings"]["generator"]
    shapes = jax.eval_shape(
        generator.module.init, jax.random.key(0), np.zeros((1, 4, 24, 8), np.float32)
    )["params"]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    # The channels that go in: 8 of stage 0's width convolutions.

    def sharding(keys, leaf) -> NamedSharding:
        conv1w = "stage_0/conv1w" in "/".join(k.key for k in keys)
        return NamedSharding(mesh, PartitionSpec(None, None, "fsdp") if conv1w else PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, shapes)
    params = initial_params(tmp_path / "g", shapes, shardings, settings)
    flat = {"/".join(k.key for k in keys): x for keys, x in jax.tree.leaves_with_path(params)}
    stored = load_file(tmp_path / "g" / "model.safetensors")
    assert flat.keys() == stored.keys()
    assert all(np.array_equal(np.asarray(flat[key]), value) for key, value in stored.items())
    assert flat["decoder/stage_0/conv1w"].addressable_shards[0].data.shape == (3, 3, 1, 8)

    with pytest.raises(
        InputError,
        match="config.generator.length_projection is 'first_release', there it is 'camera_ready'",
    ):
        initial_params(
            tmp_path / "g", shapes, shardings, settings | {"length_projection": "first_release"}
        )
    shapes["decoder"]["stage_1"]["bias"] = jax.ShapeDtypeStruct((5, 8), np.float32)
    shapes["decoder"]["stage_9"] = {"bias": jax.ShapeDtypeStruct((5, 8), np.float32)}
    del shapes["length_projection"]
    with pytest.raises(InputError) as caught:
        initial_params(tmp_path / "g", shapes, shardings, settings)
    message = str(caught.value)
    assert message.startswith(
        f"config.train.init_from = {tmp_path / 'g'}: not a generator of this configuration"
    )
    assert "decoder/stage_1/bias has shape (5, 7), here it is (5, 8)" in message
    assert (
        "decoder/stage_9/bias is missing" in message
        and "length_projection/down/kernel is unknown" in message
    )
    weights = tmp_path / "g" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="copy it again"):
        initial_params(tmp_path / "g", shapes, shardings, settings)


def without(*keys: str):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


IMPORT_FAULTS = {
    "which version": (
        "camera_ready",
        None,
        "",
        "say which: --config.generator.length_projection=camera_ready or first_release",
    ),
    "no projection there": ("no_projection", None, "camera_ready", "holds no length projection"),
    "not a generator": (
        "no_projection",
        lambda s: {"x.weight": torch.ones(2)},
        "",
        "holds no decoder stage",
    ),
    "half a stage": (
        "no_projection",
        without(STAGE.format(0) + "linear1.bias"),
        "",
        "linear1.bias is missing",
    ),
    "stage in the middle": (
        "no_projection",
        lambda s: {k.replace("list.0", "list.3"): v for k, v in s.items()},
        "",
        f"{STAGE.format(0)}linear1.bias is missing",
    ),
    "another tensor": (
        "no_projection",
        lambda s: s | {"encoder.weight": torch.ones(2)},
        "",
        "encoder.weight is unknown",
    ),
    "another size": (
        "no_projection",
        lambda s: s | {STAGE.format(1) + "linear1.conv2w.weight": torch.ones(7, 9, 3, 3)},
        "",
        "conv2w.weight has shape (7, 9, 3, 3), which does not fit",
    ),
    "no kernel": (
        "no_projection",
        lambda s: s | {STAGE.format(1) + "linear2.weight": torch.ones(9)},
        "",
        "number of dimensions",
    ),
    "whole numbers": (
        "no_projection",
        lambda s: s | {STAGE.format(1) + "linear2.bias": torch.ones(9, dtype=torch.int32)},
        "",
        "linear2.bias holds int32, expected floating point",
    ),
    "keys that are numbers": (
        "no_projection",
        lambda s: {0: torch.ones(2)},
        "",
        "expected a flat dictionary of tensors by name",
    ),
    "float8": (
        "no_projection",
        lambda s: {key: value.to(torch.float8_e4m3fn) for key, value in s.items()},
        "",
        "is stored as float8_e4m3fn, strided; save it as dense",
    ),
    "sparse": (
        "no_projection",
        lambda s: s | {STAGE.format(1) + "linear2.bias": torch.ones(9).to_sparse()},
        "",
        "linear2.bias is stored as float32, sparse_coo; save it as dense",
    ),
    "even kernels": (
        "no_projection",
        lambda s: s | {STAGE.format(0) + "linear1.conv1w.weight": torch.ones(8, 8, 4, 4)},
        "",
        "kernels of 4 x 4; only odd ones are known",
    ),
    "weights of other tokens": (
        "no_projection",
        lambda s: s | {"criterion_weight": torch.ones(1, 8, 1, 1)},
        "",
        "criterion_weight has 8 values for 9 tokens",
    ),
}


@pytest.mark.parametrize("name", IMPORT_FAULTS)
def test_import_faults_are_one_line(name, folders, tmp_path, capsys):
    kind, change, projection, expected = IMPORT_FAULTS[name]
    path = GOLDEN / f"generator_{kind}.pth"
    if change:
        torch.save(change(state_of(path)), tmp_path / "x.pth")
        path = tmp_path / "x.pth"
    assert (
        import_it(folders, path, tmp_path / "g", projection, f"--adapter={folders / 'adapter'}")
        == 2
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"dnd: {path}") and expected in lines[0], lines
    assert not (tmp_path / "g").exists()


def test_import_that_does_not_fit_its_surroundings(folders, tmp_path, capsys):
    path, out = GOLDEN / "generator_no_projection.pth", tmp_path / "g"

    def refused(*options: str) -> str:
        assert import_it(folders, path, out, "", *options) == 2
        return capsys.readouterr().err

    small = {key: shape for key, shape in golden_shapes().items() if "v_proj" not in key}
    write_adapter(tmp_path / "small", small, 3)
    assert (
        "has 5 tokens of (5, 7), the generator makes 9 of (5, 7) (rank 3, chunks of 5)"
        in refused(f"--adapter={tmp_path / 'small'}")
    )
    base = f"--config.base.path={folders / 'base'}"
    assert "with rank 8 on q_proj" in refused(base)
    assert "neither a folder here nor reachable" in refused("--config.base.path=nobody/nothing")
    write_encoder(tmp_path / "wide", 12)
    options = (
        f"--adapter={folders / 'adapter'}",
        f"--config.condition.encoder={tmp_path / 'wide'}",
    )
    assert "embeddings are 12 wide, the generator takes 8" in refused(*options)
    assert not out.exists()
    assert import_it(folders, path, out, "", f"--adapter={folders / 'adapter'}") == 0
    assert "already holds a generator" in refused(f"--adapter={folders / 'adapter'}")
    assert (
        main(["import-generator", str(path)]) == 2 and "--out is needed" in capsys.readouterr().err
    )
    assert (
        main(["import-generator", f"--out={out}"]) == 2
        and "dnd import-generator X.pth" in capsys.readouterr().err
    )


def test_an_element_target_has_no_place_in_the_original(tmp_path, capsys):
    shutil.copytree(GOLDEN / "cfc09d1" / "run" / "generator", tmp_path / "g")
    assert main(["export-generator", str(tmp_path / "g"), f"--out={tmp_path / 'x.pth'}"]) == 2
    assert (
        "knows only chunk tokens" in capsys.readouterr().err and not (tmp_path / "x.pth").exists()
    )
    shutil.rmtree(tmp_path / "g")
    assert main(["export-generator", str(tmp_path / "g"), f"--out={tmp_path / 'x.pth'}"]) == 2
    assert "no trained generator" in capsys.readouterr().err


def _without(section: str, key: str):
    return lambda d: {
        **d,
        "settings": {
            **d["settings"],
            section: {k: v for k, v in d["settings"][section].items() if k != key},
        },
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: {}, "no settings, layout, adapter in it"),
        (lambda d: [], "not a JSON object; copy the file again"),
        (lambda d: {**d, "settings": {}}, "no condition, generator, train in it"),
        (
            _without("generator", "bfloat16_checkpoints"),
            "generator.bfloat16_checkpoints is missing); train or import it again",
        ),
        (_without("train", "dtype"), "'dtype' is missing"),
        (lambda d: {**d, "layout": {}}, "'matrices' is missing"),
        (lambda d: {**d, "features": 3}, "not a generator of this version"),
        (
            lambda d: {**d, "adapter": {**d["adapter"], "rank": "two"}},
            "adapter.rank = 'two' should be int",
        ),
    ],
)
def test_descriptions_with_faults(change, expected, folders, tmp_path, capsys):
    """By every reader of a generator folder but training's, which compares settings of any
    version."""
    folder, prompts = tmp_path / "g", tmp_path / "p.txt"
    prompts.write_text("one\ntwo\nthree\nfour\n")
    assert (
        import_it(
            folders,
            GOLDEN / "generator_no_projection.pth",
            folder,
            "",
            f"--adapter={folders / 'adapter'}",
        )
        == 0
    )
    description = json.loads((folder / "generator.json").read_text())
    (folder / "generator.json").write_text(json.dumps(change(description)))
    capsys.readouterr()
    for command in (
        ("export-generator", str(folder), f"--out={tmp_path / 'out'}"),
        ("generate", f"--generator={folder}", f"--prompts={prompts}", f"--out={tmp_path / 'out'}"),
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"dnd: {folder / 'generator.json'}: ") and expected in line
    with pytest.raises(InputError, match="generator.json"):
        initial_params(folder, {}, {}, description["settings"]["generator"])
    assert not (tmp_path / "out").exists()


def test_streamed_safetensors_are_what_the_library_writes(tmp_path):
    """The same file, byte for byte in its data, read by safetensors itself."""
    import ml_dtypes

    from dnd_jax.core.tensors import open_tensors, write_tensors

    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b/c": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "d": np.float32(2.5).reshape(()),
        "e": np.zeros((0, 4), np.float16),
        "f": rng.normal(size=(4, 6)).T,  # float64, not contiguous
    }
    write_tensors(
        tmp_path / "x",
        {key: (v.shape, v.dtype) for key, v in tensors.items()},
        tensors.items(),
        {"format": "pt"},
    )
    save_file({key: np.array(v, order="C") for key, v in tensors.items()}, tmp_path / "y")
    ours, theirs = load_file(tmp_path / "x"), load_file(tmp_path / "y")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape, ours[key].tobytes()) == (
            value.dtype,
            value.shape,
            value.tobytes(),
        ), key
    opened = open_tensors(tmp_path / "x", "r+")
    opened["a"][1] = 7
    opened["a"].flush()
    assert (load_file(tmp_path / "x")["a"][1] == 7).all() and np.array_equal(
        load_file(tmp_path / "x")["f"], tensors["f"]
    )
    with pytest.raises(ValueError, match="read-only"):
        open_tensors(tmp_path / "x")["a"][1] = 8
    for damaged in (b"", b"\xff" * 30, (tmp_path / "x").read_bytes()[:-3]):
        (tmp_path / "w").write_bytes(damaged)
        with pytest.raises(InputError, match="copy it again"):
            open_tensors(tmp_path / "w")
    with pytest.raises(ValueError, match="announced a"):
        write_tensors(
            tmp_path / "z", {"a": ((2,), np.dtype(np.float32))}, [("a", np.ones(3, np.float32))]
        )


def test_damaged_tensors_are_not_taken(tmp_path):
    """A flipped bit in a tensor's bytes: PyTorch loads it without a word."""
    path = tmp_path / "x.pth"
    data = bytearray((GOLDEN / "generator_no_projection.pth").read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(InputError, match="is damaged; copy the file again"):
        read_state_dict(path)


def test_pickled_code_is_not_advised(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.zeros(2), "model": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(InputError, match=r"save its state_dict\(\) alone") as refused:
        read_state_dict(path)
    assert "weights_only" not in str(refused.value)
