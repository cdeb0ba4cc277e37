"""`dnd bench` as a user runs it, the measured plans, and a TPU compiler's estimates."""

import ctypes
import importlib.util
import json
import mmap
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from pipeline import dnd
from small_models import write_qwen

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.arrays import open_array, write_array
from dnd_jax.core.errors import InputError
from dnd_jax.costs.bench import layers, run
from dnd_jax.costs.bench.case import COLLECTING, Case
from dnd_jax.costs.bench.feed import feed_table, give_back, parts_of
from dnd_jax.costs.bench.layers import layers_table
from dnd_jax.costs.bench.learned import learn_rates
from dnd_jax.generator.sizes import spec_of
from dnd_jax.ops import learn
from dnd_jax.ops.choice import choose, describe
from dnd_jax.ops.rates import LEARNED, RATES, learned


def test_every_convolution_by_itself(monkeypatch):
    """A sum of shifted inputs is measured where it is one: of few channels in, or out."""
    monkeypatch.setattr(layers, "seconds_of", lambda problem, plan, gradient: 0.002)
    raw = load_file("tests/tiny.py")
    raw.generator.features = ((4, 16, 48), (8, 6, 20))
    lines = layers_table(freeze(raw)).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 13
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in lines[2:7]}
    assert rows["| stage_0/conv1w"][4:] == ["2.0", "-", "2.0", "2.0", "2.0", "-", "2.0", "2.0"]
    assert rows["| stage_0/conv1h"][4:] == ["2.0", "-", "2.0", "2.0", "2.0", "2.0", "2.0", "2.0"]
    assert rows["| stage_0/conv_n"][4:] == ["2.0"] * 8


