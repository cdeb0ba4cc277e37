"""A server with OpenAI's interface around a real transformers model and real PEFT adapters, which
loads adapters by name as vLLM does, and can be told to do what real servers do wrong."""

import contextlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class OpenaiServer:
    """Models by name: the base, and adapters of it. fault: "" or what it does wrong: "ignores"
    adapters, applies them "twice" as strong, knows no "echo" or "ids", loads no adapters
    ("static"), ends every answer "early", puts a token before every prompt ("begins"), "reads"
    texts otherwise, answers "nonsense" or status "500". token: that it asks for. at_most:
    completions until it fails.

    asked: the model of each completion, as they came; together: the most that were asked at once.
    """

    def __init__(
        self,
        base: pathlib.Path,
        adapters: dict[str, pathlib.Path],
        fault: str = "",
        token: str = "",
        at_most: float = float("inf"),
    ):
        self.fault, self.token, self.at_most = fault, token, at_most
        self.asked: list[str] = []
        self.together = self._now = 0
        self.root = base
        self._base = AutoModelForCausalLM.from_pretrained(base).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._lock = threading.Lock()
        self.adapters: dict[str, str] = {}
        self._adapted = {}
        for name, folder in adapters.items():
            self._load(name, str(folder))

    def _load(self, name: str, folder: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.root)
        adapted = PeftModel.from_pretrained(model, folder).eval()
        if self.fault == "twice":
            for module in adapted.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling = {key: 2 * x for key, x in module.scaling.items()}
        self._adapted[name], self.adapters[name] = adapted, folder

    def answer(self, path: str, body: dict | None, token: str) -> tuple[int, object]:
        """(status, JSON or text) of a request."""
        if self.token and token != f"Bearer {self.token}":
            return 401, {"error": {"message": "Unauthorized"}}
        if self.fault == "500":
            return 500, {"error": {"message": "it is\nbroken"}}
        if self.fault == "nonsense":
            return 200, ["nonsense"]
        if path == "/version":
            return 200, {"version": "1.2.3"}
        if path == "/v1/models":
            models = [{"id": "the-base", "parent": None, "root": str(self.root)}]
            models += [
                {"id": name, "parent": "the-base", "root": folder}
                for name, folder in self.adapters.items()
            ]
            return 200, {"data": [of | {"owned_by": "tests"} for of in models]}
        if path.endswith("load_lora_adapter") and self.fault != "static":
            return self._exchange(path, body)
        if path != "/v1/completions" or body["model"] not in {"the-base", *self.adapters}:
            return 404, {"error": {"message": "The model does not exist"}}
        return self._counted(body)

    def _exchange(self, path: str, body: dict) -> tuple[int, object]:
        name = body["lora_name"]
        with self._lock:
            if path == "/v1/unload_lora_adapter":
                if name not in self.adapters:
                    return 404, {"error": {"message": "cannot be found"}}
                del self.adapters[name], self._adapted[name]
                return 200, "Success: removed"
            if name in self.adapters:
                return 400, {"error": {"message": "has already been loaded"}}
            if not pathlib.Path(body["lora_path"], "adapter_config.json").is_file():
                return 404, {"error": {"message": "No adapter found"}}
            self._load(name, body["lora_path"])
            return 200, "Success: added"

    def _counted(self, body: dict) -> tuple[int, object]:
        with self._lock:
            self.asked.append(body["model"])
            self._now += 1
            self.together = max(self.together, self._now)
        try:
            if len(self.asked) > self.at_most:
                return 500, {"error": {"message": "it is broken"}}
            model = self._base
            if body["model"] in self._adapted and self.fault != "ignores":
                model = self._adapted[body["model"]]
            choices = [self._completion(model, prompt, body) for prompt in body["prompt"]]
            choices = [{"index": i, **of} for i, of in enumerate(choices)]
            return 200, {"choices": choices[::-1]}
        finally:
            with self._lock:
                self._now -= 1

    def _completion(self, model, prompt: str | Sequence[int], body: dict) -> dict:
        begin = [0] if self.fault == "begins" and not isinstance(prompt, str) else []
        if isinstance(prompt, str):
            prompt = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
            prompt = prompt[::-1] if self.fault == "reads" else prompt
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        if body.get("echo"):
            of_prompt = logs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
            generated = logs[-1].max().item()
            values = [generated] if self.fault == "echo" else [None, *of_prompt, generated]
            return {"logprobs": {"token_logprobs": values}}
        answer, ends = [], body.get("stop_token_ids", [])
        with torch.inference_mode():
            while len(answer) < body["max_tokens"] and not set(answer) & set(ends):
                answer.append(int(model(input_ids=ids).logits[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
        answer = answer[:1] if self.fault == "early" else answer
        cut = not set(answer) & set(ends)
        found = {"text": "", "finish_reason": "length" if cut else "stop"}
        if body.get("return_token_ids") and self.fault != "ids":
            found |= {"token_ids": answer, "prompt_token_ids": [*begin, *prompt]}
        return found

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Its URL while the block lasts."""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _reply(self, body: dict | None) -> None:
                token = self.headers.get("Authorization", "")
                status, found = server.answer(self.path, body, token)
                text = (found if isinstance(found, str) else json.dumps(found)).encode()
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
