"""The folder of kept adapters: its limit, what goes and what stays, and what is found again."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import pytest

from dnd_jax.core.errors import InputError
from dnd_jax.serving.store import ADAPTER, ENTRY, AdapterStore, InUse, NoRoom

SIZE = 100


def put(store: AdapterStore, id: str, size: int = SIZE):
    def write(folder: pathlib.Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * size)

    of = {"base": "b", "rank": 2, "seed": 0, "strength": 1.0, "prompts": 4}
    more = {"seconds": 0.1, "made": 0.0, "closest": (("task", 0.5),), "warnings": ("far",)}
    return store.put(id, size, write, **of, **more)


def ids(store: AdapterStore) -> list[str]:
    return [entry.id for entry in store.entries()]


def on_disk(store: AdapterStore) -> set[str]:
    return {path.name for path in (store.folder / "adapters").iterdir()}


def test_the_longest_unused_goes_first(tmp_path):
    store = AdapterStore(tmp_path, 3 * SIZE)
    for id in "abc":
        put(store, id)
    store.get("a")
    put(store, "d")
    assert ids(store) == ["d", "a", "c"] and on_disk(store) == {"a", "c", "d"}
    assert store.get("b") is None and store.bytes == 3 * SIZE


def test_one_in_use_never_goes(tmp_path):
    store = AdapterStore(tmp_path, 2 * SIZE)
    put(store, "a"), put(store, "b")
    with store.hold("a") as entry:
        put(store, "c")
        assert pathlib.Path(entry.path).is_dir() and on_disk(store) == {"a", "c"}
        with pytest.raises(InUse):
            store.delete("a")
        with store.hold("c"), pytest.raises(NoRoom):
            put(store, "d")
        assert on_disk(store) == {"a", "c"}
    put(store, "d")
    assert on_disk(store) == {"c", "d"}
    with store.hold("a") as gone:
        assert gone is None


@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "hold", "free", "delete"]), st.integers(0, 5)),
        max_size=40,
    )
)
def test_the_limit_holds_and_what_is_held_stays(tmp_path_factory, steps):
    store = AdapterStore(tmp_path_factory.mktemp("store"), 3 * SIZE)
    held: dict[str, contextlib.ExitStack] = {}
    for what, number in steps:
        id = f"id{number}"
        if what == "put":
            with contextlib.suppress(NoRoom):
                put(store, id)
        elif what == "get":
            store.get(id)
        elif what == "hold" and store.get(id) and id not in held:
            held[id] = contextlib.ExitStack()
            held[id].enter_context(store.hold(id))
        elif what == "free" and id in held:
            held.pop(id).close()
        elif what == "delete":
            with contextlib.suppress(InUse):
                store.delete(id)
        assert store.bytes == SIZE * len(ids(store)) <= store.limit
        assert on_disk(store) == set(ids(store)) >= held.keys()
    again = AdapterStore(store.folder, store.limit)
    assert set(ids(again)) == set(ids(store))
    shutil.rmtree(store.folder)


def test_it_is_found_again_in_the_order_of_use(tmp_path):
    store = AdapterStore(tmp_path / "one", 10 * SIZE)
    for i, id in enumerate("abc"):
        put(store, id)
        os.utime(store.folder / "adapters" / id, (i, i))
    store.get("a")
    shutil.move(tmp_path / "one", tmp_path / "two")
    again = AdapterStore(tmp_path / "two", 10 * SIZE)
    assert ids(again) == ["a", "c", "b"]
    entry = again.get("b")
    assert entry.path == str(tmp_path / "two/adapters/b" / ADAPTER)
    assert entry.closest == (("task", 0.5),) and entry.warnings == ("far",)


def test_a_smaller_limit_takes_effect_at_the_start(tmp_path):
    store = AdapterStore(tmp_path, 10 * SIZE)
    for i, id in enumerate("abc"):
        put(store, id)
        os.utime(tmp_path / "adapters" / id, (i, i))
    assert ids(AdapterStore(tmp_path, 2 * SIZE)) == ["c", "b"]
    assert on_disk(store) == {"b", "c"}


@pytest.mark.parametrize("damage", ["no entry", "no adapter", "another id", "no JSON", "a file"])
def test_what_is_not_whole_is_removed(tmp_path, damage):
    store = AdapterStore(tmp_path, 10 * SIZE)
    put(store, "a"), put(store, "b")
    path = tmp_path / "adapters/a"
    if damage == "no entry":
        (path / ENTRY).unlink()
    elif damage == "no adapter":
        shutil.rmtree(path / ADAPTER)
    elif damage == "another id":
        path.rename(path.with_name("c"))
    elif damage == "no JSON":
        (path / ENTRY).write_text('{"id": "a"')
    else:
        shutil.rmtree(path)
        path.write_text("x")
    (tmp_path / "adapters/.b.123").mkdir()
    assert ids(AdapterStore(tmp_path, 10 * SIZE)) == ["b"] and on_disk(store) == {"b"}


def test_killed_while_it_writes_it_keeps_only_whole_ones(tmp_path):
    script = (
        "import pathlib, sys\n"
        "from dnd_jax.serving.store import AdapterStore\n"
        "store = AdapterStore(sys.argv[1], 10**9)\n"
        "of = dict(base='b', rank=2, seed=0, strength=1.0, prompts=4, seconds=0.1, made=0.0)\n"
        "def write(folder):\n"
        "    folder.mkdir()\n"
        "    for i in range(20):\n"
        "        (folder / str(i)).write_bytes(b'x' * 1000)\n"
        "        print(flush=True)\n"
        "for i in range(10**6):\n"
        "    store.put(f'id{i}', 20000, write, **of)\n"
    )
    for lines in (25, 47, 61):
        killed = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / str(lines)], stdout=subprocess.PIPE
        )
        for _ in range(lines):
            killed.stdout.readline()
        killed.kill()
        killed.wait()
        store = AdapterStore(tmp_path / str(lines), 10**9)
        assert ids(store) and on_disk(store) == set(ids(store))
        assert all(len(os.listdir(entry.path)) == 20 for entry in store.entries())


def test_a_failed_write_leaves_nothing(tmp_path):
    store = AdapterStore(tmp_path, 10 * SIZE)

    def write(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="cannot write"):
        store.put("a", SIZE, write)
    assert not on_disk(store) and ids(store) == []


def test_many_threads(tmp_path):
    store = AdapterStore(tmp_path, 10 * SIZE)

    def work(seed: int) -> None:
        for i in range(30):
            put(store, f"id{seed}-{i}")
            with store.hold(f"id{seed}-{i}") as entry:
                assert entry is None or pathlib.Path(entry.path, "weights").is_file()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert on_disk(store) == set(ids(store)) and store.bytes <= store.limit


def test_names_stand_for_orders(tmp_path):
    store = AdapterStore(tmp_path, SIZE)
    store.call("mine", {"prompts": ["a"]})
    store.call("mine", {"prompts": ["a"]})
    with pytest.raises(InputError, match="stands for another order"):
        store.call("mine", {"prompts": ["b"]})
    for name in ("../up", "a/b", "", ".hidden", "x" * 300):
        with pytest.raises(InputError):
            store.call(name, {"prompts": ["a"]})
        assert store.order_of(name) == {}
    assert store.names() == ["mine"] and store.order_of("mine") == {"prompts": ["a"]}
    store.forget("mine")
    assert store.names() == []
    (tmp_path / "names/bad.json").write_text("[1")
    assert store.order_of("bad") == {}
