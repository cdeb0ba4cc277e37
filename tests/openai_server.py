"""A server with OpenAI's interface around a real transformers model and real PEFT adapters, which
can be told to do what real servers do wrong."""

import contextlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class OpenaiServer:
    """Models by name: the base, and adapters of it. fault: "" or what it does wrong: "ignores"
    adapters, applies them "twice" as strong, knows no "echo", answers "nonsense" or status "500".
    token: that it asks for."""

    def __init__(
        self,
        base: pathlib.Path,
        adapters: dict[str, pathlib.Path],
        fault: str = "",
        token: str = "",
    ):
        self.fault, self.token, self.adapters = fault, token, adapters
        self._base = AutoModelForCausalLM.from_pretrained(base).eval()
        self._adapted = {}
        for name, folder in adapters.items():
            model = AutoModelForCausalLM.from_pretrained(base)
            adapted = PeftModel.from_pretrained(model, folder).eval()
            if fault == "twice":
                for module in adapted.modules():
                    if isinstance(getattr(module, "scaling", None), dict):
                        module.scaling = {key: 2 * x for key, x in module.scaling.items()}
            self._adapted[name] = adapted

    def answer(self, path: str, body: dict | None, token: str) -> tuple[int, object]:
        """(status, JSON) of a request."""
        if self.token and token != f"Bearer {self.token}":
            return 401, {"error": {"message": "Unauthorized"}}
        if self.fault == "500":
            return 500, {"error": {"message": "it is\nbroken"}}
        if self.fault == "nonsense":
            return 200, ["nonsense"]
        if path == "/v1/models":
            models = [{"id": "the-base", "parent": None}]
            models += [{"id": name, "parent": "the-base"} for name in self.adapters]
            return 200, {"data": models}
        if path != "/v1/completions" or body["model"] not in {"the-base", *self.adapters}:
            return 404, {"error": {"message": "The model does not exist"}}
        model = self._base
        if body["model"] in self._adapted and self.fault != "ignores":
            model = self._adapted[body["model"]]
        ids = torch.tensor([body["prompt"]])
        with torch.inference_mode():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        of_prompt = logs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        generated = logs[-1].max().item()
        values = [generated] if self.fault == "echo" else [None, *of_prompt, generated]
        return 200, {"choices": [{"logprobs": {"token_logprobs": values}}]}

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Its URL while the block lasts."""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _reply(self, body: dict | None) -> None:
                token = self.headers.get("Authorization", "")
                status, found = server.answer(self.path, body, token)
                text = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self._reply(json.loads(self.rfile.read(length)))

            def log_message(self, *_) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
            thread = threading.Thread(target=listening.serve_forever, daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{listening.server_address[1]}"
            listening.shutdown()
