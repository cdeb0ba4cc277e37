"""The commands of this room."""

import dataclasses

from dnd_jax.core.stage import BASE_NAME, DEFAULT, Flag, Given, Stage
from dnd_jax.generator.commands import GENERATOR, KEY_PREFIX, PROMPTS, STRENGTH
from dnd_jax.lora.commands import OF_TRAINED_BASE, asking

ASKED = (
    GENERATOR,
    PROMPTS,
    OF_TRAINED_BASE,
    Flag("seed", int, 0, "draws the prompts"),
    STRENGTH,
    Flag("system", str, "", "a system text before the question"),
    Flag("max-tokens", int, 64, "of an answer"),
)
SERVED = (
    GENERATOR,
    dataclasses.replace(
        OF_TRAINED_BASE, meaning="a base to ask, on the page too: its folder, GGUF file or hub id"
    ),
    Flag("page", bool, True, "a page for people, at /"),
    Flag(
        "host", str, "127.0.0.1", "address to listen at; any but this machine's own needs a token"
    ),
    Flag("port", int, 8000, "0: a free one"),
    Flag("token-file", str, "", "a file with the token that every request has to bear"),
    Flag("anyone", bool, False, "answer whoever asks, without a token; nobody lists or deletes"),
    Flag("cache", str, "runs/served", "folder of the adapters that are kept"),
    Flag("cache-gb", float, 10.0, "what they may take; the longest unused go first"),
    Flag("dtype", str, "float32", "of the adapters' tensors, float32 or bfloat16"),
    Flag("at-once", int, 0, "adapters of one batch (default: 8, and 1 on a CPU, which one fills)"),
    Flag("max-prompts", int, 1000, "of a request"),
    Flag("max-waiting", int, 1000, "requests for adapters; more are told to come again"),
    Flag("max-body-mb", float, 8.0, "of a request"),
    BASE_NAME,
    KEY_PREFIX,
)


def _served(given: Given) -> tuple[str, ...]:
    asks = asking(given) if given["base"] else ()
    return "fastapi", "uvicorn", "prometheus_client", *(("gradio",) * given["page"]), *asks


COMMANDS = {
    "ask": Stage(
        "serving.ask",
        ASKED,
        asking,
        argument="QUESTION",
        settings=DEFAULT,
        reads=("mesh",),
    ),
    "serve": Stage("serving.serve", SERVED, _served, settings=DEFAULT, reads=("mesh",)),
}
