"""What of an example becomes its condition text (docs/METHOD.md section 1): config.condition.form.

"prompt" (the paper's choice) reads no answer. The others are its ablations, and read those of an
unseen task's pool too.
"""

from collections.abc import Sequence

import numpy as np

from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example

MIX_SHARE = 0.2  # of the examples that keep their answer in "mix"


def condition_texts(examples: Sequence[Example], form: str, seed: int = 0) -> list[str]:
    """One text an example: its prompt, its response, both, or (mix) both for a fifth of them that
    the seed draws.

    System texts and chat templates are the base's business, not the condition's. Raises InputError
    naming an example without the response that the form needs.
    """
    if form == "prompt":
        return [e.prompt for e in examples]
    without = [e.where for e in examples if not e.response]
    if without:
        raise InputError(
            f"{without[0]}: no response, which config.condition.form = {form!r} reads; add it or "
            "use 'prompt'"
        )
    if form == "response":
        return [e.response for e in examples]
    both = [f"{e.prompt}\nanswer: {e.response}" for e in examples]
    if form == "both":
        return both
    keeps = np.random.default_rng(seed).random(len(examples)) < MIX_SHARE
    return [text if keep else e.prompt for e, text, keep in zip(examples, both, keeps, strict=True)]
