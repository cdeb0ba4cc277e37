"""How well the base in JAX agrees with the same base in PyTorch: greedy answers, and the logits
along them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.base.architecture import Lora
from dnd_jax.base.chat import until_end
from dnd_jax.base.folder import load_base
from dnd_jax.base.greedy import make_greedy, pad_left
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.core.stopping import stop
from dnd_jax.data.sources import Example

# Questions of a dataset that are compared: logits of a large vocabulary are gigabytes. And tokens
# of an answer: each is a pass of our base over the whole text.
COMPARED, TOKENS = 32, 32
# Beyond these it is not rounding: the largest difference of a logit as a share of the largest
# logit, and the share of the same answers, in float32 (True) and below.
MOST_APART, LEAST_SAME = 0.1, {True: 0.9, False: 0.5}


class Asked(NamedTuple):
    """Questions to one adapter, and that adapter as JAX and as PyTorch take it."""

    folder: str  # PEFT's
    lora: Lora
    scale: float
    questions: Sequence[Example]


def agreement(
    base: TorchBase,
    asked: Iterable[Asked],
    batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.float32,
) -> dict:
    """{"questions", "answers", "tokens", "dtype", "same_answers", "largest_logit_difference",
    "largest_logit"} of greedy answers to the first COMPARED questions of each adapter, at most
    TOKENS long, and of the logits along PyTorch's. mesh, dtype: of the base in JAX, as in
    `load_base`. Memory: both bases and the logits of `batch_size` questions."""
    module, params = load_base(base.base, mesh, dtype)
    tokens = min(base.max_new_tokens, TOKENS)
    greedy = make_greedy(module, tokens)
    ends, pad = np.array(base.ends, np.int32), base.tokenizer.pad_token_id

    @jax.jit
    def logits_of(params, lora, scale, ids, valid):
        return module.apply({"params": params}, ids, lora, scale, valid)

    same = total = every = 0
    worst = largest = 0.0
    # Accelerators would multiply float32 in fewer bits than PyTorch does.
    with jax.default_matmul_precision("highest"):
        for folder, lora, scale, questions in asked:
            base.use(folder)
            lora, every = jax.device_put(lora), every + len(questions)
            questions = questions[:COMPARED]
            for first in range(0, len(questions), batch_size):
                stop.check()
                batch = questions[first : first + batch_size]
                prompts, theirs = base.prompt_ids(batch), base.answer_ids(batch, tokens)
                ours = np.asarray(
                    greedy(params, lora, scale, *pad_left(prompts, pad), ends)
                ).tolist()
                ours = [until_end(row, base.ends) for row in ours]
                same += sum(a == b for a, b in zip(ours, theirs, strict=True))
                total += len(theirs)
                rows = [p + a for p, a in zip(prompts, theirs, strict=True)]
                ids, valid = pad_left(rows, pad)
                ours = np.asarray(logits_of(params, lora, scale, ids, valid), np.float32)
                logits, inside = base.logits(rows), valid[..., None]
                worst = max(worst, float((np.abs(ours - logits) * inside).max()))
                largest = max(largest, float((np.abs(logits) * inside).max()))
    return {
        "questions": every,
        "answers": total,
        "tokens": tokens,
        "dtype": jnp.dtype(dtype).name,
        "same_answers": same,
        "largest_logit_difference": worst,
        "largest_logit": largest,
    }


def disagreement(found: Mapping) -> str:
    """A warning, of what `agreement` found, that scores of the two differ by more than rounding;
    empty where they do not, or where nothing was measured."""
    if "note" in found or not found["answers"]:
        return ""
    same, answers, apart = (
        found[key] for key in ("same_answers", "answers", "largest_logit_difference")
    )
    exact = found.get("dtype", "float32") == "float32"
    far = apart > MOST_APART * max(1.0, found.get("largest_logit", np.inf))
    if not far and same >= LEAST_SAME[exact] * answers:
        return ""
    return (
        f"WARNING: JAX and PyTorch disagree on this base: {same} of {answers} greedy answers are "
        f"the same, logits are up to {apart:.3g} apart. The scores are PyTorch's; LoRAs that "
        "`dnd collect` trained on JAX's reading of the base may be wrong."
    )
