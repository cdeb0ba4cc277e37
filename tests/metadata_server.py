"""A local server that answers as Google Cloud's metadata server does, long polls included."""

import contextlib
import http.server
import threading
import urllib.parse
from collections.abc import Iterator

PATH = "/computeMetadata/v1/instance/"


class MetadataServer(http.server.ThreadingHTTPServer):
    """values: what it has by key, others are 404. hang_ups: how many requests it drops before it
    answers one."""

    daemon_threads = True

    def __init__(self, values: dict[str, str], hang_ups: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.values, self.hang_ups = values, hang_ups
        self.asked: list[str] = []  # the keys of all requests
        self.answered: set[str] = set()  # the keys that were given
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query, key = dict(urllib.parse.parse_qsl(url.query)), url.path.removeprefix(PATH)
        with self.server.changed:
            self.server.asked.append(key)
            if self.server.hang_ups:
                self.server.hang_ups -= 1
                return
            if self.headers["Metadata-Flavor"] != "Google" or key not in self.server.values:
                self.send_error(404)
                return
            if query.get("wait_for_change") == "true" and query.get("last_etag") == self.etag(key):
                self.server.changed.wait_for(
                    lambda: query["last_etag"] != self.etag(key), float(query["timeout_sec"])
                )
            etag, body = self.etag(key), f"{self.server.values[key]}\n".encode()
        self.send_response(200)
        self.send_header("ETag", etag)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked may have ended
            self.wfile.write(body)
            self.server.answered.add(key)

    def etag(self, key: str) -> str:
        return f"{hash(self.server.values[key]) & 0xFFFFFFFF:x}"

    def log_message(self, *arguments) -> None:
        pass


@contextlib.contextmanager
def serving(values: dict[str, str], hang_ups: int = 0) -> Iterator[MetadataServer]:
    with MetadataServer(values, hang_ups) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        yield server
        server.shutdown()


def address(server: MetadataServer) -> str:
    """What GCE_METADATA_HOST says of it."""
    return f"127.0.0.1:{server.server_port}"
