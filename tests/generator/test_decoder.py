"""The decoder and the generator: the original's numbers, our PyTorch reading of the method, weights
both ways, the cost tables."""

import dataclasses
import json
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paper import SETTINGS

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.costs.bench import torch_generator
from dnd_jax.generator.decoder import weighted_loss
from dnd_jax.generator.model import Generator
from dnd_jax.generator.released import (
    load_reference_generator,
    save_reference_generator,
)
from dnd_jax.generator.sizes import spec_of
from dnd_jax.generator.spec import DecoderSpec

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5
PREFIX = "model.decoder.module_list."
KINDS = ("camera_ready", "first_release", "no_projection")


def golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return json.loads((GOLDEN / f"{name}.json").read_text()), dict(arrays)


def write_state(path: pathlib.Path, state: dict) -> pathlib.Path:
    torch.save({key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}, path)
    return path


def read_state(path: pathlib.Path) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in torch.load(path, weights_only=True).items()}


def loss_and_gradients(module, params, condition, target, weight, folder: pathlib.Path):
    """(output, loss, {PyTorch name: gradient in PyTorch's layout}, gradient of the condition)."""

    def objective(params, condition):
        output = module.apply({"params": params}, condition)
        return weighted_loss(output, target, weight), output

    (loss, output), (gradient, by_condition) = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(params, condition)
    path = save_reference_generator(
        module, jax.device_get(gradient), folder / "gradient.pth", weight
    )
    named = {key: value for key, value in read_state(path).items() if key != "criterion_weight"}
    return np.asarray(output), float(loss), named, np.asarray(by_condition)


def assert_gradients_agree(actual: dict, expected: dict, tolerance: float = TOLERANCE):
    """Each array relative to its own largest value; one that should be zero (the bias before a
    LayerNorm: a constant over (L, C) changes nothing) is rounding noise and compared with the
    largest gradient of all."""
    assert actual.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    for name, value in expected.items():
        own = np.abs(value).max()
        scale = own if own > 1e-5 * largest else largest
        assert np.abs(actual[name] - value).max() <= tolerance * scale, name


@pytest.mark.parametrize("convolution", ["direct", "dft", "auto"])
@pytest.mark.parametrize("name", ["decoder_small", "decoder_even_dims"])
def test_golden_decoder(name, convolution, tmp_path):
    setting, arrays = golden(name)
    features, weight = setting["features"], arrays["criterion_weight"]
    for kind in ("param", "grad"):
        found = {
            k.removeprefix(f"{kind}/layers."): v
            for k, v in arrays.items()
            if k.startswith(f"{kind}/")
        }
        setting[kind] = {PREFIX + key: value for key, value in found.items()}
    assert len(setting["grad"]) == 9 * (len(features) - 1)
    module, params = load_reference_generator(
        write_state(tmp_path / "g.pth", setting["param"]), features, setting["kernel_size"]
    )
    module = Generator(dataclasses.replace(module.spec, convolution=convolution))
    target = np.where(arrays["mask"], arrays["target"], np.nan)
    output, loss, gradients, by_condition = loss_and_gradients(
        module, params, arrays["input"], target, weight, tmp_path
    )

    np.testing.assert_allclose(
        output, arrays["output"], rtol=0, atol=TOLERANCE * np.abs(arrays["output"]).max()
    )
    assert loss == pytest.approx(float(arrays["loss"]), rel=TOLERANCE)
    assert_gradients_agree(
        {**gradients, "input": by_condition}, {**setting["grad"], "input": arrays["grad_input"]}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_golden_generator_in_both_directions(kind, tmp_path):
    setting, arrays = golden(f"generator_{kind}")
    path = GOLDEN / f"generator_{kind}.pth"
    args = (
        setting["features"],
        setting["kernel_size"],
        setting["length_projection"],
        setting["max_text_length"],
    )
    module, params = load_reference_generator(path, *args)
    output = module.apply({"params": params}, arrays["condition"])
    np.testing.assert_allclose(
        output, arrays["output"], rtol=0, atol=TOLERANCE * np.abs(arrays["output"]).max()
    )

    written = save_reference_generator(
        module, params, tmp_path / "out.pth", read_state(path)["criterion_weight"]
    )
    before, after = read_state(path), read_state(written)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and after[key].shape == value.shape, key
        assert after[key].tobytes() == value.tobytes(), key

    theirs = torch_generator.Generator(*args)
    theirs.load_state_dict(torch.load(written, weights_only=True))
    with torch.inference_mode():
        reread = theirs(torch.from_numpy(arrays["condition"])).numpy()
    np.testing.assert_allclose(
        reread, arrays["output"], rtol=0, atol=TOLERANCE * np.abs(arrays["output"]).max()
    )


@st.composite
def decoders(draw) -> tuple[list[tuple[int, int, int]], int]:
    """Stages of different sizes in every axis; now and then one repeats, which makes it
    residual."""
    size = st.integers(1, 7)
    features = [draw(st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7)))]
    for _ in range(draw(st.integers(1, 3))):
        features.append(features[-1] if draw(st.booleans()) else draw(st.tuples(size, size, size)))
    return features, draw(st.sampled_from([1, 3, 5]))


