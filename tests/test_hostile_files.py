"""Two thousand hostile files: whatever a file holds, `dnd` ends with 0 and what other libraries
read too, with 1 where a check failed, or with 2 and one line; it writes nowhere else and takes no
more memory than for good ones."""

import json
import os
import pathlib
import subprocess
import sys

import hostile
import pytest

SECONDS, MEMORY = 30, 1 << 30  # of a case; beside what the good files of a kind take
COUNTS = {
    "suite": 300,
    "base": 350,
    "loras": 300,
    "generator": 200,
    "exported": 250,
    "settings": 250,
    "vectors": 150,
    "run": 100,
    "prompts": 100,
    "released": 80,
    "adapter": 60,
    "gguf": 100,
}
BITING = {"run": 50}  # of so many one ends otherwise; most of a run's files are made again
PROCESSES = 24  # cases that are processes of their own


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Where nothing of the user's is within reach."""
    home = {"HOME": str(folder / "home"), "DND_JAX_CACHE": str(folder / "cache")}
    root = pathlib.Path(__file__).parent.parent
    home["XLA_FLAGS"] = ""  # one device, as a user has
    return {**os.environ, **home, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}


def start(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, hostile.__file__, *words],
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> pathlib.Path:
    """The good files that the others are made from."""
    folder = tmp_path_factory.mktemp("hostile")
    done = start(folder, "prepare", "0", "0", str(folder / "good"), "")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "good"


def fault(case: dict, memory: float) -> str:
    """What is wrong with how a case ended; empty for nothing."""
    lines = [line for line in case["stderr"].splitlines() if line.startswith("dnd:")]
    first = case["case"].endswith(" 0")  # which also imports what is needed
    if first and case["status"] != 0:
        return "good files are refused"
    if case["status"] not in (0, 1, 2) or "Traceback" in case["stderr"]:
        return "a traceback"
    if case["status"] and len(lines) != 1:
        return f"{len(lines)} lines say why"
    if case["status"] == 2 and case["left"]:
        return f"left behind: {case['left']}"
    if case["touched"]:
        return f"changed: {case['touched']}"
    if "others" in case:
        return f"taken, but other libraries refuse it: {case['others']}"
    if case["memory"] > memory or (case["seconds"] > SECONDS and not first):
        return f"{case['seconds']} s, {case['memory'] / 1e6:.0f} MB"
    return ""


def faults(cases: list[dict]) -> list[str]:
    memory = cases[0]["memory"] + MEMORY
    return [
        f"{case['case']} ({case['mutation']}): {why}\n{case.get('traceback') or case['stderr']}"
        for case in cases
        if (why := fault(case, memory))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_no_file_breaks_it(kind, good):
    folder = good.parent / kind
    done = start(good.parent, kind, "0", str(COUNTS[kind]), str(good), str(folder))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died in {rows[-1:]}: {done.stderr[-3000:]}"
    cases = [row for row in rows if "status" in row]
    assert len(cases) == COUNTS[kind]
    found = faults(cases)
    assert not found, f"{len(found)} of {len(cases)}: " + "\n\n".join(found[:5])
    ended = {status: sum(case["status"] == status for case in cases) for status in (0, 1, 2)}
    assert ended[0] and ended[1] + ended[2] > len(cases) / BITING.get(kind, 10), (
        ended
    )  # the mutations do bite


@pytest.mark.slow
def test_no_file_breaks_a_process(good):
    def dnd(words: list[str]) -> int:
        done = subprocess.run(
            [sys.executable, "-m", "dnd_jax", *words],
            env=environment(good.parent),
            capture_output=True,
            text=True,
        )
        print(done.stderr, file=sys.stderr)
        return done.returncode

    here, kinds = os.getcwd(), hostile.specimens(good)
    try:
        cases = [
            hostile.run(kinds[kind], f"{kind} {1000 + i}", good.parent / "alone", dnd)
            for i, kind in zip(range(PROCESSES), list(COUNTS) * PROCESSES, strict=False)
        ]
    finally:
        os.chdir(here)
    assert not (found := faults(cases)), "\n\n".join(found)
