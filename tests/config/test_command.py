"""Command lines, settings by name and by a run's memory, and what `dnd` prints."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from dnd_jax.config import command
from dnd_jax.config.load import load_file, shipped
from dnd_jax.config.remembered import absolute, remembering
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import write_json
from dnd_jax.core.stage import DEFAULT, NONE, SEEDS, SUITE, WORKDIR, Flag, Stage, stage_of
from dnd_jax.main import STAGES, main

ROOT = pathlib.Path(__file__).parents[2]
STAGE = Stage(
    "none",
    (WORKDIR, SUITE, SEEDS, Flag("fast", bool, False, "hurry"), Flag("limit", int, 0, "most")),
)
LOOKING = Stage("none", (WORKDIR, Flag("note", str, "", "any text")), settings=DEFAULT)


def parsed(*words, stage=STAGE):
    return command.parse("stage", stage, words)


def run_code(code: str) -> subprocess.CompletedProcess:
    """What a Python of its own makes of it."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refusal(*words, stage=STAGE) -> str:
    with pytest.raises(InputError) as caught:
        parsed(*words, stage=stage)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def outside(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder that is no checkout, and the present one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", ["qwen2_5_7b_math", "qwen2_5_7b_math.py", "configs/mini.py"])
def test_shipped_settings_are_found_by_name_outside_a_checkout(file, outside):
    name = pathlib.Path(file).stem
    expected = freeze(load_file(str(ROOT / "configs" / f"{name}.py")))
    for words in ([f"--config={file}"], ["--config", file], ["-config", file]):
        given = parsed(*words)
        assert given.config == expected
        assert given.workdir == pathlib.Path("runs", name)
    (outside / name).write_text("of something else")
    (outside / "mine.py").write_text("from dnd_jax.configs.mini import get_config\n")
    assert parsed(f"--config={name}").config == expected
    assert parsed("--config=mine.py").config == freeze(load_file("mini"))
    assert parsed(f"--config={outside}/mine.py").workdir == pathlib.Path("runs/mine")


def test_config_files_that_are_not_there_name_the_shipped_ones(outside):
    assert "did you mean mini?; shipped settings: " in refusal("--config=minni")
    assert "no such config file" in refusal("--config=elsewhere/mini.py")
    (outside / "configs").mkdir()
    (outside / "configs/mini.py").write_text("def get_config():\n    return 3\n")
    assert "get_config() gives 3" in refusal("--config=configs/mini.py")  # one's own comes first


def test_bench_cases_are_found_outside_a_checkout(outside):
    for name in ("bench_cpu", "bench_gpu"):
        for case in freeze(load_file(name)).bench.cases:
            assert freeze(load_file(case[1]))


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--limit=1", "--limit=2"], "limit"),
        (["--limit", "1", "--limit=1"], "limit"),
        (["--fast", "--fast"], "fast"),
        (["--fast", "--nofast"], "fast"),
        (["--config=mini", "--config", "mini"], "config"),
        (["--config.train.steps=1", "--config.train.steps=2"], "config.train.steps"),
        (
            ["--config.generator.importance", "--noconfig.generator.importance"],
            "config.generator.importance",
        ),
    ],
)
def test_a_flag_that_is_given_twice_is_refused(words, flag):
    assert refusal(*words) == f"--{flag} is given twice; give it once"


@pytest.mark.parametrize(
    ("stage", "flag", "setting"),
    [
        ("train", "suite", "suite"),
        ("ablate", "seeds", "seed"),
        ("doctor", "base", "base.path"),
        ("doctor", "checkpoints", "train.checkpoints"),
        ("init-config", "base", "base.path"),
        ("init-config", "encoder", "condition.encoder"),
        ("init-config", "num-prompts", "condition.num_prompts"),
        ("init-config", "max-text-length", "condition.max_text_length"),
    ],
)
def test_a_flag_and_its_setting_are_not_given_both(stage, flag, setting):
    words = [f"--{flag}=1", f"--config.{setting}=2"]
    of = stage_of(STAGES[stage][0], stage)
    assert refusal(*words, stage=of) == f"--{flag} and --config.{setting} say the same; give one"


def test_a_setting_that_a_stage_passes_over_is_refused():
    of = stage_of("generator", "generate")
    said = refusal("--config.seed=1", stage=of)
    assert "--config.seed: `dnd stage` reads config.mesh and config.condition.too_long al" in said
    assert "--config.meshes.fsdp: " in refusal("--config.meshes.fsdp=1", stage=of)
    given = parsed("--config.mesh.fsdp=2", "--config.condition.too_long=cut", stage=of)
    assert given.config.mesh.fsdp == 2


