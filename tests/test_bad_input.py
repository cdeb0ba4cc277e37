"""Bad input: one clear line that names the file, the key and the fix, exit status 2, nothing
half-written."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from pipeline import TINY, tiny_suite
from safetensors.numpy import load_file as load_tensors
from safetensors.numpy import save_file
from small_models import write_qwen

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.sequences import encode
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError, NoRoom
from dnd_jax.core.files import replacing
from dnd_jax.core.stage import stage_of
from dnd_jax.data.sources import read_jsonl, read_prompts
from dnd_jax.data.suite import load_suite
from dnd_jax.encoders.load import load_module
from dnd_jax.generator.trained import draw_prompts
from dnd_jax.loop.run import run_loop
from dnd_jax.loop.training import Training
from dnd_jax.lora.adapter import load_adapter, save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig, load_adapter_config
from dnd_jax.main import STAGES, main


@pytest.fixture
def suite(tmp_path) -> pathlib.Path:
    return tiny_suite(tmp_path / "towns")


def refused(capsys, *arguments: str) -> str:
    """Runs `dnd` in this process; it must refuse with one line and status 2. Returns the line."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dnd: "), lines
    return lines[0]


def test_malformed_jsonl_names_file_and_line(suite, tmp_path, capsys):
    path = suite / "datasets" / "bird-colon" / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = '{"prompt": "x", "response": '
    lines[4] = '{"prompt": "x"}'
    lines[5] = '{"prompt": 3, "response": " "}'
    path.write_text("\n".join(lines))
    message = refused(capsys, "quickstart", TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}")
    assert (
        f"{path}:3: not JSON" in message
        and f"{path}:5: response must be given" in message
        and f"{path}:6: prompt" in message
    )


@pytest.mark.parametrize("content", ["", '{"prompt": "only one", "response": "x"}\n'])
def test_empty_or_one_line_dataset(suite, content, capsys, tmp_path):
    path = suite / "datasets" / "bird-colon" / "train.jsonl"
    path.write_text(content)
    message = refused(capsys, "quickstart", TINY, f"--suite={suite}", f"--workdir={tmp_path / 'w'}")
    assert str(path) in message and "at least 4" in message


def test_not_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "caf\xe9", "response": "b"}\n')
    with pytest.raises(InputError, match=f"{path}:2: not UTF-8"):
        read_jsonl(path)
    with pytest.raises(InputError, match=f"{path}:2: not UTF-8"):
        read_prompts(path)


def test_byte_order_mark_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n\r\n{"prompt": "c", "response": "d"}\r\n'
    )
    assert [e.prompt for e in read_jsonl(path)] == ["a", "c"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train": []}, "train names no dataset"),
        ({"train": ["bird-colon", "bird-rank", "bird-rank"]}, "named twice: bird-rank"),
        ({"unseen": ["../bird-colon"]}, "unseen: '../bird-colon' cannot name a folder: it has a /"),
        ({"tarin": []}, "unknown key(s) tarin"),
        ({"unseen": ["nowhere"]}, "nowhere/train.jsonl: cannot be read"),
        ({"kinds": {"bird-rank": "x", "nope": "y"}}, "kinds must map names of unseen"),
        ({"wrong": {"bird-rank": "bird-rank"}}, "wrong must map names of unseen datasets to other"),
        ({"wrong": {"bird-rank": "nope"}}, "wrong must map names of unseen datasets to other"),
        ({"wrong": {"bird-colon": "bird-rank"}}, "wrong must map names of unseen datasets to"),
        ({"wrong": ["bird-rank"]}, "wrong must map names of unseen datasets to other"),
    ],
)
def test_suite_faults(suite, change, expected):
    path = suite / "suite.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError) as error:
        load_suite(suite)
    assert expected in str(error.value)


