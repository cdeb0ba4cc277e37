"""The loop that all training shares: what it writes, traces and feeds, with a step that is one
line."""

import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dnd_jax.config.records import check_same_run
from dnd_jax.core.errors import InputError, Lost
from dnd_jax.core.stopping import stop
from dnd_jax.loop.checkpoints import open_checkpoints, sums
from dnd_jax.loop.metrics import Metrics, read_metrics
from dnd_jax.loop.run import run_loop
from dnd_jax.loop.training import Options, Training

ROOT = pathlib.Path(__file__).parents[2]


def run(directory, steps=6, batch_at=jnp.float32, options=Options(), **more):  # noqa: B008
    step = jax.jit(
        lambda state, batch: (
            {**state, "sum": state["sum"] + batch},
            {"loss": batch, "sum": state["sum"]},
        )
    )
    state = more.pop("state", {"sum": jnp.float32(0)})
    how = {"steps": steps, "save_every": 2} | more
    training = Training("toy", directory, {"seed": 0}, state, lambda: state, step, batch_at, **how)
    return run_loop(training, options)


def test_changed_settings_are_allowed_only_where_the_user_can_say_so():
    assert check_same_run("x", {"a": 1}, {"a": 2}, allowed=["a"]) is False
    with pytest.raises(
        InputError, match="restore them, use another --workdir, or allow them by --allow=a "
    ):
        check_same_run("x", {"a": 1}, {"a": 2}, allowed=[])
    with pytest.raises(InputError, match="restore them, or use another --workdir .*a: 1 -> 2"):
        check_same_run("x", {"a": 1}, {"a": 2}, allowed=None)


