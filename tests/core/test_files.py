"""Outputs: whole at every instant, on the disk, readable as the umask says; caches that notice
damage."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from dnd_jax.core import files
from dnd_jax.core.arrays import SAMPLES, open_array, write_array
from dnd_jax.core.errors import InputError
from dnd_jax.core.exchange import exchange
from dnd_jax.core.files import read_json, replacing, write_json
from dnd_jax.core.tensors import read_safetensors, write_safetensors
from dnd_jax.core.workdir import timed

ROOT = pathlib.Path(__file__).parents[2]


def write_folder(path: pathlib.Path, word: str) -> None:
    """A folder of three files that hold one word."""
    with replacing(path, directory=True) as temporary:
        (temporary / "inner").mkdir()
        for name in ("a", "b", "inner/c"):
            (temporary / name).write_text(word)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_json_that_python_does_not_read_is_refused(tmp_path, text):
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(InputError, match="suite.json: not JSON that can be read"):
        read_json(tmp_path / "suite.json")


# Writes such a folder again and again under names that other processes write at the same time.
WRITES = """
import pathlib, sys, time
from dnd_jax.core.files import replacing
for i in range(300):
    while time.time() < float(sys.argv[2]) + i / 100:
        pass
    with replacing(pathlib.Path(sys.argv[1]) / str(i), directory=True) as temporary:
        (temporary / "file").write_text("x")
"""


def test_processes_that_write_the_same_folders_do_not_fail(tmp_path):
    """As trainings do that share a cache: whichever is last, a whole folder is there."""
    how = [sys.executable, "-c", WRITES, str(tmp_path), str(time.time() + 2)]
    writers = [subprocess.Popen(how, cwd=ROOT) for _ in range(3)]
    assert [w.wait() for w in writers] == [0] * 3
    assert {p.name for p in tmp_path.iterdir()} == {str(i) for i in range(300)}
    assert all((tmp_path / str(i) / "file").read_text() == "x" for i in range(300))


def word_of(path: pathlib.Path) -> str:
    """The one word that all files of the folder hold."""
    (word,) = {(path / name).read_text() for name in ("a", "b", "inner/c")}
    return word


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_output_has_the_permissions_of_the_umask(tmp_path, umask):
    """Also where safetensors, or whatever else wrote the file, gave it others."""
    before = os.umask(umask)
    try:
        write_json(tmp_path / "x.json", {})
        with replacing(tmp_path / "a", directory=True) as temporary:
            write_safetensors(temporary / "w.safetensors", {"x": np.ones(3, np.float32)})
            (temporary / "private").mkdir(mode=0o700)
            (temporary / "private/y").touch(mode=0o600)
        write_safetensors(tmp_path / "direct.safetensors", {"x": np.ones(3, np.float32)})
    finally:
        os.umask(before)
    assert read_safetensors(tmp_path / "a/w.safetensors")["x"].tolist() == [1, 1, 1]
    for path in tmp_path.rglob("*"):
        wanted = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~umask, path


def test_what_a_link_leads_to_keeps_its_permissions(tmp_path):
    (tmp_path / "others").mkdir(mode=0o700)
    (tmp_path / "others/file").touch(mode=0o600)
    with replacing(tmp_path / "a", directory=True) as temporary:
        (temporary / "file").symlink_to(tmp_path / "others/file")
        (temporary / "folder").symlink_to(tmp_path / "others")
        (temporary / "nothing").symlink_to(tmp_path / "absent")
    assert len(os.listdir(tmp_path / "a")) == 3
    assert stat.S_IMODE((tmp_path / "others").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "others/file").stat().st_mode) == 0o600


# Kills itself with SIGKILL at the N-th line that is run of the code that replaces a folder.
KILLED = """
import os, pathlib, sys
sys.path[:0] = ["tests", "tests/core"]
import shutil
from dnd_jax.core import exchange, files
from kill_points import killed_at
from test_files import write_folder
os.fsync = lambda file: None  # a thousand waits for the disk are not what is tried here
if sys.argv[2] == "two renames":
    files.exchange = lambda one, other: False
