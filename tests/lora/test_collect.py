"""What a run of other steps left in the folder of the LoRAs, and what is refused to be taught."""

import dataclasses
import json

import numpy as np
import pytest
from pipeline import TINY, tiny_suite
from small_models import write_qwen

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.collect import _kept, _stale
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.main import main


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
    assert sorted(path.name[-1] for path in _stale(tmp_path, _kept(settings, settings.steps))) == [
        "3",
        "4",
        "8",
    ]
    (tmp_path / "step_000004" / "notes.txt").touch()
    with pytest.raises(InputError, match="step_000004: .* holds files that are not ours; move it"):
        _stale(tmp_path, _kept(settings, settings.steps))
    (tmp_path / "step_000004" / "notes.txt").unlink()
    (tmp_path / "step_000004").rename(tmp_path / "elsewhere")
    (tmp_path / "step_000004").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="step_000004: "):
        _stale(tmp_path, _kept(settings, settings.steps))


def test_a_response_with_an_end_that_only_the_settings_name(tmp_path, capsys):
    suite, base = tiny_suite(tmp_path / "suite"), write_qwen(tmp_path / "base")
    file = next(iter(sorted(suite.glob("**/train.jsonl"))))
    row = json.loads(file.read_text().splitlines()[0])
    ids = load_tokenizer(base)(row["response"], add_special_tokens=False)["input_ids"]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[-1]}))
    command = ["collect", TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}"]
    given = ("base.path=" + str(base), "evaluate.agreement=False", "lora.targets=('q_proj',)")
    assert main([*command, *(f"--config.{setting}" for setting in given)]) == 2
    said = capsys.readouterr().err
    assert "its response has" in said and "which ends an answer of this base" in said, said
    assert not (tmp_path / "w" / "loras").exists()
