"""A hub of our own, for the real client to push to."""

import base64
import contextlib
import http.server
import json
import os
import pathlib
import threading
from collections.abc import Iterator


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files needs; what arrives is kept in
    `server.got`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, body))
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.url}/me/mine", "name": "me/mine"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        elif "/commit/" in self.path:
            answer = {
                "commitUrl": f"{self.server.url}/me/mine/commit/1",
                "commitOid": "1",
                "success": True,
            }
        else:  # the card's front matter
            answer = {"errors": [], "warnings": []}
        self.reply(200, answer)

    def do_GET(self):
        private = getattr(self.server, "private", True)
        self.reply(200, {"id": "me/mine", "sha": "0", "siblings": [], "private": private})

    def reply(self, status: int, answer: dict):
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running_hub(
    home: pathlib.Path, private: bool = True
) -> Iterator[tuple[http.server.ThreadingHTTPServer, dict[str, str]]]:
    """(the hub, the environment in which the client asks it) while the block lasts. private: what
    it says of its model."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.got, server.url = [], f"http://127.0.0.1:{server.server_port}"
        server.private = private
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asks = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test"}
        yield server, {**os.environ, **asks, "HF_HOME": str(home / "home"), "XLA_FLAGS": ""}
        server.shutdown()


def sent_files(server: http.server.ThreadingHTTPServer) -> dict[str, bytes]:
    """What was uploaded to it, by name."""
    path = "/api/models/me/mine/commit/main"
    commit = next(body for where, body in server.got if where == path)
    lines = [json.loads(line) for line in commit.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