@pytest.mark.slow
@settings(max_examples=8)
@given(
    decoders(), st.sampled_from([None, "camera_ready", "first_release"]), st.integers(0, 2**32 - 1)
)
def test_agrees_with_the_torch_reference(decoder, projection, seed):
    features, kernel_size = decoder
    if any(length * c == 1 for _, length, c in features[:-1]):
        # A LayerNorm over one cell has no defined gradient.
        features = [(n, length + 1, c) for n, length, c in features]
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    n, length, c = features[0]
    text_length = 9 if projection else length
    reference = torch_generator.Generator(features, kernel_size, projection, text_length)
    with torch.no_grad():
        # 1 and 0 would hide a swapped scale and bias.
        for name, value in reference.named_parameters():
            if "norm" in name:
                value.add_(torch.from_numpy(rng.normal(size=value.shape) * 0.3))
        reference.criterion_weight.copy_(
            torch.from_numpy(rng.uniform(0.5, 2, (1, features[-1][0], 1, 1)))
        )
    condition = rng.normal(size=(2, n, text_length, c)).astype(np.float32)
    target = rng.normal(size=(2, *features[-1])).astype(np.float32)
    target[rng.random(target.shape) < 0.2] = np.nan
    target.flat[0] = 0.5

    theirs = torch.from_numpy(condition).requires_grad_()
    expected = reference(theirs)
    loss = torch_generator.weighted_loss(
        expected, torch.from_numpy(target), reference.criterion_weight
    )
    loss.backward()
    expected_gradients = {
        name: value.grad.numpy() for name, value in reference.named_parameters()
    } | {"input": theirs.grad.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "generator.pth")
        torch.save(reference.state_dict(), path)
        module, params = load_reference_generator(
            path, features, kernel_size, projection, text_length
        )
        weight = read_state(path)["criterion_weight"].reshape(-1)
        output, our_loss, gradients, by_condition = loss_and_gradients(
            module, params, condition, target, weight, pathlib.Path(folder)
        )
    expected = expected.detach().numpy()
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert our_loss == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_agree({**gradients, "input": by_condition}, expected_gradients, tolerance=1e-4)


def test_initialisation_has_the_bounds_of_pytorch():
    """The same uniform distributions as PyTorch's defaults: compared by their spread, over the
    sizes of a real stage."""
    features, k = ((6, 20, 24), (10, 16, 30)), 3
    module = Generator(DecoderSpec(features, k, "camera_ready", 40))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 6, 40, 24)))["params"]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "init.pth")
        ours = read_state(save_reference_generator(module, params, path, np.ones(10)))
    torch.manual_seed(0)
    theirs = {
        n: v.detach().numpy()
        for n, v in torch_generator.Generator(features, k, "camera_ready", 40).named_parameters()
    }
    for name, value in theirs.items():
        bound = np.abs(value).max()
        assert np.abs(ours[name]).max() == pytest.approx(
            bound, rel=0.25 if value.size < 50 else 0.1
        ), name
        if value.size > 200:
            assert ours[name].std() == pytest.approx(value.std(), rel=0.1, abs=1e-9), name


