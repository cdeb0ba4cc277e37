"""A base in PyTorch, without or with an adapter, that answers conversations, one at a time and word
by word."""

import dataclasses
import os
from collections.abc import Callable, Sequence

from dnd_jax.base.torch_base import TorchBase
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example

torch, transformers = packages.deferred("torch"), packages.deferred("transformers")
USUAL = 256  # tokens of an answer
BETWEEN = object()  # what is in use while another adapter is loaded, or where that failed
CHARACTERS = 32  # of a token, at most: what has more of them than the base reads is not tokenised
UNFINISHED = "\ufffd"  # how a tokenizer shows the first bytes of a sign whose rest is to come


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn. max_tokens: 0 for USUAL, or what the base still reads, if that is
    less; temperature: 0 takes the likeliest token; top_p: of the likeliest tokens that have this
    probability together."""

    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer. cut: it had max_tokens and no end; the numbers of tokens are of the rendered
    conversation and of the answer, its end token included."""

    text: str
    cut: bool
    prompt_tokens: int
    tokens: int


class Talker:
    """Answers by one model whose adapters are exchanged; one thread at a time may ask it."""

    def __init__(self, base: TorchBase):
        self._base = base
        self._used: object = None  # None: the base alone

    def answer(
        self,
        adapter: str | os.PathLike | None,
        asked: Example,
        shots: Sequence[Example],
        how: Sampling,
        say: Callable[[str], bool] = lambda piece: True,
    ) -> Reply:
        """The base's answer, or an adapter folder's. shots: answered examples, as turns before
        what is asked; say: is given each piece of the answer as it comes, and returns whether to go
        on.

        Raises InputError for a conversation that the chat template refuses or that is longer than
        the base reads, and for an adapter that is none of the base's.
        """
        base = self._base
        ids = self._ids(asked, shots)
        at_most = how.max_tokens or max(min(USUAL, base.positions - len(ids)), 1)
        if len(ids) + at_most > base.positions:
            raise InputError(
                f"messages: {len(ids)} tokens and an answer of up to {at_most} are more than the "
                f"{base.positions} that the base reads; shorten them, or max_tokens"
            )
        self._use(adapter)
        written = _Written(base.tokenizer, base.ends, say)
        drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        torch.manual_seed(how.seed)
        with torch.inference_mode():
            base.model.generate(
                input_ids=torch.tensor([ids], device=base.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=int, device=base.model.device),
                max_new_tokens=at_most,
                do_sample=how.temperature > 0,
                **(drawn if how.temperature > 0 else {}),
                eos_token_id=list(base.ends),
                pad_token_id=base.tokenizer.pad_token_id,
                streamer=written,
                stopping_criteria=transformers.StoppingCriteriaList([written.stop]),
            )
        return Reply(written.text, not written.ended, len(ids), written.count)

    def _ids(self, asked: Example, shots: Sequence[Example]) -> list[int]:
        [text], positions = self._base.rendered([asked], shots), self._base.positions
        if len(text) > CHARACTERS * positions:
            raise InputError(
                f"messages: {len(text)} characters are more than the {positions} tokens that the "
                "base reads; shorten them"
            )
        return self._base.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _use(self, adapter: str | os.PathLike | None) -> None:
        """Loads an adapter unless it is the one in use."""
        wanted = None if adapter is None else os.fspath(adapter)
        if wanted != self._used:
            self._used = BETWEEN
            self._base.use(None)
            self._base.use(wanted)
            self._used = wanted


class _Written:
    """A streamer of transformers: the text of an answer, as far as it is known."""

    def __init__(self, tokenizer, ends: Sequence[int], say: Callable[[str], bool]):
        self.text, self.count, self.ended = "", 0, False
        self._tokenizer, self._ends, self._say = tokenizer, frozenset(ends), say
        self._ids: list[int] | None = None  # None: of the prompt, which comes first
        self._on = True

    def put(self, ids) -> None:
        if self._ids is None:
            self._ids = []
            return
        for token in ids.reshape(-1).tolist():
            self.count += 1
            self.ended = self.ended or token in self._ends
            if not self.ended:
                self._ids.append(token)
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if not whole.endswith(UNFINISHED):
            self._more(whole)

    def end(self) -> None:
        self._more(self._tokenizer.decode(self._ids or [], skip_special_tokens=False))

    def stop(self, ids, scores, **_):
        """Of transformers' stopping criteria: whether nobody listens any more."""
        return torch.full((len(ids),), not self._on, device=ids.device)

    def _more(self, whole: str) -> None:
        piece, self.text = whole[len(self.text) :], whole
        if piece:
            self._on = self._say(piece)
