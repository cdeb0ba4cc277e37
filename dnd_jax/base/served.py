"""A running server with OpenAI's interface, such as vLLM's: which models it serves, the
log-probabilities that they give texts, their greedy answers, and adapters that it is to load."""

import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dnd_jax.core.errors import InputError, first_line
from dnd_jax.core.files import read_text

SECONDS = 300.0  # for an answer: a server may load an adapter first
COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
KEYS = "parent", "root", "owned_by"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# Servers take what else there is from the model's own generation settings.
GREEDY = {
    "temperature": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


class ServedModel(NamedTuple):
    """What a server says of a model: the base that it is an adapter of, or empty; its folder or hub
    id; and what serves it."""

    parent: str
    root: str
    owner: str


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class Served:
    """A server at a URL such as http://127.0.0.1:8000 (/v1 may stand behind it). token_file:
    with the token that it asks for, if any.

    Its methods raise InputError naming the URL where it does not answer, refuses, or answers
    something else.
    """

    def __init__(self, url: str, token_file: str = "", seconds: float = SECONDS):
        try:
            parts = urllib.parse.urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole or re.search(r"\s", url):
            raise InputError(f"{url}: no URL of a server, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._token = read_text(token_file).strip() if token_file else ""
        self._seconds = seconds
        self._alone = threading.Lock()
        # No proxy stands between this machine and itself, and a token is for this server alone.
        direct = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._open = urllib.request.build_opener(
            _NoRedirects, *([urllib.request.ProxyHandler({})] if direct else [])
        ).open

    def models(self) -> dict[str, ServedModel]:
        """{name: a model that it serves}."""
        found = self._ask(MODELS)
        try:
            said = {of["id"]: [of.get(key) or "" for key in KEYS] for of in found["data"]}
            return {name: ServedModel(*of) for name, of in said.items()}
        except (KeyError, TypeError, AttributeError):
            raise self._odd(MODELS, found) from None

    def version(self) -> str:
        """As it says itself; empty where it does not."""
        try:
            return str(self._ask("/version")["version"])
        except (InputError, KeyError, TypeError):
            return ""

    def load(self, name: str, adapter: str | os.PathLike) -> None:
        """Has it serve a PEFT folder, which it reads itself, as the model `name`."""
        try:
            self._ask(LOAD, {"lora_name": name, "lora_path": os.fspath(adapter)}, is_json=False)
        except InputError as error:
            raise InputError(
                f"{error}; {adapter} is not loaded: the server has to load adapters by name and to "
                "read that folder itself (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its "
                "environment, --enable-lora, --max-lora-rank)"
            ) from None

    def unload(self, name: str) -> None:
        """Has it forget an adapter."""
        self._ask(UNLOAD, {"lora_name": name}, is_json=False)

    def logprobs(self, model: str, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of each text, the log-probability of each token but the first behind those before it,
        float64 (n - 1,). One text is asked at a time, whichever thread asks: vLLM 0.32 on a CPU
        ends where it computes those of a text beside anything else, with adapters enabled."""
        asked = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        found = []
        for ids in texts:
            with self._alone:
                [choice] = self._completions(model, [ids], asked)
            found.append(self._of_text(choice, len(ids)))
        return found

    def _of_text(self, choice: dict, length: int) -> np.ndarray:
        """What a completion says of the tokens of its text."""
        try:
            values = choice["logprobs"]["token_logprobs"]
            of_prompt = np.array(values[1:length], np.float64)
        except (KeyError, TypeError, ValueError):
            raise self._odd(COMPLETIONS, choice) from None
        if of_prompt.shape != (length - 1,) or not np.all(np.isfinite(of_prompt)):
            raise InputError(
                f"{self.url}{COMPLETIONS}: gives {len(values)} log-probabilities for a text of "
                f"{length} tokens; the server must know `echo` and `logprobs`, as vLLM does"
            )
        return of_prompt

    def answers(
        self, model: str, prompts: Sequence[Sequence[int]], at_most: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """Greedy answers to prompts, as token ids, each with the first of `ends` at its end, or of
        `at_most` tokens. Raises InputError also where the server ends one otherwise, or read
        another prompt."""
        asked = {"max_tokens": at_most, "stop_token_ids": [*ends], "return_token_ids": True}
        choices = self._completions(model, prompts, GREEDY | asked)
        return [
            self._answer(of, prompt, at_most, ends)
            for of, prompt in zip(choices, prompts, strict=True)
        ]

    def _answer(
        self, choice: dict, prompt: Sequence[int], at_most: int, ends: Sequence[int]
    ) -> list[int]:
        """What a completion says of the answer to its prompt."""
        where = f"{self.url}{COMPLETIONS}"
        ids, read = (self._ids(choice, key) for key in ("token_ids", "prompt_token_ids"))
        if read != [*prompt]:
            raise InputError(f"{where}: read {len(read)} tokens, not the {len(prompt)} it was sent")
        if not set(ids) & set(ends) and len(ids) != at_most:
            raise InputError(
                f"{where}: ended an answer after {len(ids)} of {at_most} tokens, at none that ends "
                f"one of this base ({choice.get('finish_reason')}, {choice.get('stop_reason')}); "
                "start the server with more positions (vLLM: --max-model-len), and without stop "
                "words of its own"
            )
        return ids

    def tokens(self, model: str, text: str) -> list[int]:
        """How it reads a text, without special tokens around it."""
        asked = {"add_special_tokens": False, "return_token_ids": True, "max_tokens": 1}
        return self._ids(self._completions(model, [text], asked)[0], "prompt_token_ids")

    def _ids(self, choice: dict, key: str) -> list[int]:
        """Token ids of a completion."""
        if not isinstance(choice.get(key), list):
            raise InputError(
                f"{self.url}{COMPLETIONS}: gives no token ids; the server must know "
                "`return_token_ids`, as vLLM 0.10.2 and later do"
            )
        return choice[key]

    def _completions(
        self, model: str, prompts: Sequence[str | Sequence[int]], asked: dict
    ) -> list[dict]:
        """One completion of each of several prompts, in their order."""
        sent = [text if isinstance(text, str) else [*text] for text in prompts]
        body = {"model": model, "prompt": sent, **asked}
        found = self._ask(COMPLETIONS, body)
        try:
            by_index = {of.get("index", 0): of for of in found["choices"]}
            return [by_index[i] for i in range(len(prompts))]
        except (KeyError, TypeError, AttributeError):
            raise self._odd(COMPLETIONS, found) from None

    def _ask(self, path: str, body: dict | None = None, is_json: bool = True) -> Any:
        """The JSON, or text, that a path answers."""
        where = f"{self.url}{path}"
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(where, data, headers)
        try:
            with self._open(request, timeout=self._seconds) as answer:
                return json.load(answer) if is_json else answer.read().decode()
        except urllib.error.HTTPError as error:
            raise InputError(f"{where}: {error.code}, {_message(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            why = first_line(getattr(error, "reason", error))
            raise InputError(f"{where}: no answer ({why}); is the server running?") from None
        except ValueError as error:
            raise InputError(f"{where}: answers no JSON ({first_line(error)})") from None

    def _odd(self, path: str, found: object) -> InputError:
        shown = json.dumps(found)[:200]
        return InputError(f"{self.url}{path}: not what servers of OpenAI's interface say: {shown}")


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, in one line."""
    text = error.read(4000).decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found.get("message") or found["detail"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return " ".join(str(text).split())[:300] or str(error.reason)