class Rogue:
    """Unpickling it writes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.write_text, (self.path, "code ran")


@pytest.fixture
def load(tmp_path):
    """Writes a .pth file (bytes, or what torch.save takes) and loads it as the golden camera_ready
    generator."""
    setting, _ = golden("generator_camera_ready")

    def load(content, **changes):
        path = tmp_path / "g.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        arguments = {
            key: setting[key]
            for key in ("features", "kernel_size", "length_projection", "max_text_length")
        } | changes
        return load_reference_generator(path, **arguments)

    return load


def test_every_tensor_that_does_not_fit_in_one_error(load, tmp_path):
    state = torch.load(GOLDEN / "generator_camera_ready.pth", weights_only=True)
    load(state)  # the untouched file loads
    bad = {
        **state,
        "extra.weight": torch.ones(2),
        f"{PREFIX}0.linear2.weight": torch.ones(6, 4, 3, 5),
        "gate_proj.bias": torch.ones(3),
    }
    del bad["down_proj.bias"], bad[f"{PREFIX}1.linear1.conv1w.weight"]
    with pytest.raises(InputError) as caught:
        load(bad)
    message = str(caught.value)
    for fault in (
        "down_proj.bias is missing",
        f"{PREFIX}1.linear1.conv1w.weight is missing",
        "extra.weight is unknown",
        f"{PREFIX}0.linear2.weight has shape (6, 4, 3, 5)",
        "gate_proj.bias has shape (3,)",
    ):
        assert fault in message, fault
    assert message.startswith(str(tmp_path / "g.pth")) and "\n" not in message


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"length_projection": None}, "down_proj.weight is unknown"),
        ({"length_projection": "cameraready"}, "is none of"),
        ({"max_text_length": None}, "max_text_length is needed"),
        ({"kernel_size": 5}, "kernel 5"),
    ],
)
def test_other_settings_than_the_files_are_refused(load, changes, match):
    with pytest.raises(InputError, match=match):
        load(torch.load(GOLDEN / "generator_camera_ready.pth", weights_only=True), **changes)


WHOLE = (GOLDEN / "generator_camera_ready.pth").read_bytes()
UNREADABLE = {
    "empty": b"",
    "text": b"not a checkpoint",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "header only": WHOLE[:4],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_one_clear_error(load, name):
    wanted = "not a state dict that can be read|holds more than tensors, or is damaged"
    with pytest.raises(InputError, match=wanted) as caught:
        load(UNREADABLE[name])
    assert "\n" not in str(caught.value)


def test_code_in_a_pickle_is_refused(load, tmp_path):
    torch.save(Rogue(tmp_path / "ran"), tmp_path / "rogue.pth")
    torch.load(tmp_path / "rogue.pth", weights_only=False)
    assert (tmp_path / "ran").read_text() == "code ran", "the trap works"
    (tmp_path / "ran").unlink()
    with pytest.raises(InputError, match="nothing pickled is run here"):
        load(Rogue(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_something_else_are_refused(load, tmp_path):
    for content in (
        [torch.ones(2)],
        {"epoch": 3, "names": ["down_proj.bias"]},
    ):
        with pytest.raises(InputError, match="flat dictionary of tensors"):
            load(content)
    with pytest.raises(InputError, match="no such file"):
        load_reference_generator(tmp_path / "absent.pth", [(2, 2, 2)] * 2, 3)


def test_criterion_weight_of_another_length_is_refused(tmp_path):
    setting, _ = golden("generator_no_projection")
    module, params = load_reference_generator(
        GOLDEN / "generator_no_projection.pth", setting["features"], 3
    )
    with pytest.raises(InputError, match="8 values, the generator 9 tokens"):
        save_reference_generator(module, params, tmp_path / "out.pth", np.ones(8))
    assert not list(tmp_path.iterdir())


# Of a dataset, after an epoch of 625 steps: docs/SETTINGS.md.
CHECKPOINTS = dict(zip(SETTINGS, (50, 80, 80, 100, 80, 100), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_sizes_and_cost_of_the_original_settings(name):
    millions, tera, tokens = SETTINGS[name]
    config = freeze(load_file(f"configs/{name}.py"))
    spec = spec_of(config)
    module = Generator(spec)
    assert spec.condition_shape[:2] == (
        config.condition.num_prompts,
        config.condition.max_text_length,
    )
    condition = jax.ShapeDtypeStruct((1, *spec.condition_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), condition)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["decoder"]))
        == spec.num_parameters
        == pytest.approx(millions * 1e6, abs=0.05e6)
    )
    assert jax.eval_shape(module.apply, variables, condition).shape == (1, *tokens)
    assert 2 * spec.forward_macs / 1e12 == pytest.approx(tera, abs=0.005)
    assert millions == pytest.approx(
        float(re.search(r"([0-9.]+)M parameters", config_text(name))[1])
    )
    assert "{} tokens of {} x {};".format(*tokens) in config_text(name)
    kept = int(re.search(r"projections,\s+(\d+) of", config_text(name))[1])
    assert (config.lora.checkpoints, config.lora.steps) == (
        kept,
        625 + kept,
    ) and kept == CHECKPOINTS[name]
    assert tera == pytest.approx(
        float(re.search(r"([0-9.]+) TFLOP a sample", config_text(name))[1])
    )


@pytest.mark.parametrize("name", ["mini", "real_text_small"])
def test_sizes_of_the_small_settings(name):
    """The generator's parameters and tokens as the docstring has them."""
    config, text = freeze(load_file(f"configs/{name}.py")), config_text(name)
    spec = spec_of(config)
    assert f"{spec.num_parameters / 1e6:.1f}M parameters" in text
    assert "({} tokens of {} x {} weights)".format(*spec.token_grid) in text


def config_text(name: str) -> str:
    """The text of a settings file, its lines joined."""
    text = (pathlib.Path(__file__).parents[2] / "configs" / f"{name}.py").read_text()
    return " ".join(text.split())