def events(folder) -> list[tuple[int, str, float]]:
    """(step, tag, value) of a folder of TensorBoard files, read as TensorBoard does: length,
    checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def test_numbers_go_to_the_file_and_to_tensorboard(tmp_path):
    run(
        tmp_path,
        options=Options(trackers=("tensorboard",)),
        row_of=lambda step, values, seconds: {
            **values,
            "twice": 2 * values["loss"],
            "rate": 1 / seconds,
        },
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["sum"], row["twice"]) for row in rows] == [
        (i + 1, i, i * (i - 1) / 2, 2 * i) for i in range(6)
    ]
    assert all(row["seconds"] > 0 and row["input_seconds"] >= 0 and row["rate"] > 0 for row in rows)
    seen = events(tmp_path / "tensorboard")
    assert {(step, value) for step, tag, value in seen if tag == "twice"} == {
        (i + 1, 2.0 * i) for i in range(6)
    }
    assert {tag for _, tag, _ in seen} == {
        "loss",
        "sum",
        "twice",
        "rate",
        "seconds",
        "input_seconds",
        "wall_seconds",
        "goodput",
    }


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(tmp_path, monkeypatch):
    # None is Python's way to say that it cannot be imported.
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        InputError, match=r"package wandb is not installed; pip install 'dnd-jax\[trackers\]'"
    ):
        run(tmp_path, options=Options(trackers=("wandb",)))


def test_a_window_of_steps_is_traced(tmp_path):
    run(tmp_path, options=Options(profile=(2, 4)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_batches_are_made_ahead_in_order_and_their_faults_arrive(tmp_path):
    made, main = [], threading.current_thread()

    def batch_at(i):
        made.append((i, threading.current_thread() is main))
        if i == 4:
            raise InputError("row 4 is damaged")
        return jnp.float32(i)

    with pytest.raises(InputError, match="row 4 is damaged"):
        run(tmp_path, batch_at=batch_at)
    assert made[:5] == [(i, False) for i in range(5)]
    assert float(run(tmp_path)["sum"]) == 15  # goes on from the last good step


def failing(error: OSError, at: int = 4):
    """A function of the step that raises at one of them."""

    def at_step(i, *state):
        if i == at:
            raise error
        return jnp.float32(i)

    return at_step


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(2, "No such file or directory", "e/s.npy"), "e/s.npy: cannot be read .No such"),
        (OSError(5, "Input/output error"), "the training data: cannot be read .Input/output"),
    ],
)
def test_an_input_that_cannot_be_read_is_said_to_be_that(tmp_path, error, said):
    """Not "cannot write": the disk that is written to is well."""
    with pytest.raises(InputError, match=f"^{said}"):
        run(tmp_path, batch_at=failing(error))
    assert float(run(tmp_path)["sum"]) == 15


@pytest.mark.parametrize(
    "error, said",
    [
        (
            OSError(28, "No space left on device"),
            "run: cannot write .No space left on device.; free",
        ),
        (
            OSError(13, "Permission denied", "run/x"),
            "run/x: cannot write .Permission denied.; free",
        ),
        (OSError(2, "No such file", "base/x"), "base/x: cannot be read .No such file.$"),
        (ConnectionResetError("by the tracker"), "run: ConnectionResetError .by the tracker.; run"),
        (InputError("x: No space left"), "x: No space left$"),
    ],
)
def test_faults_of_the_system_are_called_what_they_are(tmp_path, monkeypatch, error, said):
    monkeypatch.chdir(tmp_path)  # a relative --workdir
    with pytest.raises(InputError, match=f"{said}"):
        run(pathlib.Path("run"), after_step=failing(error))
    assert float(run(pathlib.Path("run"))["sum"]) == 15


def test_numbers_that_changed_on_the_disk_are_noticed(tmp_path, capfd):
    """A page of zeros in the middle of a file, as after a power cut: no length differs, and every
    file can be read."""
    state = {
        "sum": jnp.float32(0),
        "large": jax.random.normal(jax.random.key(0), (300, 1000)),
        "small": jnp.ones(3, jnp.bfloat16),
    }
    expected = run(tmp_path / "whole", steps=8, state=state)
    run(tmp_path / "run", steps=6, state=state)
    file = max(
        (tmp_path / "run/checkpoints/6").rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    file.write_bytes(content)
    found = run(tmp_path / "run", steps=8, state=state)
    assert "6 is damaged" in capfd.readouterr().out
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, expected))


def test_sums_are_of_every_bit_and_of_no_mesh():
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8) / 7
    state = {
        "a": x,
        "b": x.astype(jnp.bfloat16),
        "c": jnp.int32(-5),
        "d": jnp.arange(5, dtype=jnp.int8),
    }
    mesh = jax.make_mesh((8,), ("x",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = {
        key: jax.device_put(value, where if value.ndim == 2 else whole)
        for key, value in state.items()
    }
    bits = [
        np.asarray(value).reshape(-1).view(f"u{value.dtype.itemsize}").astype(np.uint64)
        for value in state.values()
    ]
    assert sums(state) == sums(spread) == [int(b.sum()) % 2**32 for b in bits]
    assert sums({**state, "a": x.at[3, 3].set(-x[3, 3])})[0] != sums(state)[0]


def test_checkpoints_that_stay(tmp_path):
    run(tmp_path, steps=12, options=Options(keep_last=1, keep_every=4))
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == {4, 8, 12}
    elsewhere = tmp_path / "elsewhere"
    run(tmp_path / "b", options=Options(checkpoint_dir=str(elsewhere)))
    assert (elsewhere / "6").is_dir() and not (tmp_path / "b/checkpoints").exists()


@pytest.mark.parametrize("record", [{"step": 2}, ["settings"]], ids=str)
def test_a_checkpoint_of_another_program_is_named_and_left_as_it_is(tmp_path, record):
    state = ocp.args.StandardSave({"sum": jnp.float32(0)})
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(2, args=ocp.args.Composite(state=state, record=ocp.args.JsonSave(record)))
    with pytest.raises(
        InputError,
        match=r"checkpoints/2: its record has no settings: not made by dnd; use another folder",
    ):
        run(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2"}


def test_a_run_that_lost_its_folder_writes_no_checkpoint(tmp_path, monkeypatch):
    """Another run has it: what that one has saved is not to be mixed with this one's."""
    monkeypatch.setattr(stop, "lost", "")

    def batch_at(i):
        if i == 4:
            stop.lost = "another run has taken this one's lock"
        return jnp.float32(i)

    after = []
    with pytest.raises(Lost, match="another run"):
        run(tmp_path, batch_at=batch_at, steps=50, after_step=lambda i, _: after.append(i))
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert max(saved, default=0) <= max(after, default=0) <= 4


def test_fewer_steps_than_were_trained_are_refused(tmp_path):
    run(tmp_path, steps=6)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(
        InputError,
        match="holds 6 steps, 4 are asked for; ask for 6 or more, or train fewer in another "
        "--workdir",
    ):
        run(tmp_path, steps=4)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert float(run(tmp_path, steps=6)["sum"]) == 15