def test_values_that_begin_with_dashes_are_values():
    given = parsed("--note", "--note-of-mine", "--workdir=--note=x", stage=LOOKING)
    assert given["note"] == "--note-of-mine" and given["workdir"] == "--note=x"
    given = parsed("--note=--workdir", stage=LOOKING)
    assert given["note"] == "--workdir" and given.workdir == pathlib.Path("runs/default")
    assert refusal("--note", "--workdir=x", stage=LOOKING).startswith("--note needs a value")
    assert refusal("--config=mini", "--config.train.steps").startswith("--config.train.steps needs")
    assert parsed("--config=mini", "--config.condition.layer", "-1").config.condition.layer == -1


def test_switches_and_other_words():
    assert not parsed("--config=mini")["fast"] and not parsed("--config=mini", "--nofast")["fast"]
    given = parsed("--fast", "--config", "mini", "--noconfig.generator.importance", "--limit", "3")
    assert given["fast"] and given["limit"] == 3 and not given.config.generator.importance
    assert parsed("--config=mini", "--config.condition.in_graph").config.condition.in_graph
    assert "unexpected argument 'x'" in refusal("--config=mini", "--fast", "x")
    assert "--fst: no flag of `dnd stage`; did you mean fast?" in refusal("--fst")
    taking = Stage("none", (), argument="FILE", settings=NONE)
    assert parsed("~/x", stage=taking).argument == os.path.expanduser("~/x")
    assert "FILE is needed: dnd stage FILE" in refusal(stage=taking)
    assert "reads no settings" in refusal("x", "--config.seed=1", stage=taking)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from dnd_jax.configs.mini import get_config\n")
    given = parsed("--config=~/mine.py", "--workdir=~/w", "--suite=~/s", "--config.base.path=~/b")
    assert given.workdir == tmp_path / "w" and given["suite"] == f"{tmp_path}/s"
    assert given.config.suite == f"{tmp_path}/s" and given.config.base.path == f"{tmp_path}/b"


def test_a_tilde_of_nobody_is_no_file(outside):
    nobody = "~no-such-user-anywhere/mine.py"
    assert f"{nobody}: no such config file" in refusal(f"--config={nobody}")


def test_a_stage_goes_on_with_what_its_run_remembers(outside, capsys):
    first = parsed("--config=mini", "--config.train.steps=7", "--suite=s", "--workdir=w")
    with remembering(first.workdir, first.config):
        pass
    for stage in (STAGE, LOOKING):
        assert parsed("--workdir=w", stage=stage).config == first.config
    then = (outside / "w/config.json").read_text()
    with remembering(first.workdir, parsed("--workdir=w").config):
        assert capsys.readouterr().out == ""
    assert (outside / "w/config.json").read_text() == then

    # Differences are listed, whichever way they are given.
    for words, line in (
        (["--config.train.steps=9"], "  train.steps: 7 -> 9"),
        (["--config=mini", "--suite=s"], "  train.steps: 9 -> 800"),
    ):
        with remembering(first.workdir, parsed("--workdir=w", *words).config):
            title, found = capsys.readouterr().out.splitlines()
            assert title.startswith("settings that w/config.json remembers otherwise")
            assert found == line
    assert parsed("--workdir=w").config.train.steps == 800

    # What is refused is not remembered.
    with (
        pytest.raises(InputError),
        remembering(first.workdir, parsed("--workdir=w", "--config.seed=5").config),
    ):
        assert parsed("--workdir=w").config.seed == 5  # for who interrupts the stage
        raise InputError("made with other settings")
    assert parsed("--workdir=w").config.seed == 0


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize(
    "made",
    [
        None,
        "generator/metrics.jsonl",
        "collect/group_001/metrics.jsonl",
        "controls/training/multi_task_0.001/metrics.jsonl",
        "controls/training/few_shot/group_000/metrics.jsonl",
        "evaluation.json",
    ],
)
def test_what_fails_is_remembered_only_if_something_was_made(outside, remembers, made):
    first, now = (parsed("--config=mini", f"--config.seed={i}", "--workdir=w") for i in (0, 1))
    (outside / "w/generator").mkdir(parents=True)
    if remembers:
        (outside / "w/generator/metrics.jsonl").write_text("of the first run")
        with remembering(first.workdir, first.config):
            pass
    before = sorted(outside.rglob("*"))
    with pytest.raises(InputError), remembering(now.workdir, now.config):
        if made:
            write_json(outside / "w" / made, [])
        raise InputError("the disk is full, or a refusal")
    if made:
        assert parsed("--workdir=w").config == now.config
    else:
        assert sorted(outside.rglob("*")) == before
        assert not remembers or parsed("--workdir=w").config == first.config


