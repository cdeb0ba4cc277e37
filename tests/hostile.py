"""Hostile files: mutations of good ones, each given to `dnd` in this process; what happened is
printed as one JSON line a case. tests/test_hostile_files.py starts it and judges.

    python tests/hostile.py SPECIMEN FIRST COUNT GOOD FOLDER
"""

import contextlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

MADE = pathlib.Path(__file__).parent / "golden" / "cfc09d1"
SECONDS = 60  # a case that takes longer hangs
DEEP = 3000  # brackets in brackets


class Specimen(NamedTuple):
    """Good files, the command that reads them, and which of them are changed."""

    source: pathlib.Path  # a folder, copied for each case
    command: Callable[[pathlib.Path, pathlib.Path], list[str]]  # (its copy, what to write) -> words
    files: tuple[str, ...]  # patterns below it
    reads: Callable[[pathlib.Path], Any]  # what other libraries read; raises where they refuse
    workdir: bool = False  # the copy is the command's workdir, in which it may write


# --- What other libraries make of the same files


def _json_of(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _adapter(folder: pathlib.Path) -> None:
    import peft
    import safetensors.numpy

    for config in folder.rglob("adapter_config.json"):
        peft.PeftConfig.from_pretrained(config.parent)
    for path in folder.rglob("*.safetensors"):
        safetensors.numpy.load_file(path)


def _generator(folder: pathlib.Path) -> None:
    import safetensors.numpy

    _json_of(folder / "generator.json")
    for path in folder.rglob("*.safetensors"):
        safetensors.numpy.load_file(path)


def _base(folder: pathlib.Path) -> None:
    import transformers

    transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)


def _suite(folder: pathlib.Path) -> None:
    _json_of(folder / "suite.json")
    for path in folder.rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                json.loads(line)


def _released(folder: pathlib.Path) -> None:
    import torch

    torch.load(folder / "x.pth", weights_only=True)


def _any(folder: pathlib.Path) -> None:
    """Files that are ours alone: what counts is that nothing but 0, 1 or 2 comes of them."""


TINY = f"--config={pathlib.Path(__file__).parent / 'tiny.py'}"
# The folders of its training datasets.
TRAINED = tuple(f"{name}/*/adapter_*" for name in ("bird-colon", "dish-colon", "stone-rank"))
ALONE = "--config.evaluate.agreement=False"  # PyTorch would take seconds a case
LORA = "loras/bird-colon/step_000002"


def prepare(good: pathlib.Path, call: Callable[[list[str]], int]) -> None:
    """Writes the good files: a suite, a base, LoRAs, a generator of chunk tokens, its .pth."""
    shutil.copytree(MADE / "suite", good / "suite")
    for name in ("base", "loras"):
        shutil.copytree(MADE / "run" / name, good / name)
    settings = {
        "suite": good / "suite",
        "base.path": good / "base",
        "train.checkpoints": good / "loras",
        "train.steps": 1,
        "condition.encoder": good / "suite" / "vectors.txt",
        "generator.target": "chunk",
        "generator.kernel_size": 3,
        "generator.features": ((0, 0, 0), (4, 4, 8), (0, 0, 0)),
    }
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    assert call(["train", TINY, f"--workdir={good / 'run'}", *words]) == 0
    assert call(["export-generator", str(good / "run"), f"--out={good / 'pth' / 'x.pth'}"]) == 0
    # Of a finished run nothing but its record is read.
    written = ("generator.json", "model.safetensors", "statistics.safetensors")
    shutil.copytree(good / "run", good / "resumed", ignore=shutil.ignore_patterns(*written))


def specimens(good: pathlib.Path) -> dict[str, Specimen]:
    """Every kind of file, of those that `prepare` wrote."""
    run, prompts = good / "run", good / "suite/datasets/bird-rank/train.jsonl"
    settings = f"--config={run / 'config.json'}"
    return {
        "suite": Specimen(
            good / "suite",
            lambda x, out: ["data-report", f"--suite={x}"],
            ("suite.json", "corpus.jsonl", "datasets/*/*.jsonl"),
            _suite,
        ),
        "prompts": Specimen(
            good / "suite/datasets/bird-rank",
            lambda x, out: _generate(run, x / "train.jsonl", out),
            ("train.jsonl",),
            _any,
        ),
        "vectors": Specimen(
            good / "suite",
            lambda x, out: [
                *("doctor", settings, f"--checkpoints={good / 'loras'}", f"--workdir={out}", ALONE),
                f"--config.condition.encoder={x / 'vectors.txt'}",
            ],
            ("vectors.txt",),
            _any,
        ),
        "base": Specimen(
            good / "base",
            lambda x, out: ["doctor", f"--base={x}", f"--workdir={out}", ALONE],
            ("*",),
            _base,
        ),
        "loras": Specimen(
            good / "loras",
            lambda x, out: ["doctor", settings, f"--checkpoints={x}", f"--workdir={out}", ALONE],
            TRAINED,
            _adapter,
        ),
        "adapter": Specimen(
            good / LORA,
            lambda x, out: ["verify-adapter", str(x), f"--base={good / 'base'}"],
            ("adapter_*",),
            _adapter,
        ),
        "gguf": Specimen(
            good / LORA,
            lambda x, out: ["export-gguf", str(x), f"--out={out / 'x'}", f"--base={good / 'base'}"],
            ("adapter_*",),
            _adapter,
        ),
        "generator": Specimen(
            run / "generator",
            lambda x, out: _generate(x, prompts, out),
            ("*.json", "*.safetensors"),
            _generator,
        ),
        "exported": Specimen(
            run / "generator",
            lambda x, out: ["export-generator", str(x), f"--out={out / 'x.pth'}"],
            ("*.json", "*.safetensors"),
            _generator,
        ),
        "released": Specimen(
            good / "pth",
            lambda x, out: [
                *("import-generator", str(x / "x.pth"), f"--out={out / 'generator'}", settings),
                f"--adapter={good / LORA}",
            ],
            ("x.pth",),
            _released,
        ),
        "settings": Specimen(
            run,
            lambda x, out: ["data-report", f"--config={x / 'config.json'}"],
            ("config.json",),
            _any,
        ),
        "run": Specimen(
            good / "resumed",
            lambda x, out: ["train", f"--workdir={x}"],
            ("*.json", "generator/*", "generator/checkpoints/*/*", "targets/*/*/*", "embeddings/*"),
            _any,
            workdir=True,
        ),
    }


