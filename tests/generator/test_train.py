"""What `train` writes of a real run, computed once more from its files, in numpy and on one
device."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from pipeline import random_loras, tiny_suite
from safetensors.numpy import load_file as load_tensors

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.costs.compiled import topology_devices
from dnd_jax.data.suite import load_suite
from dnd_jax.encoders.cache import PromptEncoder
from dnd_jax.generator.folder import read_description
from dnd_jax.generator.model import Generator
from dnd_jax.generator.pairs import PairedDataset, Pairs
from dnd_jax.generator.record import is_finished
from dnd_jax.generator.sizes import resolve_features
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.generator.step import make_train_step, shard_train_step
from dnd_jax.generator.train import _row, train
from dnd_jax.loop.metrics import read_metrics
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.lora.checkpoints import Checkpoints, make_target, token_array
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import ANYWHERE

BATCH, STEPS = 8, 3


pytestmark = pytest.mark.xdist_group("train")  # one process builds what they share


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(configuration, suite, workdir) of a run without noise on 8 devices in two groups."""
    root = tmp_path_factory.mktemp("run")
    raw = load_file("tests/tiny.py")
    raw.train.update(
        steps=STEPS,
        batch_size=BATCH,
        condition_noise=0.0,
        target_noise=0.0,
        checkpoints=str(root / "loras"),
    )
    raw.generator.features = ((0, 0, 0), (0, 0, 0))  # one stage: quick to compile
    raw.mesh.update(slices=2, data=2, fsdp=2)
    config, suite = freeze(raw), tiny_suite(root / "suite")
    random_loras(root / "loras", suite, config)
    suite = load_suite(suite, config.condition.num_prompts)
    train(config, suite, root)
    return config, suite, root


@pytest.fixture(scope="module")
def pairs_and_importance(run):
    config, suite, root = run
    checkpoints, encoder = Checkpoints(config, suite, root), PromptEncoder(config.condition)
    target = make_target(config, checkpoints, root / "targets")
    tokens = [token_array(checkpoints, d.name, target, root / "targets") for d in suite.train]
    texts = [encoder.cached([e.prompt for e in d.train], root / "embeddings") for d in suite.train]
    datasets = [
        PairedDataset(d.name, {"condition": x}, t.targets)
        for d, x, t in zip(suite.train, texts, tokens, strict=True)
    ]
    pairs = Pairs(datasets, BATCH, config.condition.num_prompts, config.seed, config.train.pairing)
    return pairs, np.mean([t.importance for t in tokens], axis=0)


def test_each_dataset_has_its_loss_and_their_mean_is_the_loss(run, pairs_and_importance):
    pairs, _ = pairs_and_importance
    rows = read_metrics(run[2] / "generator")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for i, row in enumerate(rows):
        count = collections.Counter(pairs.names(i))
        assert {key.removeprefix("loss/") for key in row if key.startswith("loss/")} == set(count)
        # As many cells count in one sample as in another.
        assert row["loss"] == pytest.approx(
            sum(n * row[f"loss/{name}"] for name, n in count.items()) / BATCH, rel=1e-5
        )
    assert len(count) > 1 and len({row[f"loss/{name}"] for name in count}) > 1


def test_checkpoints_that_stay_on_the_devices_train_the_same_generator(run, tmp_path, capsys):
    """Over two groups of devices, each of which has them all; where they are read is no other
    run."""
    config, suite, root = run
    c = dataclasses.replace(config.train, targets_on="devices")
    there = dataclasses.replace(config, train=c)
    train(there, suite, tmp_path)
    assert "LoRA checkpoints stay on the devices" in capsys.readouterr().out
    ours, theirs = (load_tensors(at / "generator/model.safetensors") for at in (tmp_path, root))
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert is_finished(root / "generator", there, suite, root, ())


