"""Copies of a state on a host's own disk: whole or absent, of this run, the same bits."""

import json
import pathlib
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dnd_jax.config import schema
from dnd_jax.core.errors import InputError
from dnd_jax.loop.local_copies import LocalCopies
from dnd_jax.loop.run import run_loop
from dnd_jax.loop.training import Options, Training
from dnd_jax.parallel.mesh import make_mesh


def state_on(data: int, fsdp: int, step: int) -> dict:
    """Arrays of every kind that a training keeps, whose values say the step."""
    mesh = make_mesh(schema.Mesh(1, data, fsdp, 1, ()))
    split, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((None, "fsdp"), ()))
    values = np.arange(80, dtype=np.float32).reshape(5, 16) + step
    return {
        "kernel": jax.device_put(values, split),
        "moment": jax.device_put(values.astype(jnp.bfloat16), split),
        "norm": jax.device_put(values[0], whole),
        "step": jax.device_put(np.int32(step), whole),
    }


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.sharding.is_equivalent_to(other.sharding, one.ndim)
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def folders(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    (tmp_path / "run").mkdir()
    return tmp_path / "local", tmp_path / "run"


def test_the_newest_two_are_kept_and_come_back(folders):
    copies = LocalCopies(*folders, state_on(2, 4, 0))
    assert copies.steps() == []
    for step in (3, 5, 9):
        copies.save(step, state_on(2, 4, step), {"sums": [step]})
        copies.wait()
    again = LocalCopies(*folders, state_on(2, 4, 0))
    assert again.steps() == [9, 5] and again.record(9) == {"sums": [9]}
    assert_same(again.read(9), state_on(2, 4, 9))
    assert_same(again.read(5), state_on(2, 4, 5))
    assert len(list(folders[0].iterdir())) == 2
    again.clear()
    assert not list(folders[0].iterdir()) and again.steps() == []


def test_a_copy_is_of_the_state_that_it_was_given(folders):
    """The next step writes to the same memory."""
    state = state_on(8, 1, 0)
    copies = LocalCopies(*folders, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for done in range(1, 4):
        state = step(state)
        copies.save(done, state, {})
        copies.wait()
    assert_same(copies.read(3), state_on(8, 1, 3))
    assert_same(copies.read(2), state_on(8, 1, 2))


def test_what_was_cut_short_or_is_of_another_mesh_or_run_is_passed_over(folders, tmp_path):
    copies = LocalCopies(*folders, state_on(2, 4, 0))
    for step in (3, 5):
        copies.save(step, state_on(2, 4, step), {})
        copies.wait()
    assert LocalCopies(*folders, state_on(4, 2, 0)).read(5) is None
    other = {**state_on(2, 4, 0), "norm": jax.device_put(np.zeros(4), jax.devices()[0])}
    assert LocalCopies(*folders, other).read(5) is None
    newest = copies._path(5)
    newest.write_bytes(newest.read_bytes()[:-7])
    assert copies.steps() == [3]
    (tmp_path / "other").mkdir()
    assert LocalCopies(folders[0], tmp_path / "other", state_on(2, 4, 0)).steps() == []


def test_the_newest_copy_of_all_processes_stays(folders, monkeypatch):
    """Another process has no copy of 5: this one writes 7 over it, not over 3, which both have."""
    copies = LocalCopies(*folders, state_on(2, 4, 0))
    for step in (3, 5):
        copies.save(step, state_on(2, 4, step), {})
        copies.wait()
    monkeypatch.setattr(copies, "steps", lambda: [3])
    copies.save(7, state_on(2, 4, 7), {})
    copies.wait()
    assert sorted(map(copies._step, copies._files.values())) == [3, 7]


def test_a_copy_is_left_out_where_one_is_still_being_written(folders, monkeypatch):
    copies, through = LocalCopies(*folders, state_on(2, 4, 0)), threading.Event()
    monkeypatch.setattr("dnd_jax.loop.local_copies.sync", lambda path: through.wait(60))
    copies.save(3, state_on(2, 4, 3), {})
    copies.save(5, state_on(2, 4, 5), {})
    through.set()
    copies.wait()
    assert copies.steps() == [3]
    copies.save(7, state_on(2, 4, 7), {})
    copies.wait()
    assert copies.steps() == [7, 3]
    copies.keep_until(3)
    assert copies.steps() == [3]


def test_what_a_killed_process_and_another_number_of_them_left_is_removed(folders):
    copies = LocalCopies(*folders, state_on(2, 4, 0))
    copies.save(3, state_on(2, 4, 3), {})
    copies.wait()
    (copy,) = folders[0].iterdir()
    for name in (copies._partial.name, copy.name.replace("0_of_1", "1_of_2")):
        (folders[0] / name).write_bytes(bytes(9))
    (folders[0] / "of_another_run").write_bytes(bytes(9))
    again = LocalCopies(*folders, state_on(2, 4, 0))
    assert again.steps() == [3]
    assert {path.name for path in folders[0].iterdir()} == {copy.name, "of_another_run"}


def test_a_folder_without_room_is_named(folders, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1095))
    # 8 parts of two arrays, and two that all devices have: 320 + 160 + 64 + 4 bytes, twice.
    with pytest.raises(InputError, match=r"two copies of the state need .*local_dir"):
        LocalCopies(*folders, state_on(2, 4, 0))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1096))
    LocalCopies(*folders, state_on(2, 4, 0))


