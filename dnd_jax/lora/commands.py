"""The commands of this room."""

from dnd_jax.core.packages import of_models
from dnd_jax.core.stage import ALLOW, BASE_NAME, NONE, ON_SUITE, OUT, PROCESSES, Flag, Given, Stage

ON_BASE = (*ON_SUITE, ALLOW, BASE_NAME, *PROCESSES)
# A flag of other rooms' stages too.
OF_TRAINED_BASE = Flag(
    "base", str, "", "the base's folder, GGUF file or hub id (default: the one the adapter names)"
)
VERIFIED = (
    OF_TRAINED_BASE,
    Flag("server", str, "", "ask a running server, such as http://127.0.0.1:8000 of vLLM"),
    Flag("model", str, "", "what the server calls the adapter"),
    Flag("served-base", str, "", "what it calls its base (default: as it says itself)"),
    Flag("token-file", str, "", "a file with the token that it asks for"),
    Flag("key-prefix", str, "", "with which the adapter was generated, if any"),
)
EXPORTED = (
    OUT,
    Flag(
        "base",
        str,
        "",
        "the GGUF file that llama.cpp runs, or the base's folder or hub id (default: the one that "
        "the adapter names)",
    ),
    Flag("dtype", str, "float32", "of its tensors: float32, float16 or bfloat16"),
)


def _tuned(given: Given) -> tuple[str, ...]:
    return of_models(given.config.base.path)


def asking(given: Given) -> tuple[str, ...]:
    """The modules beyond a plain install that asking --base in PyTorch needs."""
    return ("torch", "peft", *of_models(given["base"]))


COMMANDS = {
    "collect": Stage("lora.collect", ON_BASE, _tuned),
    "controls": Stage("lora.controls", ON_BASE, _tuned),
    "verify-adapter": Stage("lora.verify", VERIFIED, asking, argument="ADAPTER", settings=NONE),
    "export-gguf": Stage(
        "lora.export_gguf",
        EXPORTED,
        lambda given: ("gguf", *of_models(given["base"])),
        argument="ADAPTER",
        settings=NONE,
    ),
}
