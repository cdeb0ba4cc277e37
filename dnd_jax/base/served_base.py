"""A base behind a running server, such as vLLM: what is asked is rendered and tokenised here, sent
as token ids and answered so, so that the server's own template and tokenizer change nothing."""

import copy
import os
import pathlib
from collections.abc import Mapping, Sequence

from dnd_jax.base.asked_base import AskedBase, Row, positions_of
from dnd_jax.base.chat import until_end
from dnd_jax.base.hub import hub_id, resolve
from dnd_jax.base.identity import base_digest
from dnd_jax.base.sequences import plain_pairs
from dnd_jax.base.served import Served
from dnd_jax.core import packages
from dnd_jax.core.errors import CheckFailed, InputError
from dnd_jax.data.sources import Example

transformers = packages.deferred("transformers")
PROBE = "Write the words in capitals: bowl, chipmunk, quill. Café: 3 + 4 = 7\n"


class ServedBase(AskedBase):
    """A base of a server, and adapters that the server has by name; one is asked at a time."""

    def __init__(
        self, base: str | os.PathLike, server: Served, batch_size: int, max_new_tokens: int
    ):
        """base: the same one here, a folder or hub id. batch_size: questions of a request.

        Raises InputError where the server does not answer, or serves no base that is known to be
        this one, CheckFailed where it reads texts otherwise.
        """
        super().__init__(base, batch_size, max_new_tokens)
        self.server, self.served_base = server, served_as(server, base)
        self.positions = positions_of(transformers.AutoConfig.from_pretrained(resolve(base)))
        ours = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        theirs = server.tokens(self.served_base, PROBE)
        if theirs != ours:
            raise CheckFailed(
                f"{server.url}: its base {self.served_base!r} has another tokenizer than {base}: "
                f"{PROBE!r} is {theirs} there and {ours} here"
            )
        owner = server.models()[self.served_base].owner or "a server"
        self.engine = f"{owner} {server.version()}".strip()
        self._names: Mapping[str, str] = {}
        self._model = self.served_base

    def knowing(self, names: Mapping[str, str]) -> "ServedBase":
        """Another one beside it that can use these adapters: {folder: what the server calls it}."""
        other = copy.copy(self)
        other._names = names
        return other

    def use(self, adapter: str | os.PathLike | None) -> None:
        """Asks an adapter of `knowing` from now on; None: the base alone."""
        self._model = self.served_base if adapter is None else self._names[os.fspath(adapter)]

    def answer_ids(
        self, examples: Sequence[Example], at_most: int = 0, shots: Sequence[Example] = ()
    ) -> list[list[int]]:
        """Greedy answers as token ids, without the end token. at_most: tokens of an answer; 0:
        max_new_tokens. An answer of so many tokens was cut off: it has no end token. shots: as in
        `prompt_ids`."""
        prompts = [prompt for prompt, _ in plain_pairs(self.tokenizer, examples, shots)]
        found = []
        for first in range(0, len(prompts), self._batch_size):
            asked = prompts[first : first + self._batch_size]
            found += self.server.answers(
                self._model, asked, at_most or self.max_new_tokens, self.ends
            )
        return [until_end(row, self.ends) for row in found]

    def _likelihoods(self, rows: Sequence[Row]) -> list[float]:
        values = self.server.logprobs(self._model, [ids for ids, _ in rows])
        return [float(of[-length:].sum()) for of, (_, length) in zip(values, rows, strict=True)]


def served_as(server: Served, base: str | os.PathLike) -> str:
    """What a server calls a base. Raises InputError where none that it serves is known to be that
    one: the same folder, other files with the same contents, or the same hub id."""
    folder = resolve(base)
    same = {os.fspath(base), hub_id(folder)} - {""}

    def is_it(root: str) -> bool:
        path = pathlib.Path(root)
        if root in same or not path.is_dir():
            return root in same
        return path.resolve() == folder.resolve() or base_digest(path) == base_digest(folder)

    served = {name: of.root or name for name, of in server.models().items() if not of.parent}
    for name, root in served.items():
        if is_it(root):
            return name
    shown = ", ".join(f"{name!r} from {root!r}" for name, root in served.items())
    raise InputError(
        f"{server.url}: serves {shown or 'no base'}, which is not known to be {base}; start the "
        f"server with this folder (vLLM: --model={folder.resolve()}), where it sees the same paths"
    )