watched = {files.__file__, exchange.__file__, shutil.__file__}
path = pathlib.Path(sys.argv[1])
write_folder(path, "old")
point = 0
while True:
    point += 1
    killed = killed_at(
        point, lambda code: code.co_filename in watched, lambda: write_folder(path, "new")
    )
    print("killed" if killed else "done", flush=True)
    sys.stdin.readline()  # the test looks
    if not killed:
        break
    write_folder(path, "old")
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_writer_killed_at_any_line_leaves_the_old_folder_or_the_new(tmp_path, way):
    """And the next writer leaves nothing beside it."""
    path = tmp_path / "adapter"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, way],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    found, absent = [], 0
    with process:
        while process.stdout.readline() == "killed\n":
            if not path.is_dir():
                absent += 1
                assert files.recover(path), "neither is there to be recovered"
            found.append(word_of(path))
            print(file=process.stdin, flush=True)
        assert word_of(path) == "new"
        print(file=process.stdin, flush=True)
    assert process.returncode == 0
    assert {"old", "new"} == set(found) and len(found) > 100
    assert absent == 0 if way == "exchange" else absent > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


POLL = """
import pathlib, sys
path, looked = pathlib.Path(sys.argv[1]), 0
print("looking", flush=True)
while not (path / "last").exists():
    (path / "a").read_text()
    looked += 1
print(looked)
"""


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="has no exchange")
def test_a_reader_never_misses_a_folder_that_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # more replacements in the time
    path = tmp_path / "adapter"
    write_folder(path, "0")
    reader = subprocess.Popen(
        [sys.executable, "-c", POLL, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout.readline() == "looking\n"
    for i in range(1, 301):
        write_folder(path, str(i))
    (path / "last").touch()
    out, error = reader.communicate(timeout=60)
    assert not error and int(out) > 300, error


def test_exchange_says_what_it_cannot(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError, match="other"):
        exchange(tmp_path / "one", tmp_path / "other")


def test_clean_up_removes_only_what_it_made(tmp_path):
    """Names like those of temporary folders, of a process that is gone, that hold something
    else."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = f".out.{files.socket.gethostname()}-{gone.pid}"
    kept = [
        f"{mine}-0123abcd-notes",
        f"{mine}-abc",
        f"{mine}-0123abce",
        ".out.elsewhere-1-0123abcd",
    ]
    for name in (*kept, f"{mine}-0123abcd"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{mine}-0123abce" / "diary").touch()
    (tmp_path / f"{mine}-0123abcd" / "out").touch()
    (tmp_path / f"{mine}-0123abcf").symlink_to(tmp_path / kept[0])
    write_json(tmp_path / "out", 1)
    assert {entry.name for entry in tmp_path.iterdir()} == {*kept, f"{mine}-0123abcf", "out"}


def test_everything_is_on_the_disk_before_and_after_it_is_renamed(tmp_path, monkeypatch):
    """The order of the calls: each file and folder inside, the rename, the folder around it."""
    calls = []
    monkeypatch.setattr(files, "sync", lambda path: calls.append(path.name))
    monkeypatch.setattr(
        files, "exchange", lambda *both: calls.append("exchange") or exchange(*both)
    )
    write_folder(tmp_path / "out", "w")
    calls.clear()
    write_folder(tmp_path / "out", "x")
    assert calls[-3:] == ["out", "exchange", tmp_path.name]
    assert sorted(calls[:-3]) == ["a", "b", "c", "inner"] and calls.index("c") < calls.index(
        "inner"
    )


def test_what_was_read_for_an_output_is_said_to_be_unreadable(tmp_path):
    """Not "cannot write": the file that is missing is another one, beside the output or not."""
    for missing in (tmp_path / "elsewhere/base.json", tmp_path / "base.json"):
        with (
            pytest.raises(InputError, match=f"^{missing}: cannot be read .No such file"),
            replacing(tmp_path / "out") as temporary,
        ):
            temporary.write_text(missing.read_text())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out: cannot write here .File exists"):
        write_json(tmp_path / "file/out", 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def array_file(folder: pathlib.Path, rows: int = 4000) -> tuple[pathlib.Path, np.ndarray]:
    values = np.random.default_rng(0).standard_normal((rows, 300)).astype(np.float32)
    write_array(folder / "x.npy", values.shape, values.dtype, np.split(values, 8))
    return folder / "x.npy", values


@pytest.mark.parametrize("rows", [8, 4000])
def test_arrays_come_back_and_numpy_reads_them(tmp_path, rows, capsys):
    path, values = array_file(tmp_path, rows)
    found = open_array(path)
    assert isinstance(found, np.memmap) and np.array_equal(found, values)
    assert np.array_equal(np.load(path), values)
    assert open_array(tmp_path / "absent.npy") is None and not capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    ["truncated", "empty", "all zeros", "zeros at the end", "zeros inside", "no record", "junk"],
)
def test_a_damaged_array_is_noticed_in_one_line(tmp_path, damage, capsys):
    """What a power cut leaves of a file that was never brought to the disk."""
    path, _ = array_file(tmp_path)
    size = path.stat().st_size
    zeros = {
        "all zeros": (0, size),
        "zeros at the end": (size - 512, 512),
        "zeros inside": (size // 2, 2 * size // SAMPLES),
    }
    if damage in zeros:
        at, length = zeros[damage]
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes(length))
    elif damage == "junk":
        path.write_text("not an array")
    else:
        os.truncate(path, {"truncated": size // 2, "empty": 0, "no record": size - 20}[damage])
    assert open_array(path) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: its ") and line.endswith("; it is made again")


def test_the_cost_of_opening_does_not_grow_with_the_array(tmp_path, monkeypatch):
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *call: read.append(call[1]) or real(*call))
    path = tmp_path / "x.npy"
    write_array(path, (1000, 1000, 40), np.float32, (np.ones((1000, 40), np.float32),) * 1000)
    read.clear()
    assert open_array(path).shape == (1000, 1000, 40) and sum(read) < 600_000


def test_a_stopped_writer_is_no_dead_one(tmp_path):
    """SIGSTOP: its temporary folder stays."""
    write = """
import sys, dnd_jax.core.files as f
with f.replacing(sys.argv[1]) as t:
    t.write_text('x'); print(t, flush=True); sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", write, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        left = pathlib.Path(process.stdout.readline().strip())
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        write_json(tmp_path / "out", 1)
        assert left.is_file()
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
    assert (tmp_path / "out").read_text() == "x"


def test_what_a_clean_up_may_remove(tmp_path):
    """Folders that hold nothing but what is written into such: no links, no folders inside."""
    for name, inside in (("ours", "ab"), ("part", "a"), ("empty", ""), ("foreign", "abc")):
        (tmp_path / name).mkdir()
        for file in inside:
            (tmp_path / name / file).touch()
    (tmp_path / "deep" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "file").touch()
    for name in (".DS_Store", "._a", ".nfs01"):
        (tmp_path / "part" / name).touch()
    names = [path.name for path in tmp_path.iterdir() if files.holds_only(path, "ab")]
    assert sorted(names) == ["empty", "ours", "part"]


TEXTS = {
    b"": ":1: not JSON .Expecting value: it is empty",
    b"\xff\xfe{\0}\0": ": is UTF-16; save the file as UTF-8",
    b'{"a": "caf\xe9"}': ":1: not UTF-8 at byte 10",
    b'{"a": "\\ud83d"}': ": .* ends in half of a character",
    b'{"a": [{"b\\uDC00": 1}]}': ": .* ends in half of a character",
    b'{\n"a": 1,\n}': ":3: not JSON",
    b'{"a": "\0"}': ":1: not JSON .Invalid control character",
    b"{} {}": ":1: not JSON .Extra data",
}


@pytest.mark.parametrize("raw", TEXTS, ids=ascii)
def test_files_that_are_no_json(raw, tmp_path):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(InputError, match=f"x.json{TEXTS[raw]}"):
        read_json(tmp_path / "x.json")


def test_json_with_a_mark_and_without_a_fault(tmp_path):
    value = {"a": ["\U0001f469", {"\n": None}]}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        (tmp_path / "x.json").write_text("\ufeff" + text, encoding="utf-8")
        assert read_json(tmp_path / "x.json") == value
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: is a folder, not a file"):
        read_json(tmp_path / "folder")
    with pytest.raises(InputError, match="absent: no such file"):
        read_json(tmp_path / "absent")


def test_a_key_that_is_there_twice(tmp_path):
    text = '{"a": 1, "b": {"c": 1, "c": 2}}'
    assert files.json_of(text, "x") == {"a": 1, "b": {"c": 2}}
    with pytest.raises(
        InputError, match="x: not JSON that can be read .the key 'c' is there twice"
    ):
        files.json_of(text, "x", once=True)


def test_many_keys_of_which_the_last_is_twice():
    pairs = [(str(i), i) for i in range(100_000)]
    with pytest.raises(ValueError, match="the key '99999' is there twice"):
        files.once_each([*pairs, pairs[-1]])


def test_an_object_of_ours(tmp_path):
    for value in ([], 3, None, "x"):
        write_json(tmp_path / "x.json", value)
        with pytest.raises(InputError, match="x.json: not a JSON object; remove it"):
            files.read_object(tmp_path / "x.json")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"train": "long"}', '{"train": null}', "\xff"])
def test_damaged_seconds_end_no_stage(content, tmp_path):
    (tmp_path / "seconds.json").write_text(content, encoding="latin-1")
    with timed(tmp_path, "train"):
        pass
    assert read_json(tmp_path / "seconds.json")["train"] < 60