def test_suite_that_is_missing_or_no_json(tmp_path, capsys):
    assert "suite.json: no such file" in refused(
        capsys, "quickstart", TINY, f"--suite={tmp_path / 'none'}", f"--workdir={tmp_path / 'w'}"
    )
    (tmp_path / "suite.json").write_text("{")
    assert "suite.json:1: not JSON" in refused(
        capsys, "quickstart", TINY, f"--suite={tmp_path}", f"--workdir={tmp_path / 'w'}"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quikstart"], "did you mean quickstart?"),
        (["train", TINY, "--config.train.stepz=3"], "stepz"),
        (["train", TINY, "--config.train.steps=many"], "many"),
        (["train", TINY, "--workdri=x"], "workdri"),
        (
            ["train", TINY, "--config.generator.kernel_size=4"],
            "config.generator.kernel_size = 4 must be odd",
        ),
        (
            ["train", TINY, "--config.lora.checkpoints=7"],
            "config.lora.checkpoints = 7 is more than lora.steps = 6",
        ),
        (["train", "--config=nowhere.py"], "nowhere.py: no such config file"),
        (["quickstart", TINY, "--seeds=0,x"], "--seeds=0,x"),
        (["generate", TINY, "--prompts=x"], "--generator is needed"),
        (["train", TINY, "extra"], "unexpected argument 'extra'"),
        (
            ["train", TINY, "--seeds=0,1"],
            "--seeds: no flag of `dnd train`; `dnd train --help` lists its flags",
        ),
        (["train", TINY, "--seed=3"], "--seed: no flag of `dnd train`"),
        (
            ["evaluate", TINY, "--nostrict", "--limit=4"],
            "--limit: no flag of `dnd evaluate`; `dnd evaluate --help` lists its flags",
        ),
        (["plan", TINY, "--allow=train.steps"], "--allow: no flag of `dnd plan`"),
        (["generate", "--seed=-1"], "--seed=-1: -1 is not a non-negative integer"),
        (["overhead", "--limit=-3"], "--limit=-3: -3 is not a non-negative integer"),
        (["plan", TINY, "--devices=-2"], "--devices=-2: -2 is not a non-negative integer"),
        (["train", TINY, "--multihost", "--process=1"], "--multihost finds out --coordinator"),
        (["train", TINY, "--coordinator=localhost:99999"], "with a port of 1 to 65534"),
        # The next port is used as well.
        (["train", TINY, "--coordinator=localhost:65535"], "with a port of 1 to 65534"),
        (["train", "--config=launch/gke.sh"], "launch/gke.sh: a configuration is a Python file"),
    ],
)
def test_command_line_faults(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
    assert expected in refused(capsys, *arguments)


def test_a_device_without_room_is_one_line(capsys, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBacktrace ..."
        )

    monkeypatch.setattr("dnd_jax.main._run", full)
    assert main(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "dnd: no room on the device (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); take "
        "a smaller batch"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NoRoom("base: does not fit"), "dnd: base: does not fit"),
        (MemoryError(), "dnd: no room on the device (MemoryError); take a smaller batch"),
    ],
)
def test_no_room_has_one_status_whoever_says_so(capsys, monkeypatch, error, line):
    def full(*_):
        raise error

    monkeypatch.setattr("dnd_jax.main._run", full)
    assert main(["train"]) == 1
    assert capsys.readouterr().err.startswith(line)


