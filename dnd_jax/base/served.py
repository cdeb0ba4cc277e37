"""A running server with OpenAI's interface, such as vLLM's: which models it serves, and the
log-probabilities that they give texts."""

import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from dnd_jax.core.errors import InputError, first_line

SECONDS = 300.0  # for an answer: a server may load an adapter first


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class Served:
    """A server at a URL such as http://127.0.0.1:8000 (/v1 may stand behind it). token: that it
    asks for, if any.

    Its methods raise InputError naming the URL where it does not answer, refuses, or answers
    something else.
    """

    def __init__(self, url: str, token: str = "", seconds: float = SECONDS):
        try:
            parts = urllib.parse.urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole or re.search(r"\s", url):
            raise InputError(f"{url}: no URL of a server, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._token, self._seconds = token, seconds
        # No proxy stands between this machine and itself, and a token is for this server alone.
        direct = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._open = urllib.request.build_opener(
            _NoRedirects, *([urllib.request.ProxyHandler({})] if direct else [])
        ).open

    def models(self) -> dict[str, str]:
        """{name of a model that it serves: the base that it is an adapter of, or empty}."""
        found = self._ask("/v1/models")
        try:
            return {of["id"]: of.get("parent") or "" for of in found["data"]}
        except (KeyError, TypeError, AttributeError):
            raise self._odd("/v1/models", found) from None

    def logprobs(self, model: str, ids: Sequence[int]) -> np.ndarray:
        """The log-probability of each token but the first of a text behind those before it,
        float64 (n - 1,)."""
        path = "/v1/completions"
        asked = {"model": model, "prompt": [*ids], "max_tokens": 1, "temperature": 0}
        found = self._ask(path, asked | {"echo": True, "logprobs": 1})
        try:
            values = found["choices"][0]["logprobs"]["token_logprobs"]
            of_prompt = np.array(values[1 : len(ids)], np.float64)
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._odd(path, found) from None
        if of_prompt.shape != (len(ids) - 1,) or not np.all(np.isfinite(of_prompt)):
            raise InputError(
                f"{self.url}{path}: gives {len(values)} log-probabilities for a text of {len(ids)} "
                "tokens; the server must know `echo` and `logprobs`, as vLLM does"
            )
        return of_prompt

    def _ask(self, path: str, body: dict | None = None) -> Any:
        """The JSON that a path answers."""
        where = f"{self.url}{path}"
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(where, data, headers)
        try:
            with self._open(request, timeout=self._seconds) as answer:
                return json.load(answer)
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
