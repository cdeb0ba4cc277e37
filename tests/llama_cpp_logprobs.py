"""What llama.cpp makes of adapters; runs in llama.cpp's own environment, which has nothing of ours.

    echo '{"model": "x.gguf", "adapters": ["", "lora.gguf"], "texts": [[1, 2, 3]]}' | python ...

writes as its last line {"logprobs": [...]}: of each adapter (empty: none) the log-probabilities of
all texts' tokens but the first; null where llama.cpp does not take it.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def attached(llama: llama_cpp.Llama, adapter: str) -> bool:
    """Whether llama.cpp took the adapter in the place of the last one. The package's own
    `lora_path` goes on without one that it did not take, into a segmentation fault."""
    pointer = None
    if adapter:
        pointer = llama_cpp.llama_adapter_lora_init(llama._model.model, adapter.encode())
        if not pointer:
            return False
    count = int(bool(pointer))
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*[pointer][:count])
    scales = (ctypes.c_float * count)(*[1.0][:count])
    return llama_cpp.llama_set_adapters_lora(llama._ctx.ctx, adapters, count, scales) == 0


def logprobs(llama: llama_cpp.Llama, texts: list[list[int]]) -> list[float]:
    found = []
    for text in texts:
        llama.reset()
        llama.eval(text)
        logits = np.asarray(llama.scores[: len(text) - 1], np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        found += logits[np.arange(len(text) - 1), text[1:]].tolist()
    return found


def main() -> None:
    asked = json.load(sys.stdin)
    # Keys and values in float32: llama.cpp keeps them in float16 otherwise.
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    # One thread: more wait for each other, spinning, where other work runs beside.
    how = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    llama = llama_cpp.Llama(asked["model"], **how, **exact)
    found = [
        logprobs(llama, asked["texts"]) if attached(llama, adapter) else None
        for adapter in asked["adapters"]
    ]
    print(json.dumps({"logprobs": found}))


if __name__ == "__main__":
    main()