def test_a_disk_that_fills_up_leaves_the_run_its_checkpoints(folders, capfd, monkeypatch):
    copies = LocalCopies(*folders, state_on(2, 4, 0))
    copies.save(1, state_on(2, 4, 1), {})
    copies.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dnd_jax.loop.local_copies.write_safetensors", full)
    copies.save(2, state_on(2, 4, 2), {})
    copies.wait()
    assert "no local copy of step 2" in capfd.readouterr().err and copies.steps() == [1]


def write_at_once(monkeypatch) -> None:
    """Steps of a toy are faster than a thread."""
    save = LocalCopies.save
    monkeypatch.setattr(LocalCopies, "save", lambda self, *how: (save(self, *how), self.wait()))


def trained(run: pathlib.Path, local: pathlib.Path, steps: int, until: int = 99, **more):
    """(state, steps that were taken) of a sum over steps, with a copy after each of them."""
    taken = []

    class Killed(BaseException):
        pass

    def after(done, state):
        taken.append(done)
        if done == until:
            raise Killed

    step = jax.jit(lambda s, x: ({"sum": s["sum"] * 3 + x}, {"loss": x}), donate_argnums=0)
    zero = {"sum": jnp.float32(0)}
    training = Training(
        "toy", run, {"seed": 0}, zero, lambda: {"sum": jnp.float32(0)}, step, jnp.float32,
        steps=steps, after_step=after, **({"save_every": 1000} | more),
    )  # fmt: skip
    options = Options(local_dir=str(local), local_every_seconds=1)
    try:
        return run_loop(training, options), taken
    except Killed:
        return None, taken


def test_a_run_goes_on_from_the_newer_of_checkpoint_and_copy(tmp_path, monkeypatch, capsys):
    write_at_once(monkeypatch)
    clock = [0.0]

    def passing():
        clock[0] += 10
        return clock[0]

    monkeypatch.setattr("dnd_jax.loop.saves.time.perf_counter", passing)
    run, local = tmp_path / "run", tmp_path / "local"
    assert trained(run, local, 12, until=7)[1] == [1, 2, 3, 4, 5, 6, 7]
    state, taken = trained(run, local, 12)
    assert taken == [7, 8, 9, 10, 11, 12] and "copy of step 6" in capsys.readouterr().out
    whole, _ = trained(tmp_path / "whole", local, 12)
    assert float(state["sum"]) == float(whole["sum"])
    assert not list(local.iterdir())  # which has ended, and has its checkpoint
    # Deleted and begun anew, a run does not find what the one before had copied.
    trained(tmp_path / "again", local, 12, until=7)
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    assert trained(tmp_path / "again", local, 12, until=3)[1] == [1, 2, 3]
    # Nor does a copy of a run's folder.
    shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/checkpoints/12")
    assert trained(tmp_path / "other", local, 12, until=2)[1] == [1, 2]


def test_copies_newer_than_the_checkpoint_that_can_be_read(tmp_path, monkeypatch, capsys):
    """The checkpoint of 10 is damaged, that of 5 is not, and of 8 and 9 there are copies."""
    write_at_once(monkeypatch)
    monkeypatch.setattr("dnd_jax.loop.saves.time.perf_counter", iter(range(0, 9999, 10)).__next__)
    run, local = tmp_path / "run", tmp_path / "local"
    trained(run, local, 40, until=11, save_every=5)
    for path in (run / "checkpoints/10/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert trained(run, local, 40, until=12, save_every=5)[1] == [10, 11, 12]
    out = capsys.readouterr().out
    assert "10 is damaged" in out and "going on from the copy of step 9" in out


def test_a_copy_of_other_settings_or_with_changed_numbers(tmp_path, monkeypatch, capsys):
    write_at_once(monkeypatch)
    monkeypatch.setattr("dnd_jax.loop.saves.time.perf_counter", iter(range(0, 9999, 10)).__next__)
    run, local = tmp_path / "run", tmp_path / "local"
    trained(run, local, 12, until=7)
    newest = max(local.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert trained(run, local, 12, until=7)[1] == [6, 7]
    out = capsys.readouterr().out
    assert "copy of step 6 in local_dir is damaged" in out and "from the copy of step 5" in out
    record = json.dumps({"settings": {"seed": 1}, "sums": []})
    monkeypatch.setattr(LocalCopies, "record", lambda self, step: json.loads(record))
    with pytest.raises(InputError, match="copy of step .* seed: 1 -> 0"):
        trained(run, local, 12)
