"""`dnd serve` as a real process: adapters over HTTP, what is refused, and how it ends."""

import asyncio
import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
import re
import resource
import signal
import socket
import time
import zipfile

import httpx
import numpy as np
import pytest
from pipeline import when
from serve import order, prompts, serving

from dnd_jax.generator.folder import FILES
from dnd_jax.generator.trained import TrainedGenerator
from dnd_jax.lora.adapter import load_adapter
from dnd_jax.lora.peft_settings import load_adapter_config
from dnd_jax.main import main

pytestmark = pytest.mark.xdist_group("serve")  # one process builds what they share


def unzipped(content: bytes, folder: pathlib.Path) -> pathlib.Path:
    zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
    return folder


def alike(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        np.allclose(one[key], other[key], rtol=0, atol=1e-5 * np.abs(one[key]).max()) for key in one
    )


def test_an_adapter_is_what_generate_writes(run, service, tmp_path):
    url, cache = service
    made = order(url, "x", seed=3)
    assert made.status_code == 201
    entry = made.json()
    assert entry["path"].startswith(str(cache)) and entry["rank"] == 2 and entry["seed"] == 3
    download = httpx.get(entry["url"])
    assert download.headers["content-type"] == "application/zip"
    folder = unzipped(download.content, tmp_path / "a")
    generator = TrainedGenerator(run)
    assert alike(generator.tensors(generator.draw(prompts("x"), 3)), load_adapter(folder))
    assert load_adapter_config(folder) == load_adapter_config(pathlib.Path(entry["path"]))
    assert load_adapter_config(folder).base == entry["base"] == "the-base"
    assert entry["closest"][0].keys() == {"task", "cosine"}
    one = httpx.get(f"{url}/v1/adapters/{entry['id']}").json()
    assert one["card"] == (folder / "README.md").read_text()
    assert {key: one[key] for key in entry} == entry


def test_the_same_order_is_made_once(service):
    url, _ = service
    first = order(url, "once", strength=0.5)
    stored = pathlib.Path(first.json()["path"], "adapter_model.safetensors")
    written = stored.stat().st_mtime_ns
    again = order(url, "once", strength=0.5)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json() and stored.stat().st_mtime_ns == written
    others = [order(url, "once", strength=0.5, seed=1), order(url, "once"), order(url, "twice")]
    ids = {first.json()["id"], *(other.json()["id"] for other in others)}
    assert len(ids) == 4
    assert load_adapter_config(pathlib.Path(first.json()["path"])).alpha == 2.0


def test_many_clients_share_batches(service):
    url, _ = service

    def count(name: str) -> float:
        text = httpx.get(f"{url}/metrics").text
        return float(re.search(rf"^{name} (\S+)", text, re.MULTILINE)[1])

    batches = count("dnd_batch_adapters_count")
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda i: order(url, f"c{i % 32}"), range(64)))
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert len({answer.json()["id"] for answer in answers}) == 32
    assert count("dnd_batch_adapters_count") - batches < 20
    assert count("dnd_waiting") == 0
    for i in (0, 31):
        one, two = answers[i].json(), answers[i + 32].json()
        assert one == two


