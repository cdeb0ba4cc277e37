"""What a run of other steps left in the folder of the LoRAs."""

import dataclasses

import numpy as np
import pytest

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.collect import _stale
from dnd_jax.lora.peft_settings import AdapterConfig


def test_only_what_is_ours_counts_as_stale(tmp_path):
    settings = dataclasses.replace(freeze(load_file("mini")).lora, steps=6, checkpoints=2)
    shapes = {"lora_A": (2, 4), "lora_B": (4, 2)}
    tensors = {
        f"m.layers.0.q_proj.{key}.weight": np.ones(shape, np.float32)
        for key, shape in shapes.items()
    }
    for step in (3, 4, 5, 6, 8):
        config = AdapterConfig("base", 2, 4.0, ("q_proj",))
        save_adapter(tmp_path / f"step_{step:06d}", tensors, config)
    (tmp_path / "step_4_of_mine").mkdir()
    assert sorted(path.name[-1] for path in _stale(tmp_path, settings)) == ["3", "4", "8"]
    (tmp_path / "step_000004" / "notes.txt").touch()
    with pytest.raises(InputError, match="step_000004: .* holds files that are not ours; move it"):
        _stale(tmp_path, settings)
    (tmp_path / "step_000004" / "notes.txt").unlink()
    (tmp_path / "step_000004").rename(tmp_path / "elsewhere")
    (tmp_path / "step_000004").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="step_000004: "):
        _stale(tmp_path, settings)