@pytest.mark.parametrize("harm", ["truncated", "deleted", "foreign"])
def test_a_harmed_checkpoint_leaves_the_one_before(tmp_path, harm, capfd):
    expected = float(run(tmp_path / "whole", steps=8)["sum"])
    run(tmp_path / "run", steps=6)
    newest = tmp_path / "run/checkpoints/6"
    for path in [p for p in newest.rglob("*") if p.is_file()]:
        if harm == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif harm == "deleted":
            path.unlink()
        else:
            path.write_bytes(b"something else")
    assert float(run(tmp_path / "run", steps=8)["sum"]) == expected
    assert "6 is damaged" in capfd.readouterr().out
    for path in [p for p in (tmp_path / "run/checkpoints").rglob("*") if p.is_file()]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint can be read"):
        run(tmp_path / "run", steps=10)


def test_checkpoints_that_orbax_cannot_list_are_named(tmp_path):
    run(tmp_path)
    folder = tmp_path / "checkpoints"
    metadata = max(folder.glob("*/_CHECKPOINT_METADATA"), key=lambda path: int(path.parent.name))
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"item_handlers": [[]]}))
    with pytest.raises(
        InputError, match=f"{folder}: Orbax cannot list .*CHECKPOINT_METADATA; move"
    ):
        run(tmp_path, steps=8)
    metadata.parent.rename(tmp_path / "aside")
    run(tmp_path, steps=8)


def test_a_folder_with_a_number_that_is_no_checkpoint_stays(tmp_path):
    """In the folder that config.train.checkpoint_dir names: Orbax would remove it."""
    (tmp_path / "7" / "photos").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path}/7: is no checkpoint of a run, and would be"):
        open_checkpoints(tmp_path)
    assert (tmp_path / "7" / "photos").is_dir()
    (tmp_path / "7").rename(tmp_path / "seven")
    open_checkpoints(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {"seven", "notes"}


@pytest.mark.parametrize("line", ["{}", '{"step": "x"}', "[1]}", '{"step": 1}}', '{"loss": 1}'])
def test_metrics_that_are_none(line, tmp_path):
    """Also those of a run that goes on."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3, "lo')
    for read in (read_metrics, lambda folder: Metrics(folder, 3)):
        with pytest.raises(InputError, match="metrics.jsonl:2"):
            read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3, "lo')  # a power cut
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_state_is_saved_after_so_many_seconds_too(tmp_path, monkeypatch):
    """Steps of 10 seconds: the clock is read where half of what was left would be over."""
    clock = {"now": 0.0, "read": 0}

    def read():
        clock["read"] += 1
        return clock["now"]

    def pass_by(done, state):
        clock["now"] += 10 if done < 25 else 40

    monkeypatch.setattr("dnd_jax.loop.saves.time.perf_counter", read)
    how = {"after_step": pass_by, "save_every": 1000, "save_every_seconds": 100}
    run(tmp_path, 30, options=Options(keep_last=9), **how)
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [10, 20, 26, 29, 30]


def test_goodput_counts_what_was_lost_over_all_starts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dnd_jax.loop.metrics.time.time", lambda: now[0])

    def start(step: int, *after: tuple[float, float]):
        """Steps that end so many seconds later, of which the second number are good."""
        metrics = Metrics(tmp_path, step)
        for i, (seconds, good) in enumerate(after, step + 1):
            now[0] += seconds
            metrics.write({"step": i, "loss": 1.0}, good)
        metrics.close()
        return [row["goodput"] for row in read_metrics(tmp_path)]

    assert start(0, (30, 0), (10, 10), (10, 10)) == [0, 0.25, 0.4]  # 30 s of compiling
    now[0] += 40
    found = start(2, (30, 0), (10, 10))  # the third step is done again
    np.testing.assert_allclose(found, [0, 0.25, 10 / 120, 20 / 130], atol=1e-6)
    rows = read_metrics(tmp_path)
    assert rows[-1]["time"] == 230 and rows[-1]["wall_seconds"] == 130
    assert start(0, (20, 10))[0] == pytest.approx(10 / 150, abs=1e-6)  # all of it again
    (tmp_path / "metrics.jsonl").write_text("{}}\n")
    assert start(0, (10, 10)) == [1]  # of what is written anew nothing is asked


PROGRAM = """
import sys, pathlib, jax, jax.numpy as jnp
sys.path.insert(0, sys.argv[1])
from tests.loop.test_run import run
run(pathlib.Path(sys.argv[2]))
"""


def test_a_start_says_which_programs_it_has_read(tmp_path):
    """A toy's, by processes of their own, which keep every program."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    said = []
    for name in ("first", "second"):
        words = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path / name)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(re.search(r"programs: (\d+) of (\d+) read from (\S+),", done.stdout))
    assert said[0][1] == "0" != said[1][1] == said[1][2]
    assert said[1][3] == str(tmp_path / "programs")
