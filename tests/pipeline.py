"""What the tests of whole stages share: a tiny suite, and `dnd` run as a real process."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from other_world import write_other_world

from dnd_jax.base.architecture import sizes_to_pretrain
from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.train import train
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--config=tests/tiny.py"


def tiny_suite(root: pathlib.Path) -> pathlib.Path:
    """3 relations x 2 forms: 3 training tasks, 3 unseen ones."""
    return write_other_world(root, relations=3, forms=2, towns=5, corpus=200, pool=12, test=5)


def random_loras(
    root: pathlib.Path, suite: pathlib.Path, config: Config, checkpoints: int = 3
) -> pathlib.Path:
    """A few LoRA checkpoints of random numbers for each of a suite's training datasets."""
    shapes = sizes_to_pretrain(config.base, 1).lora_shapes(config.lora.rank, config.lora.targets)
    adapter = AdapterConfig("base", config.lora.rank, config.lora.alpha, config.lora.targets)
    rng = np.random.default_rng(0)
    for dataset in load_suite(suite, config.condition.num_prompts).train:
        for checkpoint in range(checkpoints):
            tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
            save_adapter(root / dataset.name / f"step_{checkpoint}", tensors, adapter)
    return root


def tiny_generator(root: pathlib.Path) -> pathlib.Path:
    """A workdir with a generator trained for two steps on random LoRAs of the tiny suite's tasks,
    which lies in root/suite."""
    raw = load_file(str(ROOT / "tests/tiny.py"))
    raw.train.update(steps=2, batch_size=8, checkpoints=str(root / "loras"))
    raw.generator.features = ((0, 0, 0), (0, 0, 0))  # one stage: quick to compile
    config, folder = freeze(raw), tiny_suite(root / "suite")
    random_loras(root / "loras", folder, config)
    train(config, load_suite(folder, config.condition.num_prompts), root)
    return root


def python(
    *arguments: str,
    devices: int,
    cwd: pathlib.Path = ROOT,
    stderr: int = subprocess.PIPE,
    **variables: str,
) -> subprocess.Popen:
    """Python in a process of its own with so many virtual devices, output piped as text."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def start(*arguments: str, devices: int = 1, cwd: pathlib.Path = ROOT) -> subprocess.Popen:
    """`dnd ARGUMENTS` in a process of its own."""
    return python("-m", "dnd_jax", *map(str, arguments), devices=devices, cwd=cwd)


def on(data: int, fsdp: int, tensor: int) -> list[str]:
    """The flags of a mesh."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]


def free_port() -> int:
    sys.path.insert(0, str(ROOT / "launch"))
    import local_multiprocess

    return local_multiprocess.free_port()


def start_two(*arguments: str) -> list[subprocess.Popen]:
    """`dnd ARGUMENTS` in two processes of two devices each, which find each other."""
    address = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--start-timeout=120")
    return [start(*arguments, *address, f"--process={i}", devices=2) for i in range(2)]


def finish(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """(exit status, all output) of each."""
    try:
        outs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out + err) for p, (out, err) in zip(processes, outs, strict=True)]


def dnd(*arguments: str, timeout: float = 600, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs `dnd ARGUMENTS` to its end."""
    process = start(*arguments, devices=devices)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def when(process: subprocess.Popen, condition, timeout: float = 300) -> bool:
    """Waits until `condition()` holds; False if the process ended first."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the process never reached the awaited state"
        time.sleep(0.01)
    return True


def two_processes(script: str, *arguments: str) -> list[str]:
    """What a script prints in each of two joined processes of four devices."""
    address, path = f"127.0.0.1:{free_port()}", f"{ROOT}:{ROOT / 'tests'}"
    runs = []
    for i in range(2):
        joined = f"import jax\njax.distributed.initialize({address!r}, 2, {i})\n{script}"
        how = {"devices": 4, "stderr": subprocess.STDOUT, "PYTHONPATH": path}
        runs.append(python("-c", joined, *arguments, **how))
    outs = [(run.communicate(timeout=120)[0], run.returncode) for run in runs]
    assert [status for _, status in outs] == [0, 0], outs
    return [out for out, _ in outs]
