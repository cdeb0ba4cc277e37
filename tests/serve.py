"""`dnd serve` as a process, and orders of adapters."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
from pipeline import ROOT, when


@contextlib.contextmanager
def serving(
    run: pathlib.Path, folder: pathlib.Path, *flags: str, before: Callable | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    """(URL, process) of `dnd serve` while the block lasts. folder: for its cache, and what it
    prints. before: runs in the process first."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = ""
    words = f"--generator={run}", f"--cache={folder / 'cache'}", "--port=0", *flags
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "dnd_jax", "serve", *words],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            preexec_fn=before,
        )
    try:
        said = folder / "out"
        assert when(process, lambda: "serving" in said.read_text()), (folder / "err").read_text()
        yield re.search(r"at (http://\S+)", said.read_text())[1], process
    finally:
        process.kill()
        process.wait()


def prompts(of: object, count: int = 4) -> list[str]:
    return [f"where is town {i} of {of} ?" for i in range(count)]


def order(url: str, of: object, **more) -> httpx.Response:
    return httpx.post(f"{url}/v1/adapters", json={"prompts": prompts(of), **more}, timeout=60)
