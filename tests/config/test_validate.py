"""JSON-like values into dataclasses: settings, their records, and the JSON objects of others."""

import dataclasses
import os
import re
import sys

import pytest

from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Condition, Lora
from dnd_jax.config.studies import TORCH
from dnd_jax.config.validate import fields_of, freeze, section
from dnd_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    factor: float
    kind: str = "linear"


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    rate: float
    width: int | None = None
    inner: Inner | None = None
    tied: bool = True


def test_foreign_objects_may_have_more_or_less_and_whole_numbers_as_rates():
    raw = {"size": 3, "rate": 2, "width": None, "unheard": [1], "tied": None}
    made = fields_of(Outer, raw, "config.json")
    assert made == Outer(3, 2.0) and type(made.rate) is float
    assert fields_of(Outer, {**raw, "inner": {"factor": 8, "more": 1}}, "f").inner == Inner(8.0)
    assert fields_of(Outer, {**raw, "inner": Inner(2.0)}, "f").inner == Inner(2.0)


def test_foreign_objects_with_faults_name_file_and_keys_at_once():
    raw = {"size": True, "width": "8", "inner": {"factor": "x", "kind": 1}}
    with pytest.raises(InputError) as caught:
        fields_of(Outer, raw, "w/config.json")
    assert str(caught.value) == (
        "w/config.json: size = True should be int; rate is missing; width = '8' should be int; "
        "inner.factor = 'x' should be float; inner.kind = 1 should be str"
    )


def test_records_have_every_key_and_no_other():
    raw = freeze(load_file("mini")).to_json()
    assert (
        section(Lora, {**raw["lora"], "targets": list(raw["lora"]["targets"])}, "lora")
        == freeze(load_file("mini")).lora
    )
    del raw["condition"]["layer"]
    with pytest.raises(InputError, match=r"settings: condition.encodr is unknown; did you mean"):
        section(Condition, {**raw["condition"], "encodr": ""}, "condition")
    with pytest.raises(InputError, match="condition.layer is missing"):
        section(Condition, raw["condition"], "condition")


def test_every_fault_of_a_configuration_is_in_one_error():
    raw = load_file("mini").to_dict()
    raw["train"].update(batch_size=6, micro_batches=4, pairing="both")
    raw["lora"].update(checkpoints=100)
    raw["evaluate"].update(num_prompts=9)
    raw["bench"].update(torch=("eager", "lazy"))
    del raw["mesh"]["fsdp"]
    with pytest.raises(InputError) as caught:
        freeze(raw)
    assert str(caught.value) == (
        "configuration: config.lora.checkpoints = 100 is more than lora.steps = 60; "
        "config.train.pairing = 'both' is none of ('random', 'fixed'); "
        f"config.bench.torch = ('eager', 'lazy') has more than {TORCH}; config.mesh.fsdp is missing"
    )
    raw["mesh"]["fsdp"], raw["train"]["pairing"] = 1, "fixed"
    raw["bench"]["torch"], raw["lora"]["checkpoints"] = (), 10
    with pytest.raises(InputError, match="micro_batches = 4 does not divide train.batch_size = 6$"):
        freeze(raw)
    raw["train"]["micro_batches"] = 3
    with pytest.raises(
        InputError, match=r"config.evaluate.num_prompts = 9 must be 1 to condition.num_prompts = 8"
    ):
        freeze(raw)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights_first": 5}, "weights_first = 5 must be 0 with train.objective = weights"),
        (
            {"objective": "answers", "weights_first": 800},
            "weights_first = 800 must be fewer than train.steps = 800",
        ),
        ({"objective": "answers", "pairing": "fixed"}, "pairing = fixed pairs prompts with LoRA"),
        (
            {"objective": "answers", "shots": 2},
            "shots = 2 must be 0 with train.objective = answers, which distills nothing",
        ),
        ({"average_decay": 1.0}, "config.train.average_decay = 1.0 must lie in 0 to below 1"),
        (
            {"condition_dropout": 1.0},
            "config.train.condition_dropout = 1.0 must lie in 0 to below 1",
        ),
        ({"validate_every": -1}, "config.train.validate_every = -1 must not be negative"),
        ({"objective": "weights,answers"}, "'weights,answers' is none of"),
    ],
)
def test_objectives_that_contradict_other_settings(changes, said):
    raw = load_file("mini").to_dict()
    raw["train"].update(changes)
    with pytest.raises(InputError, match=re.escape(said)):
        freeze(raw)
    raw["train"].update(objective="answers", weights_first=799, pairing="fixed", average_decay=0.9)
    raw["train"].update(validate_every=0, shots=0, condition_dropout=0.0)
    config = freeze(raw)  # steps on weights pair prompts with checkpoints
    assert config.train.taught == ("weights", "answers") and config.train.asks_base
    assert config.train.taught_at(798) == ("weights",) != config.train.taught_at(799)


@pytest.mark.parametrize("key", ["suite", "base.path", "condition.encoder", "train.checkpoints"])
def test_a_leading_tilde_of_a_path_is_the_home_folder(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    raw = load_file("mini")
    raw.update_from_flattened_dict({key: "~/there"})
    found = freeze(raw).to_json()
    for part in key.split("."):
        found = found[part]
    assert found == "/home/of/mine/there"
    nobody = "~no-such-user-anywhere/x"
    assert os.path.expanduser(nobody) == nobody
    raw.update_from_flattened_dict({key: nobody})
    with pytest.raises(InputError, match=f"config.{re.escape(key)} = '{nobody}' begins with a"):
        freeze(raw)


def test_pytorch_runs_every_variant_that_the_settings_allow():
    from dnd_jax.costs.bench.torch_worker import VARIANTS

    assert set(VARIANTS) == set(TORCH)


def test_paths_and_numbers_that_nothing_can_hold():
    raw = load_file("mini").to_dict()
    raw["train"] |= {"steps": 10**400, "checkpoints": "a\0b"}
    raw["lora"] |= {"learning_rate": 10**400, "targets": ()}
    raw["seed"] = 2**63
    with pytest.raises(InputError) as caught:
        freeze(raw)
    assert "config.seed is a number of 64 bits; at most 63" in str(caught.value)
    assert "config.train.steps is a number of 1329 bits" in str(caught.value)
    assert "config.lora.learning_rate is a number of 1329 bits" in str(caught.value)
    assert "config.train.checkpoints = 'a\\x00b' begins with a home folder" in str(caught.value)
    assert "config.lora.targets = () must name at least one" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_of_settings_that_ends_python(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\n\nsys.exit(7)\n")
    with pytest.raises(InputError, match="mine.py:3: SystemExit: 7"):
        load_file(str(tmp_path / "mine.py"))


def test_settings_of_the_same_size_and_time_are_read_anew(tmp_path, monkeypatch):
    """As `cp -p`, archives and images without times leave a file that was replaced."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file, text = tmp_path / "mine.py", "from dnd_jax.configs import mini\n\n\n"
    text += "def get_config():\n    c = mini.get_config()\n    c.train.steps = {}\n    return c\n"
    for steps in (111, 222):
        file.write_text(text.format(steps))
        os.utime(file, (10**9, 10**9))
        assert load_file(str(file)).train.steps == steps
    assert list(tmp_path.iterdir()) == [file]
