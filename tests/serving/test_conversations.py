"""Conversations over HTTP: the base's own answers and an adapter's, whole and as events."""

import concurrent.futures
import contextlib
import json
import os
import time

import httpx
import pytest
from safetensors.numpy import load_file, save_file
from serve import order
from small_models import write_qwen

from dnd_jax.base.torch_base import TorchBase
from dnd_jax.data.sources import Example
from dnd_jax.main import main

pytestmark = pytest.mark.xdist_group("serve")  # one process builds what they share
QUESTION = "where is the bird ?"


def ask(url: str, model: str, question: str = QUESTION, **more) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": question}], **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def text(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def test_answers_are_the_models_own(service, base):
    url, _ = service
    entry = order(url, "chat", name="chat").json()
    model, expected = TorchBase(base, 1, 6), []
    for adapter in (None, entry["path"]):
        model.use(adapter)
        ids = model.answer_ids([Example(QUESTION, "")])
        expected.append((model.decode(ids)[0], len(ids[0])))
    names = ["base", "dnd:chat", f"dnd:{entry['id']}", "base"]
    answers = [ask(url, name, max_tokens=6) for name in names]
    for answer, (said, count) in zip(
        answers, [expected[0], expected[1], expected[1], expected[0]], strict=True
    ):
        assert text(answer) == said
        reason = answer.json()["choices"][0]["finish_reason"]
        assert reason == ("length" if count == 6 else "stop")
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == count + (reason == "stop")
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert expected[0] != expected[1]


def test_system_texts_and_turns_are_part_of_what_is_asked(service, base):
    url, _ = service
    model = TorchBase(base, 1, 6)
    shown = Example("where is the cat ?", "in the house")
    asked = Example(QUESTION, "", "You know it all .")
    expected = model.decode(model.answer_ids([asked], shots=[shown]))[0]
    messages = [
        {"role": "system", "content": asked.system},
        {"role": "user", "content": shown.prompt},
        {"role": "assistant", "content": [{"type": "text", "text": shown.response}]},
        {"role": "user", "content": asked.prompt},
    ]
    body = {"model": "base", "messages": messages, "max_completion_tokens": 6}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert text(answer) == expected


def test_events_are_the_answer_in_pieces(service):
    url, _ = service
    whole = ask(url, "base", max_tokens=8)
    options = {"include_usage": True}
    streamed = ask(url, "base", max_tokens=8, stream=True, stream_options=options)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *events, last = [line[6:] for line in streamed.text.split("\n") if line.startswith("data: ")]
    assert last == "[DONE]"
    *parts, usage = map(json.loads, events)
    deltas = [part["choices"][0]["delta"].get("content", "") for part in parts]
    assert "".join(deltas) == text(whole) and sum(map(bool, deltas)) > 1
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"] == whole.json()["usage"]
    assert len({event["id"] for event in [*parts, usage]}) == 1


def test_draws_are_by_the_seed(service):
    url, _ = service
    hot = {"temperature": 2.0, "max_tokens": 8}
    said = [text(ask(url, "base", seed=seed, **hot)) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    narrow = text(ask(url, "base", seed=5, top_p=1e-6, **hot))
    assert narrow == text(ask(url, "base", max_tokens=8))


def test_clients_wait_for_one_another_and_for_their_adapter(service):
    """Adapters in turn, asked by many at once: every answer is the right one's."""
    url, _ = service
    keys = ["base", *(f"dnd:{order(url, f'turn {i}').json()['id']}" for i in range(3))]
    alone = {key: text(ask(url, key, max_tokens=6)) for key in keys}
    assert len(set(alone.values())) > 1
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda i: text(ask(url, keys[i % 4], max_tokens=6)), range(12)))
    assert found == [alone[keys[i % 4]] for i in range(12)]


def test_a_client_that_leaves_frees_the_base_and_the_adapter(service):
    url, _ = service
    entry = order(url, "leaver").json()
    body = {"model": f"dnd:{entry['id']}", "messages": [{"role": "user", "content": QUESTION}]}
    body |= {"max_tokens": 50, "temperature": 2.0}
    begun = time.perf_counter()
    assert ask(url, "base", max_tokens=50, temperature=2.0).status_code == 200
    one = time.perf_counter() - begun
    for stream in (True, False) * 4:
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST",
                f"{url}/v1/chat/completions",
                json={**body, "stream": stream},
                timeout=httpx.Timeout(60, read=one / 8),
            ) as answer,
        ):
            next(answer.iter_raw())
    begun = time.perf_counter()
    assert ask(url, "base", max_tokens=2).status_code == 200
    assert time.perf_counter() - begun < 4 * one, "eight answers that nobody waits for"
    assert httpx.delete(f"{url}/v1/adapters/{entry['id']}").status_code == 204


def test_an_adapter_that_was_damaged_changes_no_other_answer(service):
    url, _ = service
    entry = order(url, "damaged").json()
    before = text(ask(url, "base", max_tokens=6))
    path = os.path.join(entry["path"], "adapter_model.safetensors")
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    answer = ask(url, f"dnd:{entry['id']}", max_tokens=6)
    assert answer.status_code == 500 and entry["path"] not in answer.text
    assert text(ask(url, "base", max_tokens=6)) == before
    httpx.delete(f"{url}/v1/adapters/{entry['id']}")