def _generate(generator: pathlib.Path, prompts: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [
        *("generate", f"--generator={generator}", f"--prompts={prompts}"),
        f"--out={out / 'adapter'}",
    ]


# --- Mutations: bytes


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, 7, len(data) // 2, len(data) - 1, rng.randrange(len(data))))]


def _zeroed(rng: random.Random, data: bytes) -> bytes:
    first, size = rng.randrange(len(data)), rng.choice((1, 16, 512, len(data)))
    return data[:first] + bytes(len(data[first : first + size])) + data[first + size :]


def _removed(rng: random.Random, data: bytes) -> bytes:
    first = rng.randrange(len(data))
    return data[:first] + data[first + rng.choice((1, 3, 40, 4000)) :]


def _twice(rng: random.Random, data: bytes) -> bytes:
    first = rng.randrange(len(data))
    return data[:first] + data[first : first + 200] * rng.choice((2, 3, 50)) + data[first + 200 :]


JUNK = (b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\r\n", b"\xc3\x28", b"{", b"]", b'"', b"\x1b[2J")


def _inserted(rng: random.Random, data: bytes) -> bytes:
    first = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    return data[:first] + rng.choice(JUNK) * rng.choice((1, 1, 30)) + data[first:]


BYTES = (_flip, _cut, _zeroed, _removed, _twice, _inserted)


# --- Mutations: JSON


class Raw(str):
    """JSON text that json.dumps would not write."""


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 10**30, 2**63, -(2**31), 7),
    *("", " ", "x", "..", "/", "/etc/passwd", "~", "x" * 100_000, "\ud83d", "\x00", "\u202e", "é"),
    *([], {}, [None], [[]], {"x": None}, [1] * 10_000, {"format": -1}),
    *map(Raw, ("NaN", "Infinity", "1e999", "7" * 5000, "[" * DEEP + "]" * DEEP)),
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON value."""
    found = [path]
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += _places(item, (*path, key))
    return found


def _changed(rng: random.Random, value: Any) -> Any:
    """One place of a JSON value made hostile."""
    path = rng.choice(_places(value))
    if not path:
        return rng.choice(VALUES)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = rng.randrange(6)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(("", "x", "\ud83d", path[-1] + " ", "..", "x" * 5000))] = parent.pop(
            path[-1]
        )
    elif how == 2:
        parent[path[-1]] = [parent[path[-1]]]
    elif how == 3:
        parent[path[-1]] = str(parent[path[-1]])
    else:
        parent[path[-1]] = rng.choice(VALUES)
    return value


def _written(value: Any) -> bytes:
    """JSON as other programs write it, with Raw as it stands."""
    raw: list[str] = []

    def kept(item: Any) -> Any:
        if isinstance(item, Raw):
            raw.append(str(item))
            return f"raw-{len(raw) - 1}-raw"
        if isinstance(item, dict):
            return {key: kept(of) for key, of in item.items()}
        return [kept(of) for of in item] if isinstance(item, list) else item

    text = json.dumps(kept(value))
    for i, of in enumerate(raw):
        text = text.replace(f'"raw-{i}-raw"', of)
    return text.encode("utf-8", "surrogatepass")


def _json(rng: random.Random, data: bytes) -> bytes:
    if b"\n{" in data.strip():  # one value a line
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = _written(_changed(rng, json.loads(lines[at])))
        return b"\n".join(lines) + b"\n"
    text = _written(_changed(rng, json.loads(data)))
    if rng.random() < 0.05:  # a key twice, the second time hostile
        text = text.replace(b"{", b'{"format": "x", "r": -1, ', 1)
    return text


# --- Mutations: safetensors


def _header(rng: random.Random, data: bytes) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = rng.randrange(8)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if how == 0:
        return (
            struct.pack("<Q", rng.choice((0, 1, size + 1, size - 1, 2**40, 2**64 - 1))) + data[8:]
        )
    if how == 1:
        header[name]["shape"] = rng.choice(([], [0], [2**40], [-1, 4], [1, 1, 1], ["a"], None))
    elif how == 2:
        header[name]["dtype"] = rng.choice(("F32", "BF16", "F8_E4M3", "I64", "BOOL", "X", "", None))
    elif how == 3:
        header[name]["data_offsets"] = rng.choice(([0, 2**50], [4, 0], [0], [0, 0], [-4, 4], None))
    elif how == 4:
        header[rng.choice(("", "x", "../x", name + ".x", "module." + name))] = header.pop(name)
    elif how == 5:
        del header[name]
    elif how == 6:
        header["__metadata__"] = rng.choice(({"format": 3}, [], "x", {"format": "x" * 10**5}, None))
    else:
        header = _changed(rng, header)
    text = _written(header)
    return struct.pack("<Q", len(text)) + text + body


# --- Mutations: the file itself


def _no_file(rng: random.Random, path: pathlib.Path) -> str:
    """Something else, or nothing, in the place of a file."""
    how = rng.choice(("missing", "folder", "dangling link", "link to itself", "link elsewhere"))
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "dangling link":
        path.symlink_to("nowhere")
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "link elsewhere":
        path.symlink_to("/proc/version")
    return how


def mutate(rng: random.Random, folder: pathlib.Path, patterns: tuple[str, ...]) -> str:
    """Changes one file below a folder, or two; says which and how."""
    every = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    said = []
    for path in rng.sample(every, min(len(every), rng.choice((1, 1, 1, 2)))):
        data = path.read_bytes()
        if rng.random() < 0.05 or not data:
            said.append(f"{path.relative_to(folder)}: {_no_file(rng, path)}")
            continue
        of_kind = []
        with contextlib.suppress(ValueError):
            json.loads(data.splitlines()[0] if b"\n{" in data.strip() else data)
            of_kind = [_json] * 12
        if path.suffix == ".safetensors":
            of_kind = [_header] * 6
        how = rng.choice([*BYTES, *of_kind])
        path.write_bytes(how(rng, data))
        said.append(f"{path.relative_to(folder)}: {how.__name__[1:]}")
    return ", ".join(said)


# --- One case after the other


def _state(folder: pathlib.Path, but: pathlib.Path) -> dict[str, tuple]:
    """Every file and folder below a folder, except below `but`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path != but and but not in path.parents:
            stat = path.lstat()
            time_ns = 0 if path.is_dir() and not path.is_symlink() else stat.st_mtime_ns
            found[str(path)] = (stat.st_ino, stat.st_size * bool(time_ns), time_ns)
    return found


def run(
    specimen: Specimen, case: str, folder: pathlib.Path, call: Callable[[list[str]], int]
) -> dict[str, Any]:
    """Mutates a copy of the specimen, calls `dnd` on it, and says what happened. Case 0 of a
    specimen is not mutated."""
    os.chdir(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "here").mkdir(parents=True)
    shutil.copytree(specimen.source, folder / "x")
    how = "" if case.endswith(" 0") else mutate(random.Random(case), folder / "x", specimen.files)
    found: dict[str, Any] = {"case": case, "mutation": how}
    out = folder / "out"
    but = folder / "x" if specimen.workdir else out
    before = _state(folder, but)
    words = specimen.command(folder / "x", out)
    started, said = time.monotonic(), io.StringIO()
    os.chdir(folder / "here")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            found["status"] = call(words)
    except BaseException:
        found["status"] = "traceback"
        found["traceback"] = traceback.format_exc()[-3000:]
    found["seconds"] = round(time.monotonic() - started, 3)
    found["words"] = " ".join(words)
    found["stderr"] = said.getvalue()[-8000:]
    after = _state(folder, but)
    found["touched"] = sorted(
        k for k in before.keys() | after.keys() if before.get(k) != after.get(k)
    )
    found["left"] = sorted(str(p.relative_to(out)) for p in out.rglob("*")) if out.exists() else []
    if found["status"] == 0:
        try:
            specimen.reads(folder / "x")
        except Exception as error:
            found["others"] = f"{type(error).__name__}: {error}"[:500]
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def _alarmed(*_) -> None:
    raise TimeoutError(f"not done in {SECONDS} s")


def main(name: str, first: str, count: str, good: str, folder: str) -> None:
    from dnd_jax.main import main as dnd

    def limited(words: list[str]) -> int:
        signal.alarm(SECONDS)
        try:
            return dnd(words)
        finally:
            signal.alarm(0)

    signal.signal(signal.SIGALRM, _alarmed)
    if name == "prepare":
        return prepare(pathlib.Path(good), dnd)
    specimen = specimens(pathlib.Path(good))[name]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    for number in range(int(first), int(first) + int(count)):
        case = f"{name} {number}"
        print(json.dumps({"begins": case}), file=out)
        print(json.dumps(run(specimen, case, pathlib.Path(folder), limited)), file=out)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
