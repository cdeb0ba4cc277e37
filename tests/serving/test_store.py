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
from dnd_jax.serving.store import ADAPTER, ENTRY, SERVED, AdapterStore, InUse, NoRoom

SIZE = 100


def key(name: str) -> str:
    """An id, which says what it is of."""
    return name.encode().hex().rjust(32, "0")


def named(id: str) -> str:
    return bytes.fromhex(id).lstrip(b"\0").decode() if not id.startswith(".") else id


def put(store: AdapterStore, name: str, size: int = SIZE):
    def write(folder: pathlib.Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * size)

    of = {"base": "b", "rank": 2, "seed": 0, "strength": 1.0, "prompts": 4}
    more = {"seconds": 0.1, "made": 0.0, "closest": (("task", 0.5),), "warnings": ("far",)}
    return store.put(key(name), size, write, **of, **more)


def ids(store: AdapterStore) -> list[str]:
    return [named(entry.id) for entry in store.entries()]


def on_disk(store: AdapterStore) -> set[str]:
    return {named(path.name) for path in (store.folder / SERVED).iterdir()}


def test_the_longest_unused_goes_first(tmp_path):
    store = AdapterStore(tmp_path, 3 * SIZE)
    for id in "abc":
        put(store, id)
    store.get(key("a"))
    put(store, "d")
    assert ids(store) == ["d", "a", "c"] and on_disk(store) == {"a", "c", "d"}
    assert store.get(key("b")) is None and store.bytes == 3 * SIZE


def test_one_in_use_never_goes(tmp_path):
    store = AdapterStore(tmp_path, 2 * SIZE)
    put(store, "a"), put(store, "b")
    with store.hold(key("a")) as entry:
        put(store, "c")
        assert pathlib.Path(entry.path).is_dir() and on_disk(store) == {"a", "c"}
        with pytest.raises(InUse):
            store.delete(key("a"))
        with store.hold(key("c")), pytest.raises(NoRoom):
            put(store, "d")
        assert on_disk(store) == {"a", "c"}
    put(store, "d")
    assert on_disk(store) == {"c", "d"}
    with store.hold(key("a")) as gone:
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
            store.get(key(id))
        elif what == "hold" and store.get(key(id)) and id not in held:
            held[id] = contextlib.ExitStack()
            held[id].enter_context(store.hold(key(id)))
        elif what == "free" and id in held:
            held.pop(id).close()
        elif what == "delete":
            with contextlib.suppress(InUse):
                store.delete(key(id))
        assert store.bytes == SIZE * len(ids(store)) <= store.limit
        assert on_disk(store) == set(ids(store)) >= held.keys()
    again = AdapterStore(store.folder, store.limit)
    assert set(ids(again)) == set(ids(store))
    shutil.rmtree(store.folder)


def test_it_is_found_again_in_the_order_of_use(tmp_path):
    store = AdapterStore(tmp_path / "one", 10 * SIZE)
    for i, id in enumerate("abc"):
        put(store, id)
        os.utime(store.folder / SERVED / key(id), (i, i))
    store.get(key("a"))
    shutil.move(tmp_path / "one", tmp_path / "two")
    again = AdapterStore(tmp_path / "two", 10 * SIZE)
    assert ids(again) == ["a", "c", "b"]
    entry = again.get(key("b"))
    assert entry.path == str(tmp_path / "two" / SERVED / key("b") / ADAPTER)
    assert entry.closest == (("task", 0.5),) and entry.warnings == ("far",)


def test_a_smaller_limit_takes_effect_at_the_start(tmp_path):
    store = AdapterStore(tmp_path, 10 * SIZE)
    for i, id in enumerate("abc"):
        put(store, id)
        os.utime(tmp_path / SERVED / key(id), (i, i))
    assert ids(AdapterStore(tmp_path, 2 * SIZE)) == ["c", "b"]
    assert on_disk(store) == {"b", "c"}