def test_what_clients_send_empty_is_as_if_it_were_not_there(service):
    url, _ = service
    empty = dict.fromkeys(("temperature", "top_p", "seed", "stream", "stream_options"))
    assert text(ask(url, "base", max_tokens=6, **empty)) == text(ask(url, "base", max_tokens=6))


def test_the_page_opens_no_file_that_was_not_dropped(service, tmp_path):
    """Whatever a visitor tells Gradio. A file that was is read."""
    url, _ = service
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret line\n" * 4)
    api = f"{url}/page/gradio_api"
    config = httpx.get(f"{url}/page/config").json()
    names = {of["api_name"]: of["id"] for of in config["dependencies"]}

    def call(name: str, data: list) -> str:
        """All events that a call of the page's function gives."""
        body = {"data": data, "fn_index": names[name], "session_hash": secret.name}
        assert httpx.post(f"{api}/queue/join", json=body).status_code == 200
        found = ""
        at = f"{api}/queue/data?session_hash={secret.name}"
        with httpx.stream("GET", at, timeout=60) as events:
            for line in events.iter_lines():
                found += line
                if "close_stream" in line or "process_completed" in line:
                    break
        return found

    def file(path: object) -> dict:
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "mine.txt"}

    typed = "\n".join(f"where is town {i} ?" for i in range(4))
    for path in (secret, os.path.relpath(secret), f"/tmp/gradio/../..{secret}"):
        assert '"success":false' in call("read", [file(path)]).replace(" ", "")
        assert "secret line" not in call("generate", [None, typed, 0, 1])
    uploaded = httpx.post(f"{api}/upload", files={"files": ("mine.txt", secret.read_bytes())})
    assert '"success":true' in call("read", [file(uploaded.json()[0])]).replace(" ", "")
    assert "secret line" in call("generate", [None, "", 0, 1])


def test_models_are_listed(service):
    url, _ = service
    entry = order(url, "listed", name="listed").json()
    data = httpx.get(f"{url}/v1/models").json()["data"]
    assert data[0]["id"] == "base" and data[0]["parent"] is None
    listed = {of["id"]: of["parent"] for of in data}
    assert listed["dnd:listed"] == listed[f"dnd:{entry['id']}"] == "base"


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "gpt", "messages": [USER]}, 404, "is none of base, dnd:NAME, dnd:ID"),
        ({"model": "dnd:nobody", "messages": [USER]}, 404, "no adapter 'nobody'"),
        ({"model": "base"}, 422, "messages: "),
        ({"model": "base", "messages": []}, 422, "messages: "),
        ({"model": "base", "messages": [{**USER, "role": "tool"}]}, 422, "messages.0.role: "),
        ({"model": "base", "messages": [{**USER, "role": "assistant"}]}, 422, "a user's at last"),
        ({"model": "base", "messages": [USER, USER]}, 422, "a user's at last"),
        ({"model": "base", "messages": [{**USER, "content": " "}]}, 422, "messages.0: is empty"),
        ({"model": "base", "messages": [{**USER, "content": "a\0"}]}, 422, "messages.0: "),
        ({"model": "base", "messages": [{**USER, "content": "word " * 9000}]}, 422, "shorten"),
        ({"model": "base", "messages": [USER], "max_tokens": 0}, 422, "max_tokens"),
        ({"model": "base", "messages": [USER], "max_tokens": 10**9}, 422, "max_tokens"),
        ({"model": "base", "messages": [USER], "temperature": -1}, 422, "temperature: "),
        ({"model": "base", "messages": [USER], "temperature": 1e-320}, 422, "temperature: 0, or"),
        (
            {"model": "base", "messages": [USER], "max_tokens": 1, "max_completion_tokens": 2},
            422,
            "give one",
        ),
        ({"model": "base", "messages": [{**USER, "content": "w" * 90000}]}, 422, "characters"),
        ({"model": "base", "messages": [USER], "top_p": 0}, 422, "top_p: "),
        ({"model": "base", "messages": [USER], "seed": -1}, 422, "seed: "),
        ({"model": "base", "messages": [USER], "n": 2}, 422, "n: "),
        ({"model": "base", "messages": [USER], "tools": []}, 422, "tools: "),
    ],
)
def test_bad_conversations_get_one_line(service, body, status, says):
    url, _ = service
    for stream in (False, True):
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={**body, "stream": stream}, timeout=60
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, status)
        assert says in error["message"] and "\n" not in error["message"]


def test_a_base_that_the_adapters_do_not_fit_is_said_at_the_start(run, tmp_path, capsys):
    other = write_qwen(tmp_path / "other")
    words = f"--generator={run}", f"--cache={tmp_path / 'cache'}", "--port=0"
    assert main(["serve", *words, f"--base={other}"]) == 2
    assert "not an adapter of" in capsys.readouterr().err
