"""A plug-in of vLLM, which makes the adapters of `dnd serve` models of it: a request for the model
dnd:NAME or dnd:ID is answered with the adapter that the service has under that name or id.

It runs in vLLM's environment (`pip install --no-deps dnd-jax` there), so it imports nothing but
Python's own modules and vLLM. What it reads:

DND_SERVER      the service, such as http://127.0.0.1:8000; without it the plug-in does nothing
DND_TOKEN       the token that the service asks for, if any
DND_BASE        what the service's adapters call vLLM's model, where that is another name than its
                --model (a folder, say): their base_model_name_or_path
DND_ADAPTERS    a folder for the adapters that were fetched (default: ~/.cache/dnd_jax/vllm)
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1    without which vLLM asks no plug-in
"""

import asyncio
import contextlib
import http.client
import importlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import urllib.error
import urllib.parse
import urllib.request
import zipfile

log = logging.getLogger("vllm.plugins.dnd")

PREFIX = "dnd:"
SECONDS = 120.0  # until an adapter has come
FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def register() -> None:
    """vLLM calls this in each of its processes when it starts."""
    server = os.environ.get("DND_SERVER", "")
    if not server:
        return
    resolver = importlib.import_module("vllm.lora.resolver")
    request = importlib.import_module("vllm.lora.request")
    fetcher = Fetcher(server)

    class DndResolver(resolver.LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str):
            """vLLM's request of the adapter of that name; None for what is none of the
            service's."""
            if not lora_name.startswith(PREFIX):
                return None
            key = lora_name.removeprefix(PREFIX)
            try:
                folder = await asyncio.to_thread(fetcher.fetch, key, base_model_name)
            except Refused as error:
                log.error("%s: %s", lora_name, error)
                return None
            number = int(folder.name[:15], 16) + 1  # of what it is, not what it is called
            return request.LoRARequest(
                lora_name=lora_name, lora_int_id=number, lora_path=str(folder)
            )

    resolver.LoRAResolverRegistry.register_resolver("dnd_jax", DndResolver())


class Refused(Exception):
    """Why an adapter is not served, in one line."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class Fetcher:
    """Adapters of a service, kept in a folder of this machine: the service may let go of its own,
    and vLLM reads them again when it likes."""

    def __init__(self, server: str, token: str = "", folder: str = ""):
        self._server = server.rstrip("/")
        # No proxy stands between this machine and itself, and a token is for the service alone.
        here = urllib.parse.urlsplit(server).hostname in ("127.0.0.1", "localhost", "::1")
        direct = [urllib.request.ProxyHandler({})] if here else []
        self._open = urllib.request.build_opener(_NoRedirects, *direct).open
        self._token = token or os.environ.get("DND_TOKEN", "")
        self._base = os.environ.get("DND_BASE", "")
        kept = folder or os.environ.get("DND_ADAPTERS", "~/.cache/dnd_jax/vllm")
        self._folder = pathlib.Path(kept).expanduser()

    def fetch(self, key: str, base: str) -> pathlib.Path:
        """The PEFT folder of an adapter, whole. Raises Refused for what the service does not have,
        and for an adapter of another base than vLLM's `base`."""
        try:
            with self._ask(f"/v1/adapters/{urllib.parse.quote(key, safe='')}/download") as answer:
                id = answer.headers.get("ETag", "").strip('"')
                if not re.fullmatch("[0-9a-f]{32}", id):
                    raise Refused(f"{self._server} is no `dnd serve`")
                folder = self._folder / id
                if not folder.is_dir():
                    self._unpack(answer, folder)
            settings = json.loads((folder / "adapter_config.json").read_text())
            named = settings["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise Refused(f"{self._server} gives no adapter ({error!r})") from None
        if named not in (base, self._base):
            raise Refused(
                f"is an adapter of {named!r}, vLLM serves {base!r}: where both are one model, set "
                f"DND_BASE={named} for vLLM, or start `dnd serve` with --base-name={base}"
            )
        return folder

    def _ask(self, path: str):
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        request = urllib.request.Request(self._server + path, headers=headers)
        try:
            return self._open(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]["message"]
            raise Refused(f"{self._server} says {error.code}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"{self._server} does not answer ({error!r})") from None

    def _unpack(self, answer, folder: pathlib.Path) -> None:
        """Under another name first, so that a folder of this name is whole."""
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        packed = temporary / "adapter.zip"
        try:
            temporary.mkdir(parents=True)
            with packed.open("wb") as file:
                shutil.copyfileobj(answer, file)
            with zipfile.ZipFile(packed) as archive:
                if set(archive.namelist()) != FILES:
                    raise Refused(f"{self._server} sends another zip than an adapter's")
                archive.extractall(temporary / "adapter")
            try:
                (temporary / "adapter").rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was first
                    raise
        except (OSError, zipfile.BadZipFile) as error:
            raise Refused(f"cannot be kept in {self._folder} ({error})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
