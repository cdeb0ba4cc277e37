"""What `dnd collect` refuses to teach, before anything is computed."""

import json

from pipeline import TINY, tiny_suite
from small_models import write_qwen

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.main import main


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
