"""Contents decide, and a file that is known is not read again."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import time

import numpy as np
import pytest

from dnd_jax.core import digests, files
from dnd_jax.core.errors import InputError

OLD = 1_600_000_000_000_000_000  # nanoseconds: files that changed long ago


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, which keeps files of any size and age."""
    monkeypatch.setenv(files.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "SETTLED", -(2**62))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read."""
    names, read = [], digests._read

    def recorded(path, bar):
        names.append(path.name)
        return read(path, bar)

    monkeypatch.setattr(digests, "_read", recorded)
    return names


def write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.write_bytes(content)
    os.utime(path, ns=(OLD, OLD))
    return path


def test_a_file_is_read_once(tmp_path, reads):
    path = write(tmp_path / "weights", b"abc" * 10_000_000)  # more than one block
    right = hashlib.sha256(b"abc" * 10_000_000).hexdigest()
    assert digests.of_file(path) == right
    assert digests.of_file(path) == right
    (tmp_path / "link").symlink_to(path)
    assert digests.of_file(tmp_path / "link") == right  # another spelling of it
    assert reads == ["weights"]


def test_a_replaced_file_of_the_same_size_and_time_is_read_again(tmp_path, reads):
    path = write(tmp_path / "weights", b"one")
    before = digests.of_file(path)
    write(tmp_path / "new", b"two").replace(path)  # another inode, all else the same
    assert digests.of_file(path) == hashlib.sha256(b"two").hexdigest() != before
    assert reads == ["weights", "weights"]


def _in_place(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)


def _copied(path: pathlib.Path, content: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(content)
    shutil.copyfile(other, path)


def _renamed(path: pathlib.Path, content: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)


@pytest.mark.parametrize("replace", [_in_place, _copied, _renamed])
def test_a_time_that_is_set_back_hides_nothing(tmp_path, reads, replace):
    """As `touch -r`, `cp -p` and `rsync -t` leave it: the same name, size and time of contents."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    stat = path.stat()
    assert digests.of_file(path) == digests.of_file(path) == hashlib.sha256(b"one").hexdigest()
    time.sleep(0.05)  # clocks of file systems tick in milliseconds
    replace(path, b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests.of_file(path) == hashlib.sha256(b"two").hexdigest()
    assert reads == ["weights", "weights"]


def test_a_file_that_has_just_changed_is_not_kept(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 2 * 10**9)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    stat = path.stat()
    digests.of_file(path)
    path.write_bytes(b"two")  # in place: the same inode and size, and, on some disks, time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests.of_file(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("damage", [b"", b"\0" * 90, b"[3, ", b"{}", b"[3, 1, 2, 5]", b'"abc"'])
def test_a_damaged_entry_is_made_again(tmp_path, cache, damage, reads):
    path = write(tmp_path / "weights", b"abc")
    right = digests.of_file(path)
    (entry,) = cache.rglob("*.json")
    entry.write_bytes(damage)
    assert digests.of_file(path) == right == digests.of_file(path)
    assert len(reads) == 2


def test_without_a_cache_the_process_remembers(tmp_path, monkeypatch, reads):
    (tmp_path / "file").touch()
    monkeypatch.setenv(files.CACHE, str(tmp_path / "file"))
    path = write(tmp_path / "weights", b"abc")
    for _ in range(2):
        assert digests.of_file(path) == hashlib.sha256(b"abc").hexdigest()
    write(tmp_path / "new", b"two").replace(path)
    assert digests.of_file(path) == hashlib.sha256(b"two").hexdigest()
    assert reads == ["weights", "weights"]


def test_a_user_without_a_home_has_no_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(files.CACHE, "~no-such-user-anywhere/cache")
    path = write(tmp_path / "weights", b"abc")
    assert digests.of_file(path) == hashlib.sha256(b"abc").hexdigest()
    assert os.listdir(tmp_path) == ["weights"]


def _hash_all(folder: pathlib.Path) -> str:
    digests.LARGE, digests.SETTLED = 1, -(2**62)
    return digests.of_files({path.name: path for path in folder.iterdir()})


def test_many_processes_at_once(tmp_path, cache):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(20):
        write(folder / f"{i}", b"%d" % i)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len({*pool.map(_hash_all, [folder] * 6), _hash_all(folder)}) == 1
    assert all(json.loads(entry.read_text()) for entry in cache.rglob("*.json"))
    assert len(list(cache.rglob("*.json"))) == 20
    assert not list(cache.rglob(".*"))  # no part is left


def test_files_under_their_names(tmp_path):
    a, b = write(tmp_path / "a", b"1"), write(tmp_path / "b", b"2")
    (tmp_path / "moved").mkdir()
    moved = write(tmp_path / "moved" / "x", b"1")
    digest = digests.of_files({"a": a, "b": b})
    assert digest == digests.of_files({"b": b, "a": moved})
    assert digest != digests.of_files({"a": b, "b": a})
    with pytest.raises(InputError, match=r"absent: cannot be read \(No such file"):
        digests.of_files({"a": a, "b": tmp_path / "absent"})


def test_texts_json_and_arrays():
    assert digests.of_text("a", b"b") == hashlib.sha256(b"ab").hexdigest()
    assert digests.of_texts(["a", "b"]) != digests.of_texts(["ab"])
    assert digests.of_json({"a": 1, "b": [2]}) == digests.of_json({"b": [2], "a": 1})
    arrays = [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 3), np.float32), np.ones((2, 3))]
    assert len({digests.of_array(x) for x in arrays}) == 4
    assert digests.of_array(np.ones((4, 6))[::2, ::2]) == digests.of_array(arrays[3])


def test_nothing_else_hashes():
    package = pathlib.Path(digests.__file__).parents[1]
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\bhashlib\b", path.read_text())
    ]
    assert found == ["core/digests.py"]