def test_learned_rates_are_kept_and_shown(tmp_path, monkeypatch):
    """Of two small convolutions here; the table has both columns, and what each would choose."""
    monkeypatch.setenv("DND_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(learn, "MEASURED", ((1, 12, 9, 4, 4, 3), (1, 12, 9, 40, 40, 3)))
    config = freeze(load_file("tests/tiny.py"))
    table = learn_rates(config)
    kept = learned("cpu")
    assert kept is not None and kept != RATES["cpu"] and str(tmp_path / "rates.json") in table
    rows = dict(re.findall(r"(?m)^\| (.+?) \| (.+) \|$", table))
    for name in LEARNED:
        assert rows[name] == f"{getattr(RATES['cpu'], name):.3g} | {getattr(kept, name):.3g}"
    problems = spec_of(config).convolutions(config.train.batch_size, "cpu").values()
    of_step = rows["a train step's convolutions, output / gradients"].split(" | ")
    assert of_step[1] == describe(choose(p, "auto", kept) for p in problems)


def test_rates_are_a_cpus(tmp_path, monkeypatch):
    monkeypatch.setenv("DND_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="computes on gpu here; run it with JAX_PLATFORMS=cpu"):
        learn_rates(freeze(load_file("tests/tiny.py")))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_bench_measures_every_variant_of_every_case(tmp_path):
    done = dnd("bench", "--config=tests/bench_tiny.py", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [r["case"]["name"] for r in results] == ["forward", "train", "generate", "first stage"]
    for result in results:
        rows = result["rows"]
        assert list(rows) == ["jax direct", "jax auto", "torch eager"]
        torch = rows["torch eager"]["seconds"]
        for row in rows.values():
            seconds = row["seconds"]
            assert len(seconds) == 2 and min(seconds) > 0 and row["peak_bytes"] > 1e8
            assert row["median"] == pytest.approx(sum(seconds) / 2)
            assert row["flops_per_second"] * row["median"] == pytest.approx(result["direct_flop"])
            assert row["speedup"] == {
                "median": pytest.approx(sum(torch) / sum(seconds)),
                "least": min(torch) / max(seconds),
                "most": max(torch) / min(seconds),
            }
        assert f"| {result['case']['name']}, batch" in done.stdout
    flop = [result["direct_flop"] for result in results]
    assert flop[1] == 3 * flop[0] > 0 and flop[2] > 0  # a gradient is two forward passes more
    assert done.stdout.strip().endswith(f"results: {tmp_path / 'bench.json'}")


@pytest.mark.slow
@pytest.mark.long
def test_collecting_is_measured_beside_peft(tmp_path):
    """Every variant, of two tasks and a base of two layers; a setting without a base is refused."""
    base = write_qwen(tmp_path / "base", max_position_embeddings=128)
    (tmp_path / "tasks.py").write_text(
        "from tests.tiny import get_config as tiny\n\n\ndef get_config():\n    config = tiny()\n"
        f"    config.base.path = {str(base)!r}\n    return config\n"
    )
    words = ["bench", "--config=tests/bench_tiny.py", f"--workdir={tmp_path / 'run'}"]
    case = ("few", str(tmp_path / "tasks.py"), "collect", 2, "float32")
    done = dnd(*words, f"--config.bench.cases=({case!r},)")
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "run" / "bench.json").read_text())["results"]
    assert list(result["rows"]) == [*(f"jax {how}" for how in COLLECTING), "torch peft"]
    assert all(min(row["seconds"]) > 0 for row in result["rows"].values())
    assert done.stdout.count(" | - | ") >= 6  # no convolutions to count
    case = ("none", "tests/tiny.py", "collect", 2, "float32")
    done = dnd(*words, f"--config.bench.cases=({case!r},)")
    assert done.returncode == 2 and "must name a base by base.path" in done.stderr


def test_ratios_are_to_the_fastest_of_pytorch(monkeypatch):
    """Rows of known seconds: which variant is the reference, and which way the ratio goes."""
    seconds = {
        "direct": [4.0, 2.0, 6.0],
        "auto": [1.0, 0.5, 0.5],
        "eager": [8.0, 8.0, 8.0],
        "compile": [2.0, 1.0, 4.0],
    }
    rounds = {name: iter(values) for name, values in seconds.items()}
    peaks = iter(range(100))
    monkeypatch.setattr(
        run,
        "measure",
        lambda side, case, variant, repeats: {
            "seconds": [next(rounds[variant])],
            "peak_bytes": next(peaks),
            "compile_seconds": 1.0,
        },
    )
    raw = load_file("tests/bench_tiny.py")
    raw.bench.update(methods=("direct", "auto"), torch=("eager", "compile"), rounds=3)
    result = run.run_case(Case("x", "tests/tiny.py", "forward", 2, "float32"), freeze(raw))
    rows = result["rows"]
    assert {label.split()[1]: row["seconds"] for label, row in rows.items()} == seconds
    assert {label: row["speedup"] for label, row in rows.items()} == {
        "jax direct": {"median": 0.5, "least": 1 / 6, "most": 2.0},
        "jax auto": {"median": 4.0, "least": 1.0, "most": 8.0},
        "torch eager": {"median": 0.25, "least": 0.125, "most": 0.5},
        "torch compile": {"median": 1.0, "least": 0.25, "most": 4.0},
    }
    assert [row["peak_bytes"] for row in rows.values()] == [8, 9, 10, 11]  # the largest
    assert rows["jax auto"]["flops_per_second"] == result["direct_flop"] / 0.5
    line = next(line for line in run.table([result]).splitlines() if "jax auto" in line)
    assert "| 0.5 (0.5-1) | 4.00 (1.00-8.00) |" in line


def test_a_case_that_is_none(tmp_path):
    done = dnd(
        "bench",
        "--config=tests/bench_tiny.py",
        f"--workdir={tmp_path}",
        "--config.bench.cases=(('x','tests/tiny.py','run',1,'float32'),)",
    )
    assert done.returncode == 2 and "one of forward, gradient, train, generate" in done.stderr
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.slow
@pytest.mark.long
def test_estimates_of_a_tpu_compiler(tmp_path):
    """The real train step on four v5p chips, with the first stage of the paper's first setting."""
    assert importlib.util.find_spec("libtpu"), "the test extra installs libtpu"
    done = dnd(
        "bench",
        "--backend=tpu-aot",
        "--topology=v5p:2x2x1",
        "--config=configs/qwen2_5_0_5b_commonsense.py",
        "--config.generator.features=((128,384,384),(128,200,300))",
        "--config.train.batch_size=16",
        f"--workdir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "bench_tpu.json").read_text())["rows"]
    direct, auto = rows["direct"], rows["auto"]
    assert direct["flops"] == pytest.approx(direct["direct_flops"], rel=0.1)
    assert auto["flops"] < direct["flops"] / 8
    assert auto["estimate_seconds"] < 0.6 * direct["estimate_seconds"]
    assert "times fewer operations" in done.stdout


def test_unknown_topology_or_backend(tmp_path):
    done = dnd("bench", "--backend=tpu", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "only tpu-aot" in done.stderr
    done = dnd("bench", "--backend=tpu-aot", "--topology=v99:1x1", f"--workdir={tmp_path}")
    assert (
        done.returncode == 2
        and "--topology=v99:1x1" in done.stderr
        and len(done.stderr.strip().splitlines()[-1]) < 500
    )
    assert jax.default_backend() == "cpu"


def resident(path: pathlib.Path) -> float:
    """The share of a file's pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as whole:
        pages = (ctypes.c_ubyte * -(-len(whole) // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(whole)), pages)
        return np.mean(np.frombuffer(pages, np.uint8) & 1)


def has_a_disk(folder: pathlib.Path) -> bool:
    """Whether a folder's files are on one, by Linux's list of mounts, and not in memory alone."""
    mounts = [line.split()[1:3] for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    around = [(len(at), kind) for at, kind in mounts if folder.is_relative_to(at)]
    return max(around)[1] not in ("tmpfs", "ramfs")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
def test_what_is_called_cold_is_not_in_memory(tmp_path):
    if not has_a_disk(tmp_path):
        pytest.skip("files of this folder are in memory alone")
    path = tmp_path / "a.npy"
    write_array(path, (64, 1 << 16), np.float32, np.ones((64, 1 << 16), np.float32))
    array = open_array(path)
    float(array.sum())
    assert resident(path) > 0.9
    give_back(tmp_path, [array])
    assert resident(path) < 0.1
    assert float(array.sum()) == 64 << 16


CONDITION, CHECKPOINT = 4 * 8 * 384 * 4, 6 * 4 * 4 * 4  # bytes


@pytest.mark.parametrize(
    "changes, rows",
    [
        ({}, {"prompts": CONDITION, "LoRA checkpoints": CHECKPOINT}),
        ({"train.dtype": "bfloat16"}, {"prompts": CONDITION // 2, "LoRA checkpoints": CHECKPOINT}),
        ({"condition.in_graph": True}, {"prompts": 2 * 4 * 8 * 4, "LoRA checkpoints": CHECKPOINT}),
        ({"train.targets_on": "devices"}, {"prompts": CONDITION + 4}),
        ({"train.objective": "answers"}, {"prompts": CONDITION}),
    ],
    ids=["weights", "bfloat16", "in_graph", "devices", "answers"],
)
def test_what_a_host_gives_is_of_the_samples_of_training(tmp_path, changes, rows):
    raw = load_file("tests/tiny.py")
    raw.condition.update(num_prompts=4, max_text_length=8)
    raw.generator.features = ((4, 8, 384), (6, 4, 4))
    raw.update_from_flattened_dict(changes)
    parts = {part.name: part for part in parts_of(freeze(raw), tmp_path)}
    rows |= {"all": sum(rows.values())} if len(rows) > 1 else {}
    assert {name: part.size for name, part in parts.items()} == rows
    assert all(p.samples == raw.train.batch_size and 0 < p.warm < 9 for p in parts.values())
    table = feed_table(freeze(raw), tmp_path / "run")
    assert all(f"| {name} | " in table for name in rows) and "GB/s. A batch of 4, by" in table
    assert not list((tmp_path / "run").iterdir())