@pytest.mark.parametrize("damage", ["no entry", "no adapter", "another id", "no JSON"])
def test_what_is_not_whole_is_removed(tmp_path, damage):
    store = AdapterStore(tmp_path, 10 * SIZE)
    put(store, "a"), put(store, "b")
    path = tmp_path / SERVED / key("a")
    if damage == "no entry":
        (path / ENTRY).unlink()
    elif damage == "no adapter":
        shutil.rmtree(path / ADAPTER)
    elif damage == "another id":
        path.rename(path.with_name(key("c")))
    else:
        (path / ENTRY).write_text('{"id": "a"')
    (tmp_path / SERVED / f".{key('b')}.123").mkdir()
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
        "    store.put(f'{i:032x}', 20000, write, **of)\n"
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
        kept = {path.name for path in (store.folder / SERVED).iterdir()}
        assert kept == {entry.id for entry in store.entries()} and kept
        assert all(len(os.listdir(entry.path)) == 20 for entry in store.entries())


def test_a_failed_write_leaves_nothing(tmp_path):
    store = AdapterStore(tmp_path, 10 * SIZE)

    def write(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="cannot write"):
        store.put(key("a"), SIZE, write)
    assert not on_disk(store) and ids(store) == []


def test_many_threads(tmp_path):
    store = AdapterStore(tmp_path, 10 * SIZE)

    def work(seed: int) -> None:
        for i in range(30):
            put(store, f"id{seed}-{i}")
            with store.hold(key(f"id{seed}-{i}")) as entry:
                assert entry is None or pathlib.Path(entry.path, "weights").is_file()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert on_disk(store) == set(ids(store)) and store.bytes <= store.limit


def test_names_stand_for_orders(tmp_path):
    store, order = AdapterStore(tmp_path, 10 * SIZE), {"prompts": ["a"]}
    store.call("mine", key("a"), order)
    store.call("mine", key("a"), order)
    with pytest.raises(InputError, match="stands for another order"):
        store.call("mine", key("b"), {"prompts": ["b"]})
    for name in ("../up", "a/b", "", ".hidden", "x" * 300, key("a")):
        with pytest.raises(InputError):
            store.call(name, key("a"), order)
        assert store.order_of(name) == {} and store.id_of(name) == ""
    again = AdapterStore(tmp_path, 10 * SIZE)
    assert again.names() == ["mine"] and again.order_of("mine") == order
    assert again.id_of("mine") == key("a")
    again.call("other", key("b"), order)
    again.delete(key("a"))  # of which there is no adapter
    assert again.names() == ["other"] and len([*(tmp_path / "names").iterdir()]) == 1
    (tmp_path / "names/bad.json").write_text("[1")
    (tmp_path / "names/other.json").write_text('{"id": 1}')
    assert AdapterStore(tmp_path, SIZE).order_of("bad") == {} == again.order_of("other")


def test_names_count_too(tmp_path):
    store = AdapterStore(tmp_path, 10 * SIZE)
    put(store, "a")
    store.call("long", key("a"), {"prompts": ["x" * 5 * SIZE]})
    assert 6 * SIZE < store.bytes <= store.limit
    with pytest.raises(NoRoom):
        store.call("longer", key("a"), {"prompts": ["x" * 6 * SIZE]})
    assert store.names() == ["long"]


@pytest.mark.parametrize("name", ["boolq", "notes.txt", "a" * 31])
def test_a_folder_of_something_else_is_not_touched(tmp_path, name):
    (tmp_path / SERVED / name).mkdir(parents=True)
    with pytest.raises(InputError, match="--cache"):
        AdapterStore(tmp_path, SIZE)
    assert (tmp_path / SERVED / name).is_dir()


def test_an_adapter_that_somebody_removed_is_made_again(tmp_path):
    store = AdapterStore(tmp_path, 2 * SIZE)
    for name in "ab":
        put(store, name)
    shutil.rmtree(tmp_path / SERVED / key("a"))
    put(store, "c")  # for which the first one goes
    assert store.get(key("a")) is None and ids(store) == ["c", "b"]
    shutil.rmtree(tmp_path / SERVED / key("b"))
    assert store.get(key("b")) is None
    put(store, "b")
    assert on_disk(store) == {"b", "c"}
