"""What a host gives of a train step, and whether it keeps up."""

import dataclasses
import re

import jax
import pytest
from small_models import write_qwen

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.costs.feeding import describe_feeding, encoder_flops, read_by_a_host
from dnd_jax.costs.step_cost import make_plan, train_arguments
from dnd_jax.generator.inputs import kept_shape
from dnd_jax.generator.sizes import encoder_module, sample_shapes, spec_of
from dnd_jax.main import main
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.rules import batch_shapes, held_bytes, leading


def settings(**changes):
    raw = load_file("tests/tiny.py")
    raw.generator.features, raw.train.batch_size = ((4, 16, 384), (6, 4, 4)), 8
    raw.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return freeze(raw)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is read of a plan."""

    host_bytes: int
    seconds: float | None = 0.5
    measured_seconds: float | None = None
    limit_bytes: int | None = None
    peak_bytes: int | None = None
    fits: bool = True


def described(config, checkpoints: int = 0, rate: float = 10.0, **plan) -> str:
    mesh = make_mesh(config.mesh)
    batch = train_arguments(config, mesh, checkpoints=checkpoints)[1][1]
    planned = Planned(read_by_a_host(batch), **plan)
    return describe_feeding(config, mesh, planned, checkpoints, rate)


def test_what_a_step_is_given_is_what_training_sends():
    """The batch of the plan has the types and shapes of `Pairs`."""
    for changes, kept in (({}, 0), ({"train__dtype": "bfloat16"}, 0), ({}, 24)):
        where = {"train__targets_on": "devices" if kept else "host"}
        config = settings(**changes, **where)
        mesh = make_mesh(config.mesh)
        _, (_, batch, frozen) = train_arguments(config, mesh, checkpoints=kept)
        assert batch["condition"].dtype == config.train.dtype
        assert batch["target"].shape == ((8,) if kept else (8, 6, 4, 4))
        whole = (frozen or {}).get("checkpoints")
        assert (whole is None) == (not kept)
        if kept:
            assert whole.shape[0] == kept and held_bytes(whole) < whole.size * 4


def test_each_part_stands_beside_its_other_way():
    text = described(settings())
    a_step = {name: float(x) for name, x in re.findall(r"^  (\D+?) +([\d.e-]+) GB,", text, re.M)}
    batch, cells = 8, 6 * 4 * 4
    assert a_step["conditions"] == pytest.approx(batch * 4 * 16 * 384 * 4 / 1e9, rel=1e-3)
    assert a_step["LoRA checkpoints"] == pytest.approx(batch * cells * 4 / 1e9, rel=1e-3)
    assert "(or condition.in_graph=true: " in text and "TFLOP of encoding a device)" in text
    assert "(or train.targets_on=devices: " in text and text.endswith("): it keeps up")
    kept = described(settings(train__targets_on="devices"), checkpoints=1000)
    assert re.search(
        r"LoRA checkpoints +0 GB, 0 GB/s \(on the devices: [\d.e-]+ GiB of each\)", kept
    )
    inside = described(settings(condition__in_graph=True))
    assert "tokens of the prompts" in inside and "condition.in_graph=true" not in inside
    answers = described(settings(train__objective="answers"))
    assert "LoRA checkpoints" not in answers


def test_a_host_that_cannot_feed_its_devices_is_named():
    text = described(settings(), rate=1e-6)
    seconds = float(re.search(r"THIS HOST CANNOT FEED IT, a step takes ([\d.]+) s$", text)[1])
    assert seconds == pytest.approx(8 * (4 * 16 * 384 + 96) * 4 / 1e3, rel=1e-2)
    assert "what a host gives" in described(settings(), seconds=None)


def test_there_is_room_for_so_many_checkpoints():
    config = settings()
    of_one = held_bytes(kept_shape(1, spec_of(config).token_grid, make_mesh(config.mesh)))
    text = described(config, limit_bytes=int(1000 * of_one), peak_bytes=int(900 * of_one))
    room = int(re.search(r"a checkpoint, with room for (\d+)\)", text)[1])
    assert room == 100
    over = described(config, 5000, limit_bytes=int(1000 * of_one), peak_bytes=int(900 * of_one))
    assert f"with room for {room}, and not for 5000)" in over


def test_encoding_is_counted_by_the_compiler_window_by_window():
    short, long = (settings(condition__max_text_length=n) for n in (16, 2048))
    module = encoder_module(short)
    layers, width = module.config.num_hidden_layers, module.config.hidden_size
    matrices = 4 * width**2 + 2 * width * module.config.intermediate_size
    least = 2 * layers * matrices * 4 * 16  # of 4 prompts of 16 tokens, without attention
    assert least < encoder_flops(short) < 1.2 * least
    assert encoder_flops(long) == pytest.approx(
        4 * encoder_flops(settings(condition__max_text_length=512))
    )


def test_each_layer_of_a_decoder_only_encoder_is_counted(tmp_path):
    folder = write_qwen(tmp_path / "lm", num_hidden_layers=3, max_position_embeddings=64)

    def flops(layer: int) -> float:
        return encoder_flops(settings(condition__encoder=str(folder), condition__layer=layer))

    none, one, two, three = map(flops, range(4))
    assert two - one == pytest.approx(one - none) and three - two == pytest.approx(
        one - none, rel=0.1
    )
    assert flops(-1) == three and one > 1.5 * none


@pytest.mark.slow
def test_kept_checkpoints_that_a_step_on_answers_does_not_take_are_counted(tmp_path):
    base = write_qwen(tmp_path / "base", max_position_embeddings=256)
    how = {"base__path": str(base), "train__objective": "answers", "train__weights_first": 1}
    how |= {"train__answer_rows": 1, "generator__features": ((0, 0, 0), (0, 0, 0))}
    config = settings(**how, train__targets_on="devices")
    (plain, kept) = (
        make_plan(config, jax.devices(), answer=4, checkpoints=count) for count in (0, 5000)
    )
    grid = spec_of(config).token_grid
    held = held_bytes(kept_shape(5000, grid, make_mesh(config.mesh)))
    assert kept.peak_bytes - plain.peak_bytes == pytest.approx(held, rel=0.05)


def test_shapes_are_split_as_a_batch_is():
    config = settings(train__batch_size=16)
    mesh = make_mesh(config.mesh)
    shapes = batch_shapes(sample_shapes(config), 16, leading(mesh, 16, "batch"))
    assert read_by_a_host(shapes) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--host-rate=0"], "--host-rate=0: expected GB/s of a host, such as 10"),
        (["--lora-checkpoints=3", "--sweep"], "--lora-checkpoints is of a single plan"),
        (["--lora-checkpoints=3", "--step=generate"], "is of train steps; leave out --step"),
        (["--config.train.targets_on=devices"], "say by --lora-checkpoints how many"),
    ],
    ids=str,
)
def test_what_a_plan_cannot_use_is_refused(flags, said, capsys):
    assert main(["plan", "--config=tests/tiny.py", "--devices=1", *flags]) == 2
    assert said in capsys.readouterr().err