def test_the_numbers_of_a_step_are_those_of_its_data(run, pairs_and_importance):
    config, (pairs, importance) = run[0], pairs_and_importance
    rows = read_metrics(run[2] / "generator")
    for i, row in enumerate(rows):
        assert row["target_mean_square"] == pytest.approx(
            np.nanmean(pairs.batch_at(i)["target"] ** 2), rel=1e-5
        )

    batch, row = pairs.batch_at(0), rows[0]
    features = resolve_features(
        config.generator, batch["condition"].shape[1:], batch["target"].shape[1:]
    )
    module = Generator(
        DecoderSpec.of(config.generator, config.condition, "float32", features=features)
    )
    first = jnp.zeros((1, *batch["condition"].shape[1:]))
    params = jax.jit(module.init)(jax.random.fold_in(jax.random.key(config.seed), 2), first)[
        "params"
    ]
    inside = ~np.isnan(batch["target"])
    weight = inside * importance[:, None, None]

    def loss(params):
        output = module.apply({"params": params}, batch["condition"])
        return jnp.sum(
            weight * (output - np.nan_to_num(batch["target"])) ** 2
        ) / inside.sum(), output

    (value, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    output = np.asarray(output)
    assert row["output_mean_square"] == pytest.approx(np.mean(output[inside] ** 2), rel=1e-4)
    assert row["loss"] == pytest.approx(float(value), rel=1e-4)
    norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(gradient)))
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    errors = weight * (output - np.nan_to_num(batch["target"])) ** 2
    for name in set(pairs.names(0)):
        of_it = [i for i, of in enumerate(pairs.names(0)) if of == name]
        assert row[f"loss/{name}"] == pytest.approx(
            errors[of_it].sum() / inside[of_it].sum(), rel=1e-4
        )


def test_the_generator_is_the_moving_average_where_one_is_kept(run, pairs_and_importance, tmp_path):
    """Of the parameters after each step; the first ones count little."""
    config, suite, root = run
    c = dataclasses.replace(config.train, average_decay=0.9, checkpoints=str(root / "loras"))
    config, (pairs, importance) = dataclasses.replace(config, train=c), pairs_and_importance
    folder = train(config, suite, tmp_path)
    one = pairs.batch_at(0)
    sizes = one["condition"].shape[1:], one["target"].shape[1:]
    spec = DecoderSpec.of(
        config.generator,
        config.condition,
        "float32",
        features=resolve_features(config.generator, *sizes),
    )
    sharded = shard_train_step(config, spec, make_mesh(config.mesh), importance)
    state = sharded.init(jax.random.fold_in(jax.random.key(config.seed), 2))
    average = jax.tree.map(np.asarray, state["params"])
    for i in range(STEPS):
        state, _ = sharded.step(state, pairs.placed(i, sharded.over_batch), None)
        decay = (i + 1) / (10 + i)
        average = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * np.asarray(new),
            average,
            state["params"],
        )
    found = load_tensors(folder / "model.safetensors")
    last = load_tensors(root / "generator/model.safetensors")
    expected = traverse_util.flatten_dict(average, sep="/")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-7, err_msg=key)
    assert any(np.abs(found[key] - value).max() > 1e-5 for key, value in last.items())

    # Without one the state has fewer parts: no such checkpoint goes on, whatever is allowed.
    (folder / "generator.json").unlink()
    none = dataclasses.replace(config, train=dataclasses.replace(c, average_decay=0.0))
    with pytest.raises(InputError, match=r"train\.average_decay\): give these as they were"):
        train(none, suite, tmp_path, allowed=("train.average_decay",))
    assert not list(folder.rglob("*.damaged"))


class Ones(nn.Module):
    """The sum of the condition, in every cell of two tokens of 1 x 1, and a parameter to train."""

    placement = ANYWHERE

    @nn.compact
    def __call__(self, condition_BxNxLxC):
        offset = self.param("offset", nn.initializers.zeros, ())
        return offset + jnp.sum(condition_BxNxLxC, (1, 2, 3)).reshape(-1, 1, 1, 1).repeat(2, 1)