LONG = "word " * 30000


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 422, "prompts: Field required"),
        ({"prompts": []}, 422, "prompts: "),
        ({"prompts": "one"}, 422, "prompts: "),
        ({"prompts": [1, 2, 3, 4]}, 422, "prompts.0: "),
        ({"prompts": prompts("x", 3)}, 422, "takes 4; add 1 more"),
        ({"prompts": [*prompts("x", 3), " "]}, 422, "prompt 4 is empty"),
        ({"prompts": prompts("x", 21)}, 422, "prompts: "),
        ({"prompts": [*prompts("x"), "nul \0"]}, 422, "prompts.4: "),
        ({"prompts": [*prompts("x"), "half \ud83d"]}, 422, "prompts.4: "),
        ({"prompts": [LONG] * 4}, 413, "larger than 104857 bytes"),
        ({"prompts": [LONG[:9000] + str(i) for i in range(4)]}, 422, "tokens"),
        ({"prompts": prompts("x"), "seed": -1}, 422, "seed: "),
        ({"prompts": prompts("x"), "seed": 2**63}, 422, "seed: "),
        ({"prompts": prompts("x"), "seed": "1"}, 422, "seed: "),
        ({"prompts": prompts("x"), "seed": True}, 422, "seed: "),
        ({"prompts": prompts("x"), "strength": "0.5"}, 422, "strength: "),
        (b'{"prompts": ["a", "b", "c", "d"], "strength": NaN}', 422, "strength: "),
        (b'{"prompts": ["a", "b", "c", "d"], "strength": 1e999}', 422, "strength"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "parsing"),
        ({"prompts": prompts("x"), "strength": 0}, 422, "strength: "),
        ({"prompts": prompts("x"), "strength": 1e9}, 422, "strength"),
        ({"prompts": prompts("x"), "strengt": 1}, 422, "strengt: "),
        ({"prompts": prompts("x"), "name": "../up"}, 422, "name: "),
        ({"prompts": prompts("x"), "name": "a" * 200}, 422, "name: "),
        (b"{", 422, ""),
        (b"\xff\xfe", 422, ""),
        (b"[1]", 422, ""),
        (b'{"prompts": NaN}', 422, "prompts: "),
    ],
)
def test_bad_orders_get_one_line(service, body, status, says):
    url, cache = service
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"}
    kept = sorted(os.listdir(cache / "served"))
    answer = httpx.post(f"{url}/v1/adapters", content=content, headers=kind, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert says in error["message"] and "\n" not in error["message"]
    assert "Traceback" not in answer.text and "site-packages" not in answer.text
    assert sorted(os.listdir(cache / "served")) == kept


@pytest.mark.parametrize(
    "path",
    ["nope", "v1/adapters/nope", "v1/adapters/nope/download", "v1/adapters/..%2f..%2fetc/download"],
)
def test_what_is_not_there(service, path):
    url, _ = service
    answer = httpx.get(f"{url}/{path}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == 404


def test_no_other_methods_hosts_or_forms(service):
    url, _ = service
    assert httpx.put(f"{url}/v1/adapters").status_code == 405
    assert httpx.delete(f"{url}/v1/adapters/nope").status_code == 404
    # A web page whose name points to 127.0.0.1, and one that posts a form's type.
    rebound = httpx.get(f"{url}/healthz", headers={"Host": "evil.example"})
    assert rebound.status_code == 421 and "error" in rebound.json()
    body = json.dumps({"prompts": prompts("form")})
    form = httpx.post(f"{url}/v1/adapters", content=body, headers={"Content-Type": "text/plain"})
    assert form.status_code == 422


def test_a_body_without_an_end_is_cut(service):
    url, _ = service

    def parts():
        for _ in range(100):
            yield b" " * 10000

    answer = httpx.post(f"{url}/v1/adapters", content=parts())
    assert answer.status_code == 413
    at_once = httpx.post(f"{url}/v1/adapters", content=b" " * 500000)
    assert at_once.status_code == 413 and "larger than" in at_once.json()["error"]["message"]


def test_names_stand_for_prompts(service, tmp_path):
    url, cache = service
    entry = order(url, "named", name="mine").json()
    assert order(url, "named", name="mine").json()["id"] == entry["id"]
    assert "mine" in httpx.get(f"{url}/v1/adapters").json()["names"]
    assert httpx.get(f"{url}/v1/adapters/mine").json()["id"] == entry["id"]
    other = order(url, "other", name="mine")
    assert (
        other.status_code == 422 and "stands for another order" in other.json()["error"]["message"]
    )
    one = httpx.get(f"{url}/v1/adapters/mine/download").content
    assert one == httpx.get(entry["url"]).content
    as_id = order(url, "other", name=entry["id"])
    assert as_id.status_code == 422 and "looks like an id" in as_id.json()["error"]["message"]
    assert httpx.delete(f"{url}/v1/adapters/mine").status_code == 204
    assert order(url, "other", name="mine").status_code == 201  # which is free again
    httpx.delete(f"{url}/v1/adapters/mine")
    assert httpx.get(f"{url}/v1/adapters/mine").status_code == 404
    assert httpx.get(entry["url"]).status_code == 404


def test_a_refused_order_takes_no_name(service):
    url, _ = service
    long = [LONG[:9000] + str(i) for i in range(4)]
    body = {"prompts": long, "name": "taken"}
    assert httpx.post(f"{url}/v1/adapters", json=body, timeout=60).status_code == 422
    assert order(url, "right", name="taken").status_code == 201


def test_a_download_that_is_left_lets_go(service):
    url, _ = service
    entry = order(url, "left").json()
    for _ in range(3):
        with httpx.stream("GET", entry["url"]) as answer:
            next(answer.iter_raw(10))
    deadline = time.monotonic() + 10
    while httpx.delete(f"{url}/v1/adapters/{entry['id']}").status_code == 409:
        assert time.monotonic() < deadline, "it is held still"
    assert httpx.get(entry["url"]).status_code == 404


def test_prompts_far_from_the_training_tasks_come_with_a_warning(service):
    url, _ = service
    far = [f"x ** {i} % 7 != 2" for i in range(4)]
    answer = httpx.post(f"{url}/v1/adapters", json={"prompts": far}, timeout=60).json()
    assert any("far from everything" in line for line in answer["warnings"])


def test_it_describes_itself(service):
    url, _ = service
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {"/v1/adapters", "/v1/adapters/{key}", "/v1/adapters/{key}/download"} <= paths.keys()
    health = httpx.get(f"{url}/healthz").json()
    assert health["status"] == "ok" and health["prompts"] == {"fewest": 4}
    metrics = httpx.get(f"{url}/metrics")
    assert 'dnd_requests_total{method="GET",route="/healthz",status="200"}' in metrics.text


# --- Services that end, or have other limits.


@pytest.mark.slow
def test_a_full_cache_makes_room_and_names_are_made_again(run, tmp_path):
    with serving(run, tmp_path, "--cache-gb=0.0006") as (url, _):
        first = order(url, "first", name="first").json()
        kept = httpx.get(first["url"]).content
        others = [order(url, i).json() for i in range(60)]
        left = [entry["id"] for entry in httpx.get(f"{url}/v1/adapters").json()["adapters"]]
        assert left == [entry["id"] for entry in others[::-1]][: len(left)] and len(left) < 60
        assert sum(entry["bytes"] for entry in others[-len(left) :]) <= 6e5
        assert sorted(os.listdir(tmp_path / "cache/served")) == sorted(left)
        assert httpx.get(first["url"]).status_code == 404
        assert httpx.get(f"{url}/v1/adapters/first").json()["id"] == first["id"]  # made again
        assert httpx.get(f"{url}/v1/adapters/first/download").content == kept


@pytest.mark.slow
def test_sigterm_lets_requests_end_and_takes_no_more(run, tmp_path):
    with serving(run, tmp_path) as (url, process):
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            orders = [pool.submit(order, url, i) for i in range(40)]
            kept = tmp_path / "cache/served"
            assert when(process, lambda: any(not n.startswith(".") for n in os.listdir(kept)))
            process.send_signal(signal.SIGTERM)
            answers = []
            for one in orders:
                with contextlib.suppress(httpx.TransportError):  # had not been accepted yet
                    answers.append(one.result())
        assert process.wait(60) == 0
    assert answers and {answer.status_code for answer in answers} <= {201, 503}
    done = [answer.json() for answer in answers if answer.status_code == 201]
    assert done and all(len(os.listdir(entry["path"])) == 3 for entry in done)
    assert not [name for name in os.listdir(kept) if name.startswith(".")]
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_killed_it_goes_on_with_what_was_whole(run, tmp_path):
    with serving(run, tmp_path) as (url, process):
        entry = order(url, "whole", name="mine").json()
        process.kill()
    half = tmp_path / f"cache/served/.{entry['id']}.1"
    half.mkdir()
    with serving(run, tmp_path) as (url, _):
        found = order(url, "whole")
        assert found.status_code == 200 and found.json()["id"] == entry["id"]
        assert httpx.get(f"{url}/v1/adapters/mine").status_code == 200 and not half.exists()


@pytest.mark.slow
def test_a_name_is_of_the_generator_that_runs(run, tmp_path):
    with serving(run, tmp_path, "--base-name=first") as (url, _):
        first = order(url, "x", name="mine").json()
    with serving(run, tmp_path, "--base-name=second") as (url, _):
        second = httpx.get(f"{url}/v1/adapters/mine").json()
        assert (first["base"], second["base"]) == ("first", "second")
        assert httpx.get(f"{url}/v1/adapters/{first['id']}").json()["base"] == "first"
        assert httpx.delete(f"{url}/v1/adapters/mine").status_code == 204
        assert httpx.get(f"{url}/v1/adapters/mine").status_code == 404


@pytest.mark.slow
def test_a_disk_that_takes_no_more(run, tmp_path):
    def small_files():  # larger writes fail as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    with serving(run, tmp_path, before=small_files) as (url, _):
        answer = order(url, "x")
        assert answer.status_code == 507 and "disk" in answer.json()["error"]["message"]
        assert os.listdir(tmp_path / "cache/served") == []
        assert httpx.get(f"{url}/healthz").status_code == 200


@pytest.mark.slow
def test_a_token_is_asked_for(run, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    with serving(run, tmp_path / "s", "--host=0.0.0.0", f"--token-file={token}") as (url, _):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/healthz").status_code == 200
        for given in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": token.read_text()[:-1]},
        ):
            refused = httpx.get(f"{url}/v1/adapters", headers=given)
            assert (
                refused.status_code == 401 and "bearer token" in refused.json()["error"]["message"]
            )
        right = {"Authorization": f"Bearer {token.read_text().strip()}"}
        assert httpx.get(f"{url}/v1/adapters", headers=right).status_code == 200
        unknown = {**right, "Host": "a.name.of.this.machine"}
        assert httpx.get(f"{url}/v1/adapters", headers=unknown).status_code == 200


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host=0.0.0.0"], "--token-file"),
        (["--anyone", "--token-file={token}"], "--anyone"),
        (["--key-prefix=a.", "--base={absent}"], "leave out --base"),
        (["--key-prefix=a"], "--key-prefix=a: expected"),
        (["--host=no.such.host.invalid", "--token-file={token}"], "cannot listen"),
        (["--token-file={short}"], "16 or more"),
        (["--token-file={absent}"], "absent"),
        (["--port=70000"], "--port=70000"),
        (["--port={taken}"], "in use"),
        (["--cache-gb=0"], "--cache-gb"),
        (["--cache-gb=inf"], "--cache-gb"),
        (["--cache-gb=1e-6"], "--cache-gb: 16 adapters"),
        (["--max-body-mb=nan"], "--max-body-mb"),
        (["--max-waiting=0"], "--max-waiting"),
        (["--dtype=int8"], "--dtype"),
        (["--generator={absent}"], "no generator.json"),
        (["--cache={file}/cache"], "cannot write"),
        (["--config.train.steps=3"], "config.train.steps"),
    ],
)
def test_flags_that_cannot_be(run, tmp_path, capsys, flags, says):
    (tmp_path / "token").write_text("0123456789abcdef0123\n")
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {name: tmp_path / name for name in ("token", "short", "absent", "file")}
        names["taken"] = taken.getsockname()[1]
        words = [flag.format(**names) for flag in flags]
        given = {word.split("=")[0] for word in words}
        others = (f"--generator={run}", f"--cache={tmp_path / 'cache'}", "--port=0")
        words += [word for word in others if word.split("=")[0] not in given]
        assert main(["serve", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said


def test_a_generator_that_takes_answers_too_is_refused(run, tmp_path, capsys):
    folder = tmp_path / "generator"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((run / "generator" / name).read_bytes())
    raw = json.loads((folder / "generator.json").read_text())
    raw["settings"]["condition"]["form"] = "both"
    (folder / "generator.json").write_text(json.dumps(raw))
    words = f"--generator={folder}", f"--cache={tmp_path / 'cache'}", "--port=0"
    assert main(["serve", *words]) == 2
    assert "condition.form = 'both'" in capsys.readouterr().err


def test_a_folder_of_something_else_is_no_cache(run, tmp_path, capsys):
    (tmp_path / "cache/served/mine").mkdir(parents=True)
    words = f"--generator={run}", f"--cache={tmp_path / 'cache'}", "--port=0"
    assert main(["serve", *words]) == 2
    assert "give it a folder of its own by --cache" in capsys.readouterr().err


@pytest.mark.slow
def test_a_thousand_clients_at_once(run, tmp_path):
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    with serving(run, tmp_path, "--max-waiting=100") as (url, process):

        async def ask():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=120) as client:

                async def one(i: int) -> httpx.Response:
                    while True:
                        body = {"prompts": prompts(i % 200)}
                        answer = await client.post(f"{url}/v1/adapters", json=body)
                        if answer.status_code != 429:
                            return answer
                        await asyncio.sleep(float(answer.headers["Retry-After"]))

                return await asyncio.gather(*map(one, range(1000)))

        answers = asyncio.run(ask())
        assert {answer.status_code for answer in answers} == {200, 201}
        assert len({answer.json()["id"] for answer in answers}) == 200
        assert process.poll() is None
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_slow_clients_hold_nobody_up(run, tmp_path):
    with serving(run, tmp_path) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        entry = order(url, "x").json()
        slow = []
        for i in range(20):
            connection = socket.create_connection((host, int(port)))
            if i % 2:  # a body that never comes
                head = f"POST /v1/adapters HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50\r\n\r\n"
            else:  # a reader that never reads
                path = entry["url"].removeprefix(url)
                head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
            connection.sendall(head.encode())
            slow.append(connection)
        started = time.monotonic()
        assert order(url, "y").status_code == 201 and time.monotonic() - started < 10
        late = slow[1]
        late.settimeout(60)
        assert b"408" in late.recv(1000)  # it was given 30 s
        for connection in slow:
            connection.close()


@pytest.mark.slow
def test_a_service_for_anyone_lists_and_deletes_nothing(run, tmp_path):
    with serving(run, tmp_path / "s", "--host=0.0.0.0", "--anyone", "--nopage") as (url, _):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert order(url, "x", name="mine").status_code == 403
        entry = order(url, "x").json()
        assert "path" not in entry
        one = f"{url}/v1/adapters/{entry['id']}"
        assert httpx.get(one).json()["id"] == entry["id"]
        for path in ("v1/adapters", "v1/adapters/", "v1/models", "metrics"):
            assert httpx.get(f"{url}/{path}").status_code == 403
        assert httpx.delete(one).status_code == 403
        assert httpx.get(one).status_code == 200
        assert httpx.get(f"{url}/page").status_code == 404