def test_documented_commands_use_what_their_stage_reads():
    root, found = pathlib.Path(__file__).parent.parent, 0
    flags = {
        stage: {flag.name for flag in stage_of(room, stage).flags}
        for stage, (room, _) in STAGES.items()
    }
    places = ("README.md", "Makefile", "docs/*.md", "launch/*", "configs/*.py", "dnd_jax/**/*.py")
    for path in (path for place in places for path in root.glob(place) if path.is_file()):
        for stage, rest in re.findall(
            r"\bdnd ([a-z-]+) (--[^\n`#]*)", path.read_text().replace("\\\n", " ")
        ):
            for flag in re.findall(r"(?<!\S)\[?--([a-z-]+)(?=[=\]\s]|$)", rest):
                if stage in STAGES and flag not in ("config", "help"):
                    assert flag in flags[stage], f"{path}: dnd {stage} --{flag}"
                    found += 1
    assert found > 60


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "generator.features=(('a',0,0),(0,0,0))",
            "config.generator.features = (('a', 0, 0), (0, 0, 0)) must be",
        ),
        ("base.num_attention_heads=0", "config.base.num_attention_heads = 0 must be at least 1"),
        ("base.hidden_size=-4", "config.base.hidden_size = -4 must be at least 1"),
        ("train.clip=0", "config.train.clip = 0.0 must be above 0"),
        ("train.clip=nan", "config.train.clip = nan is not a number"),
        ("train.target_noise=-1e-5", "config.train.target_noise = -1e-05 must not be negative"),
        ("pretrain.warmup_steps=-1", "config.pretrain.warmup_steps = -1 must not be negative"),
        (
            "train.dtype=float64",
            "config.train.dtype = 'float64' is none of ('float32', 'bfloat16')",
        ),
        ("mesh.rules=((1,2),)", "config.mesh.rules: (1, 2) is not (pattern, (axis, ...))"),
        ("mesh.rules=('.',)", "config.mesh.rules: '.' is not (pattern, (axis, ...))"),
        ("mesh.rules=(('(',()),)", "config.mesh.rules: '(' is no regular expression"),
        (
            "mesh.rules=(('.',('foo',)),)",
            "config.mesh.rules: ('.', ('foo',)) should name axes of ('slice', 'data'",
        ),
        ("mesh.rules=(('.',('fsdp',('fsdp',))),)", "each once"),
        (
            "sweep.rules=((('.',('foo',)),),)",
            "config.sweep.rules: ('.', ('foo',)) should name axes",
        ),
        ("sweep.meshes=((1,2),)", "config.sweep.meshes = ((1, 2),) must hold (data, fsdp, tensor)"),
        (
            "sweep.remat=('foo',)",
            "config.sweep.remat = ('foo',) has more than ('none', 'convolutions', 'stages')",
        ),
        ("sweep.methods=('foo',)", "config.sweep.methods = ('foo',) has more than"),
        (
            "sweep.steps=('foo',)",
            "config.sweep.steps = ('foo',) must name some of ('train', 'generate', 'collect')",
        ),
        ("sweep.batches=(0,)", "config.sweep.batches = (0,) must not hold 0"),
        ("sweep.micro_batches=(0,)", "config.sweep.micro_batches = (0,) must be at least 1 each"),
        (
            "sweep.micro_batches=('a',)",
            "config.sweep.micro_batches = ('a',) should hold nothing but int",
        ),
    ],
)
def test_impossible_values_name_their_key(change, expected, capsys):
    assert expected in refused(capsys, "plan", TINY, f"--config.{change}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "c = mini.get_config()\n    c.train.stepz = 3\n    return c",
            ':4: AttributeError: Key "stepz" does not exist',
        ),
        ("c = mini.get_config()\n    c.train.stepz = 3\n    return c", 'Did you mean "steps"'),
        (
            "c = mini.get_config()\n    c.trian.steps = 3\n    return c",
            ":4: AttributeError: 'trian' Did you mean \"train\"",
        ),
        (
            "c = mini.get_config()\n    c.train.steps = 'many'\n    return c",
            ":4: TypeError: Could not override field 'steps'",
        ),
        ("return (", ":3: not Python ("),
        ("return 3", ": get_config() gives 3; a configuration defines get_config(), which returns"),
        ("return None\ndel get_config", ": there is no get_config(); a configuration defines"),
        ("import nowhere", ":3: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_configuration_files_with_faults(text, expected, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(f"from dnd_jax.configs import mini\ndef get_config():\n    {text}\n")
    message = refused(capsys, "plan", f"--config={path}")
    assert message.startswith(f"dnd: {path}:") and expected in message


def test_bases_with_faults(tmp_path):
    base = write_qwen(tmp_path / "base")
    raw = json.loads((base / "config.json").read_text())
    for content, expected in (
        ([], "not a model's configuration"),
        ({**raw, "hidden_size": "16"}, "hidden_size = '16' should be int"),
        ({**raw, "hidden_size": None}, "hidden_size is missing"),
        ({**raw, "num_attention_heads": 0}, "num_attention_heads 0 must be at least 1"),
        ({**raw, "rope_parameters": "x"}, "rope_parameters 'x' should be"),
    ):
        (base / "config.json").write_text(json.dumps(content))
        for load in (load_base_config, load_module):  # as a base, and as a text encoder
            with pytest.raises(InputError) as caught:
                load(base)
            assert expected in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(
            InputError, match=f"{base}: (transformers cannot load it|no usable tokenizer)"
        ) as caught:
            TorchBase(base, 4, 4)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="package:no.such/x: the package is not installed"):
        load_base_config("package:no.such/x")
    (base / "config.json").write_text(json.dumps(raw))
    weights = base / "model.safetensors"
    tensors = load_tensors(weights)
    save_file(
        {key: value for key, value in tensors.items() if "layers.1.mlp" not in key},
        weights,
        {"format": "pt"},
    )
    lacking = r"its files lack 3 of the model's tensors \(model.layers.1.mlp.down_proj.weight\)"
    with pytest.raises(InputError, match=f"{base}: {lacking}; give a whole model folder"):
        TorchBase(base, 4, 4)
    save_file(tensors, weights, {"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(
        InputError, match=f"{base}: transformers cannot load it .*; give a whole model folder"
    ):
        TorchBase(base, 4, 4)
    weights.unlink()
    with pytest.raises(
        InputError, match=f"{base}: transformers cannot load it .*; give a whole model folder"
    ):
        TorchBase(base, 4, 4)


def test_config_lists_every_fault_with_the_nearest_key():
    raw = load_file("configs/mini.py").to_dict()
    raw["train"]["stepz"] = raw["train"].pop("steps")
    raw["lora"]["rank"] = "four"
    with pytest.raises(InputError) as error:
        freeze(raw)
    text = str(error.value)
    assert "config.train.stepz is unknown; did you mean steps?" in text
    assert (
        "config.train.steps is missing" in text
        and "config.lora.rank = 'four' should be int" in text
    )


def test_too_few_prompts():
    with pytest.raises(InputError, match="3 prompt.*takes 8; add 5 more"):
        draw_prompts(["a", "b", "c"], 8, 0)
    with pytest.raises(InputError, match="prompt 2 is empty"):
        draw_prompts(["a", " ", "c"], 2, 0)


def test_prompt_of_100_000_characters(suite, tmp_path, capsys):
    """Too long for the base: named by file and line. For generation the encoder truncates it
    (test_quickstart runs that path)."""
    path = suite / "datasets" / "bird-colon" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["prompt"] = "why " * 25_000
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = build_tokenizer((e.prompt for e in load_suite(suite).corpus), 500)
    with pytest.raises(
        InputError, match=f"{path}:2: .* tokens with its response, more than base.max_length=64"
    ):
        encode(tokenizer, read_jsonl(path), 64)


def test_unwritable_and_full_output_folders(tmp_path):
    tensors = {
        "m.layers.0.q_proj.lora_A.weight": np.ones((2, 4), np.float32),
        "m.layers.0.q_proj.lora_B.weight": np.ones((4, 2), np.float32),
    }
    config = AdapterConfig("base", 2, 4.0, ("q_proj",))
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(InputError, match="cannot write here"):
        save_adapter(blocked / "adapter", tensors, config)
    assert blocked.read_text() == "in the way"


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None,
    reason="needs root to mount a small file system",
)
def test_full_disk_leaves_nothing_half_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        tensors = {
            "m.layers.0.q_proj.lora_A.weight": np.ones((2, 40_000), np.float32),
            "m.layers.0.q_proj.lora_B.weight": np.ones((4, 2), np.float32),
        }
        with pytest.raises(InputError, match="cannot write here"):
            save_adapter(disk / "adapter", tensors, AdapterConfig("base", 2, 4.0, ("q_proj",)))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_adapter_folder_faults(tmp_path):
    tensors = {
        "m.layers.0.q_proj.lora_A.weight": np.ones((2, 4), np.float32),
        "m.layers.0.q_proj.lora_B.weight": np.ones((4, 2), np.float32),
    }
    folder = save_adapter(tmp_path / "a", tensors, AdapterConfig("base", 2, 4.0, ("q_proj",)))
    assert load_adapter_config(folder) == AdapterConfig("base", 2, 4.0, ("q_proj",))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(InputError, match="truncated"):
        load_adapter(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(InputError, match="use_dora = True is not supported"):
        load_adapter_config(folder)


def test_generator_folder_faults(tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\n")
    message = refused(
        capsys,
        "generate",
        TINY,
        f"--generator={tmp_path}",
        f"--prompts={prompts}",
        f"--out={tmp_path / 'o'}",
    )
    assert "no generator.json" in message and not (tmp_path / "o").exists()


def test_adapters_of_another_base_are_listed(suite, tmp_path, capsys):
    layout = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (8, 2),
    }
    rng = np.random.default_rng(0)
    for i, dataset in enumerate(load_suite(suite).train):
        for step in (1, 2):
            tensors = {
                key: rng.normal(size=shape).astype(np.float32) for key, shape in layout.items()
            }
            base = "other" if (i, step) == (1, 2) else "ours"
            save_adapter(
                tmp_path / "w/loras" / dataset.name / f"step_{step}",
                tensors,
                AdapterConfig(base, 2, 4.0, ("q_proj",)),
            )
    eight = "--config.train.batch_size=8"  # for the devices of these tests
    message = refused(
        capsys, "train", TINY, eight, f"--suite={suite}", f"--workdir={tmp_path / 'w'}"
    )
    other = tmp_path / "w/loras" / load_suite(suite).train[1].name / "step_2"
    assert f"name several bases ('other' in {other}, 'ours' in " in message
    assert "say which by --config.base.path" in message
    assert not (tmp_path / "w" / "generator" / "generator.json").exists()


def test_adapter_that_does_not_fit_its_base_is_refused_in_pytorch(tmp_path):
    """PEFT itself only warns."""
    import jax

    from dnd_jax.base.architecture import BaseLM, LmConfig
    from dnd_jax.base.folder import save_base

    tokenizer = build_tokenizer(["one two three"], 300)
    config = LmConfig(len(tokenizer), 16, 16, 1, 2, 1)
    params = BaseLM(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    save_base(tmp_path / "base", config, params, tokenizer)
    base = TorchBase(tmp_path / "base", 4, 4)
    shapes = config.lora_shapes(2, ("q_proj",))
    good = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    adapter = AdapterConfig("base", 2, 4.0, ("q_proj",))
    base.use(save_adapter(tmp_path / "good", good, adapter))
    wrong_names = {
        key.replace("model.layers", "model.blocks"): value for key, value in good.items()
    }
    with pytest.raises(InputError, match="not an adapter of"):
        base.use(save_adapter(tmp_path / "names", wrong_names, adapter))
    wrong_shapes = {
        key: np.ones((s[0] * 2, s[1]) if "_B" in key else s, np.float32)
        for key, s in shapes.items()
    }
    with pytest.raises(InputError, match="not an adapter of"):
        base.use(save_adapter(tmp_path / "shapes", wrong_shapes, adapter))


def test_damaged_checkpoints(tmp_path):
    """The newest is truncated: the older one is used. All damaged: one clear line."""
    import jax
    import jax.numpy as jnp

    def train(steps):
        step = jax.jit(
            lambda state, batch: ({"x": state["x"] + batch}, {"loss": jnp.sum(state["x"])})
        )
        state = {"x": jnp.zeros(3)}
        record, batch_at = {"setting": 1}, lambda i: jnp.full(3, float(i))
        of = "t", tmp_path / "run", record, state, lambda: state, step, batch_at, steps, 2
        return run_loop(Training(*of))["x"]

    expected = np.asarray(train(4))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir() if p.name.isdigit()) == ["2", "4"]

    def damage(step):
        for file in (folder / step / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    damage("4")
    assert np.array_equal(np.asarray(train(4)), expected)
    damage("2")
    damage("4")
    with pytest.raises(InputError, match="no checkpoint can be read"):
        train(4)


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda state, batch: (state, {"loss": jnp.log(batch)}))
    with pytest.raises(
        InputError, match=r"loss is -?(nan|inf) at step 4 with pair 3; last good checkpoint: .*/2"
    ):
        state = {"x": jnp.zeros(2)}
        of = "t", tmp_path, {}, state, lambda: state, step, lambda i: 3.0 - i, 6, 2
        run_loop(Training(*of, blame=lambda i: f" with pair {i}"))


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    """SIGKILL in the middle of an output: its temporary folder goes with the next writer of that
    name."""
    write = """
import os, sys, time, dnd_jax.core.files as f
with f.replacing(sys.argv[1]) as t:
    t.write_text('x'); print(t, flush=True); time.sleep(600)
"""
    dead, living = (
        subprocess.Popen(
            [sys.executable, "-c", write, tmp_path / "out"],
            env={**os.environ, "PYTHONPATH": f"{pathlib.Path(__file__).parent.parent}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    )
    try:
        left, kept = (pathlib.Path(process.stdout.readline().strip()) for process in (dead, living))
        dead.kill()
        dead.wait()
        assert left.read_text() == "x" and not (tmp_path / "out").exists()
        (tmp_path / ".out.elsewhere-1-x").mkdir()  # another host's
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("y")
        assert (
            not left.parent.exists()
            and kept.is_file()
            and (tmp_path / ".out.elsewhere-1-x").is_dir()
        )
        assert (tmp_path / "out").read_text() == "y"
    finally:
        living.kill()
        living.wait()