def shown_of(share: float, step: int, seed: int = 0) -> float:
    """How many of 80 tokens of (0.5, 0.5) a step of training shows the decoder, by the mean square
    of what comes out of their sum."""
    c = dataclasses.replace(
        freeze(load_file("tests/tiny.py")).train, condition_dropout=share, condition_noise=0.0
    )
    optimizer = train_optimizer(c)
    batch = {"condition": jnp.full((1, 4, 20, 2), 0.5), "target": jnp.zeros((1, 2, 1, 1))}
    params = {"offset": jnp.zeros(())}
    state = {"params": params, "opt": optimizer.init(params), "step": jnp.int32(step)}
    take = make_train_step(Ones(), optimizer, c, np.ones(2, np.float32), seed)
    return float(jnp.sqrt(take(state, batch)[1]["output_mean_square"]))


def test_a_step_hides_a_share_of_the_tokens_other_ones_each_time():
    assert shown_of(0.0, step=0) == pytest.approx(80)
    some = [shown_of(0.25, step) for step in range(6)]
    np.testing.assert_allclose(some, np.round(some), rtol=1e-5)  # whole vectors
    assert np.mean(some) == pytest.approx(60, abs=6) and len({*np.round(some)}) > 1
    assert shown_of(0.25, step=3) == some[3] != shown_of(0.25, step=3, seed=1)


def test_speed_is_counted_operations_by_time(run, pairs_and_importance):
    config, batch = run[0], pairs_and_importance[0].batch_at(0)
    features = resolve_features(
        config.generator, batch["condition"].shape[1:], batch["target"].shape[1:]
    )
    macs = DecoderSpec(features, config.generator.kernel_size).forward_macs
    operations = 6 * BATCH * macs  # 2 a multiply-add, twice as many backward
    for row in read_metrics(run[2] / "generator"):
        seconds = BATCH / row["samples_per_second"]
        assert seconds == pytest.approx(row["seconds"], abs=6e-5)  # which is rounded
        assert row["tflop_per_second"] == pytest.approx(operations / seconds / 1e12, rel=1e-6)
        assert "share_of_peak" not in row  # of a CPU nothing is known
        assert ("peak_memory_gb" in row) == bool(jax.local_devices()[0].memory_stats())

    mesh = make_mesh(config.mesh, topology_devices("v5p:2x2x1", 2))
    row = _row(
        {"loss": 1.0, "sample_loss": [1.0, 3.0, 8.0]}, ["a", "b", "a"], 0.5, 459 * 10**12, mesh
    )
    assert (row["loss/a"], row["loss/b"], row["samples_per_second"], row["tflop_per_second"]) == (
        4.5,
        3.0,
        6.0,
        918.0,
    )
    assert row["share_of_peak"] == pytest.approx(2 / 8)  # twice what one of the 8 chips can do


def test_the_run_records_its_mesh_with_the_order_of_the_devices(run):
    for step in (
        folder for folder in (run[2] / "generator/checkpoints").iterdir() if folder.name.isdigit()
    ):
        record = json.loads((step / "record/metadata").read_text())
        assert record["mesh"] == {
            "axes": {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1},
            "devices": list(range(8)),
        }
        assert record["config"]["mesh"]["slices"] == 2 and record["data_position"] == record[
            "step"
        ] == int(step.name)


def test_a_finished_run_keeps_the_name_of_its_base(run):
    config, suite, root = run
    folder = root / "generator"
    called = read_description(folder).adapter.base
    assert is_finished(folder, config, suite, root, None, called)
    with pytest.raises(InputError, match="its adapters call their base .* --base-name=org/other"):
        is_finished(folder, config, suite, root, None, "org/other")


@pytest.mark.parametrize("recorded", ["highest", None, "float8"])
def test_a_generator_is_computed_with_the_precision_that_it_was_trained_with(
    run, recorded, tmp_path
):
    """None: of a version that did not record one."""
    description = json.loads((run[2] / "generator/generator.json").read_text())
    assert description["settings"]["train"].pop("precision") == "default"
    description["settings"]["train"] |= {"precision": recorded} if recorded else {}
    (tmp_path / "generator.json").write_text(json.dumps(description))
    if recorded == "float8":
        with pytest.raises(InputError, match="train.precision 'float8' is none of default"):
            read_description(tmp_path)
    else:
        assert read_description(tmp_path).spec.precision == (recorded or "default")