def test_what_a_run_remembers_holds_from_any_folder(outside, monkeypatch):
    for name in ("s", "b", "start", "elsewhere"):
        (outside / name).mkdir()
    words = ["--suite=s", "--config.base.path=b", "--config.train.init_from=start"]
    words += ["--config.train.checkpoint_dir=new", "--config.condition.encoder=Qwen/hub"]
    given = parsed("--config=mini", "--workdir=w", *words)
    with remembering(given.workdir, given.config):
        pass
    monkeypatch.chdir(outside / "elsewhere")
    later = parsed("--config=../w/config.json")
    assert later.workdir == pathlib.Path("../w")
    c = later.config
    assert [c.suite, c.base.path, c.train.init_from, c.train.checkpoint_dir] == [
        str(outside / name) for name in ("s", "b", "start", "new")
    ]
    assert c.condition.encoder == "Qwen/hub" and c.train.checkpoints == ""
    bucket = dataclasses.replace(c, train=dataclasses.replace(c.train, checkpoint_dir="gs://b/c"))
    assert absolute(bucket) == bucket


def test_remembered_settings_of_other_versions(outside, capsys):
    config = parsed("--config=mini").config
    raw = {"format": 1, "config": json.loads(json.dumps(config.to_json()))}
    path = outside / "w/config.json"
    path.parent.mkdir()

    def store(raw) -> str:
        path.write_text(json.dumps(raw))
        return "--workdir=w"

    del raw["config"]["train"]["remat"], raw["config"]["sweep"]
    assert parsed(store(raw)).config == config
    raw["config"]["train"]["stepz"] = 3
    raw["config"]["lora"]["rank"] = "four"
    message = refusal(store(raw))
    assert "w/config.json: not this version's settings (give --config=FILE)" in message
    assert "config.train.stepz is unknown; did you mean steps?" in message
    assert "config.lora.rank = 'four' should be int" in message
    for unread in ({**raw, "format": 2}, {"model_type": "qwen2"}, [1]):
        assert "this version reads 1; give --config=FILE" in refusal(store(unread))
    store([1])
    with remembering(path.parent, parsed("--workdir=w", "--config=mini").config):
        assert "w/config.json: settings of format None" in capsys.readouterr().out
    assert parsed("--workdir=w").config == config


def test_seeds_of_the_command_line_are_those_of_the_run():
    assert parsed("--config=mini", "--seeds=4,5").config.seed == 4
    assert parsed("--config=mini", "--config.seed=3").seeds() == [3]
    for seeds in ("4,4", "²"):
        assert "expected different whole numbers" in refusal("--config=mini", f"--seeds={seeds}")


def test_a_run_remembers_its_seeds(outside, capsys):
    given = parsed("--config=mini", "--seeds=4,5,6", "--workdir=w")
    with remembering(given.workdir, given.config, given.seeds()):
        pass
    for words in ([], ["--config=mini", "--config.seed=4"], ["--config.train.steps=9"]):
        assert parsed("--workdir=w", *words).seeds() == [4, 5, 6]
    assert parsed("--workdir=w", "--config.seed=7").seeds() == [7]
    # A stage without --seeds leaves them.
    with remembering(given.workdir, parsed("--workdir=w", "--config.train.steps=9").config):
        pass
    assert parsed("--workdir=w").seeds() == [4, 5, 6]
    capsys.readouterr()
    with remembering(given.workdir, parsed("--workdir=w").config, [4]):
        assert capsys.readouterr().out.splitlines()[1:] == ["  seeds: [4, 5, 6] -> [4]"]
    assert parsed("--workdir=w").seeds() == [4]


@pytest.mark.parametrize("stage", ["pretrain", "collect", "train", "evaluate", "lm-eval", "plan"])
def test_no_stage_means_the_toy(stage, outside, capsys):
    assert main([stage, "--workdir=w"]) == 2
    message = capsys.readouterr().err
    assert "dnd: --config is needed, and there is no w/config.json: a settings file" in message
    assert all(name in message for name in shipped()) and len(shipped()) > 15
    assert not (outside / "w").exists()


