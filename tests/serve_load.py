"""Mixed requests to `dnd serve` for a while: what is lost, how long each kind takes, whether memory
grows. docs/SERVE.md has its table.

    python tests/serve_load.py --generator=runs/skills --seconds=600 --clients=8
"""

import argparse
import asyncio
import collections
import io
import pathlib
import random
import statistics
import tempfile
import time
import zipfile

import httpx
from serve import serving

# Kind -> its share of the requests.
MIX = {"new": 0.35, "again": 0.3, "download": 0.15, "bad": 0.1, "list": 0.05, "slow reader": 0.05}
BAD = (
    ({"prompts": []}, 422),
    ({"prompts": ["one"] * 10**4}, 422),
    ({"prompts": ["x" * 9 * 10**6]}, 413),
    ({"prompts": ["one"] * 20, "seed": -1}, 422),
    ({"prompts": ["one", " "] * 10}, 422),
    ({"prompt": "one"}, 422),
)
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


class Load:
    """What the clients of a service do and see."""

    def __init__(self, url: str, seed: int = 0):
        self.url, self.random = url, random.Random(seed)
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.lost: list[str] = []  # what was not answered as it should be
        self.orders: list[list[str]] = []
        self.busy = 0

    async def run(self, clients: int, seconds: float) -> None:
        """So many clients, each of which asks again when it is answered."""
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits) as client:

            async def work() -> None:
                while time.monotonic() < until:
                    (kind,) = self.random.choices([*MIX], [*MIX.values()])
                    if kind in ("again", "download", "slow reader") and not self.orders:
                        kind = "new"
                    started = time.perf_counter()
                    try:
                        fault = await getattr(self, f"_{kind.replace(' ', '_')}")(client)
                    except (httpx.HTTPError, ValueError, zipfile.BadZipFile) as error:
                        fault = repr(error)
                    if fault:
                        self.lost.append(f"{kind}: {fault}")
                    self.seconds[kind].append(time.perf_counter() - started)

            await asyncio.gather(*(work() for _ in range(clients)))

    async def _order(self, client: httpx.AsyncClient, prompts: list[str]) -> dict:
        while True:
            answer = await client.post("/v1/adapters", json={"prompts": prompts})
            if answer.status_code not in (200, 201, 429):
                raise ValueError(f"{answer.status_code} {answer.text[:200]}")
            if answer.status_code != 429:
                return answer.json()
            self.busy += 1
            await asyncio.sleep(1)

    async def _new(self, client) -> str:
        words = [f"{self.random.random():.9f}" for _ in range(8)]
        prompts = [f"Which of these numbers is the largest? {word}, {words[0]}" for word in words]
        await self._order(client, prompts)
        self.orders.append(prompts)
        return ""

    async def _again(self, client) -> str:
        prompts = self.random.choice(self.orders)
        one, other = await asyncio.gather(*(self._order(client, prompts) for _ in range(2)))
        return "" if one["id"] == other["id"] else "two ids for one order"

    async def _download(self, client, pause: float = 0.0) -> str:
        entry = await self._order(client, self.random.choice(self.orders))
        content = b""
        async with client.stream("GET", entry["url"]) as answer:
            if answer.status_code == 404:  # it went meanwhile, as its cache has a limit
                return ""
            async for part in answer.aiter_bytes(1 << 18):
                content += part
                await asyncio.sleep(pause)
        archive = zipfile.ZipFile(io.BytesIO(content))
        return "" if set(archive.namelist()) == FILES and not archive.testzip() else "half a zip"

    async def _slow_reader(self, client) -> str:
        return await self._download(client, pause=0.3)

    async def _bad(self, client) -> str:
        body, status = self.random.choice(BAD)
        answer = await client.post("/v1/adapters", json=body)
        right = answer.status_code == status and "\n" not in answer.json()["error"]["message"]
        return "" if right else f"{answer.status_code} for {str(body)[:60]}"

    async def _list(self, client) -> str:
        answers = [await client.get(path) for path in ("/v1/adapters", "/metrics", "/healthz")]
        return "" if all(answer.status_code == 200 for answer in answers) else "no list"


def memory(pid: int) -> float:
    """Bytes of a process in memory."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def table(load: Load, seconds: float) -> str:
    """Latency and number of each kind of request."""
    rows = ["| request | number | median ms | 99th ms | a second |", "|---|---|---|---|---|"]
    for kind in MIX:
        taken = sorted(load.seconds[kind])
        if taken:
            last = taken[min(len(taken) - 1, int(0.99 * len(taken)))]
            numbers = f"{1e3 * statistics.median(taken):.0f} | {1e3 * last:.0f}"
            rows.append(f"| {kind} | {len(taken)} | {numbers} | {len(taken) / seconds:.1f} |")
    return "\n".join(rows)


def run(generator: str, seconds: float, clients: int, *flags: str) -> tuple[Load, list[float]]:
    """(the load, bytes of the service's memory at five times between the first and the last
    tenth)."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(pathlib.Path(generator).absolute(), pathlib.Path(folder), *flags) as (url, process),
    ):
        load, held = Load(url), []

        async def watch() -> None:
            await asyncio.sleep(0.1 * seconds)
            for _ in range(5):
                held.append(memory(process.pid))
                await asyncio.sleep(0.2 * seconds)

        async def both() -> None:
            await asyncio.gather(load.run(clients, seconds), watch())

        asyncio.run(both())
        kept = pathlib.Path(folder, "cache/served")
        for path in kept.iterdir():
            if {file.name for file in (path / "adapter").iterdir()} != FILES:
                load.lost.append(f"half-written: {path.name}")
        if "Traceback" in (said := pathlib.Path(folder, "err").read_text()):
            load.lost.append(f"the service's log has: {said[-500:]}")
        return load, held


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--generator", required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--cache-gb", type=float, default=1.0)
    given = parser.parse_args()
    of_all = given.generator, given.seconds, given.clients
    found, in_memory = run(*of_all, f"--cache-gb={given.cache_gb}")
    print(table(found, given.seconds))
    print(f"lost or half-served: {len(found.lost)} {found.lost[:3] or ''}")
    print(f"told to come again: {found.busy}")
    print(f"memory, MB: {', '.join(f'{x / 1e6:.0f}' for x in in_memory)}")