def test_quickstart_alone_takes_mini_and_says_so(outside, capsys):
    quickstart = stage_of("studies", "quickstart")
    given = command.parse("quickstart", quickstart, ["--workdir=w"])
    assert given.config == freeze(load_file("mini"))
    assert capsys.readouterr().out == "settings: mini (no --config was given)\n"
    with remembering(given.workdir, parsed("--config=real_text_small").config):
        pass
    assert command.parse("quickstart", quickstart, ["--workdir=w"]).config.base.hidden_size == (
        freeze(load_file("real_text_small")).base.hidden_size
    )


@pytest.mark.parametrize("name", STAGES)
def test_help_of_a_stage_shows_its_flags_and_no_others(name, capsys):
    stage = stage_of(STAGES[name][0], name)
    assert main([name, "--help"]) == 0
    shown = set(re.findall(r"^  --(\S+)", capsys.readouterr().out, re.MULTILINE))
    settings = {"config", "config.KEY"} if stage.settings != NONE else set()
    assert shown == {flag.name for flag in stage.flags} | settings


def test_help_and_refusals_import_nothing_that_takes_long():
    """Neither JAX nor NumPy: a stage's module is imported once its command line is right."""
    code = """
import sys
from dnd_jax.main import STAGES, main
for name in STAGES:
    assert main([name, "--help"]) == 0 and main([name, "--no-such-flag=1"]) == 2, name
assert main(["train", "--config=mini", "--config.train.steps=none"]) == 2
assert main(["train", "--config=mini", "--config.condition.encoder=package:no_such/x"]) == 2
print("imported:", *sorted({"jax", "flax", "numpy", "torch", "transformers"} & set(sys.modules)))
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
    assert done.stderr.splitlines()[-1].startswith("dnd: `dnd train` needs no_such; pip install ")


def test_every_stage_of_a_room_is_in_the_table():
    rooms = sorted({room for room, _ in STAGES.values()})
    found = [importlib.import_module(f"dnd_jax.{room}.commands").COMMANDS for room in rooms]
    assert sorted(name for commands in found for name in commands) == sorted(STAGES)
    for stage in (stage for commands in found for stage in commands.values()):
        module = ROOT / "dnd_jax" / f"{stage.module.replace('.', '/')}.py"
        assert "\ndef run(given: Given) -> None:\n" in module.read_text()


@pytest.mark.parametrize("arguments", [(), ("bench", "--limits"), ("suite", "--help")])
def test_a_reader_that_has_read_enough_is_no_error(arguments):
    """As `dnd ... | head` does: the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "dnd_jax", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(reader)
    os.close(writer)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


def test_a_pipe_of_another_file_that_breaks_is_an_error(tmp_path):
    """A stage's own pipe is not standard output: the command has failed and says so."""
    code = """
import sys
from dnd_jax import main
from dnd_jax.core.stage import NONE, Stage
def run(given):
    raise BrokenPipeError(32, "Broken pipe")
module = type(sys)("commands")
module.run, module.COMMANDS = run, {"broken": Stage("broken.commands", settings=NONE)}
sys.modules["dnd_jax.broken.commands"] = module
main.STAGES["broken"] = ("broken", "")
sys.exit(main.main(["broken"]))
"""
    done = run_code(code)
    assert done.returncode == 2 and done.stderr.startswith("dnd: disk: Broken pipe; check")


def test_bad_input_stays_so_when_nobody_reads():
    """The status of `dnd ... | head` with pipefail."""
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from dnd_jax.main import main; print(1); sys.exit(main(['nothing']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == 2 and "no stage 'nothing'" in done.stderr


def test_a_benchmark_of_ones_own_settings_takes_them_as_they_were_given(outside, monkeypatch):
    from dnd_jax.costs.bench import run
    from dnd_jax.costs.commands import COMPARED

    run_of = parsed("--config=mini", "--workdir=w")
    with remembering(run_of.workdir, run_of.config):
        pass
    given, cases = parsed("--workdir=w", "--config.generator.kernel_size=5"), []
    monkeypatch.setattr(run, "run_case", lambda case, config: cases.append(case))
    monkeypatch.setattr(run, "table", lambda results: "")
    run.run(dataclasses.replace(given, flags={flag.name: "" for flag in COMPARED}))
    assert [case.what for case in cases] == ["forward", "train", "generate"]
    assert all(case.load().generator == given.config.generator for case in cases)
    assert parsed("--workdir=w").config == run_of.config
