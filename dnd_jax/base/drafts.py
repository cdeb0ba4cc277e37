"""Greedy answers of a base in PyTorch, from drafts: one pass over the expected answers finds how
much of each the base says itself, and only what follows is generated, with the keys and values of
that pass.

Where every token of a draft is the likeliest one, greedy decoding gives that draft. Rows that begin
with the same tokens (a chat template, an instruction, answered examples) are one tree, of which
every token is computed once and sees those on its way from the root.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dnd_jax.core import packages

torch, transformers = packages.deferred("torch"), packages.deferred("transformers")
DRAFT = 32  # tokens of an expected answer that are tried
# Tokens of a tree in one pass, each of which is compared with all: a CPU is busy with few.
TREE = {"cpu": 512, "cuda": 2048}
ROUNDING = 1e-3  # how far logits may be apart, as a share of the largest
COMPARED = 16  # tokens on either side of where two rows part, and of their ends


class Asked(NamedTuple):
    """A question and the answer that is expected, as tokens; the draft may be empty."""

    prompt: list[int]
    draft: list[int]

    @property
    def fed(self) -> list[int]:
        """What a pass reads to try the draft, whose last token need not be read."""
        return self.prompt + self.draft[:-1]


class Tree(NamedTuple):
    """Rows of tokens as one tree of N tokens."""

    ids: np.ndarray  # int64 (N,)
    depth: np.ndarray  # int64 (N,): how many tokens stand before each
    sees: np.ndarray  # bool (N, N): whether a token (first axis) sees another
    ways: list[np.ndarray]  # the places of each row's tokens


class Begun(NamedTuple):
    """Answers of n rows that go on. Rows end at the same key."""

    rows: list[int]
    layers: list[tuple["torch.Tensor", "torch.Tensor"]]  # keys and values (n, heads, T, E)
    seen: "torch.Tensor"  # (n, T): 1 where a key is of a token, 0 of padding
    last: "torch.Tensor"  # (n,): the newest token of each, which is in no key


def tree_of(rows: Sequence[Sequence[int]]) -> Tree:
    """Rows in alphabetical order as a tree."""
    ids: list[int] = []
    ways, before = [], np.zeros(0, np.int64)
    for k, row in enumerate(rows):
        shared = len(os.path.commonprefix([rows[k - 1], row])) if k else 0
        before = np.append(before[:shared], np.arange(len(ids), len(ids) + len(row) - shared))
        ids += row[shared:]
        ways.append(before)
    depth, sees = np.zeros(len(ids), np.int64), np.zeros((len(ids), len(ids)), bool)
    for way in ways:
        depth[way] = np.arange(len(way))
        sees[np.ix_(way, way)] = np.tril(np.ones((len(way), len(way)), bool))
    return Tree(np.array(ids), depth, sees, ways)


def passes(rows: Sequence[Sequence[int]], tokens: int, count: int) -> Iterator[list[int]]:
    """Indices of rows in alphabetical order, in trees of at most so many tokens (or one row) and
    rows."""
    order, group, size = sorted(range(len(rows)), key=rows.__getitem__), [], 0
    for i in order:
        shared = len(os.path.commonprefix([rows[group[-1]], rows[i]])) if group else 0
        if group and (len(group) == count or size + len(rows[i]) - shared > tokens):
            yield group
            group, size, shared = [], 0, 0
        group, size = [*group, i], size + len(rows[i]) - shared
    yield group


class Drafted:
    """Greedy answers of a model. ends: tokens that end one."""

    def __init__(self, model: "torch.nn.Module", ends: Collection[int] = ()):
        self._model, self._ends = model, frozenset(ends)

    def answers(self, asked: Sequence[Asked], at_most: int, batch_size: int) -> list[list[int]]:
        """Greedy answers, each of at_most tokens, or fewer up to and with an end. Memory: the keys
        and values of batch_size rows and of a tree."""
        asked = [Asked(prompt, draft[: min(at_most, DRAFT)]) for prompt, draft in asked]
        found: list[list[int]] = [[] for _ in asked]
        waiting: list[Begun] = []
        size = TREE.get(self._model.device.type, TREE["cuda"])
        with torch.inference_mode():
            for rows in passes([a.fed for a in asked], size, batch_size):
                begun = self._tried(rows, asked, found, at_most)
                if sum(len(b.rows) for b in (*waiting, begun)) > batch_size:
                    self._go_on(waiting, found, at_most)
                    waiting = []
                waiting += [begun] if begun.rows else []
            self._go_on(waiting, found, at_most)
        return found

    def is_exact(self, prompt: Sequence[int]) -> bool:
        """Whether the model computes the rows of a tree, and what follows them, as it computes each
        row by itself. Not every model does: one may keep a state, see only some tokens before, or
        not be told where tokens stand. Where there is no room to find out, the answer is no.

        Compared are logits around the place where two rows part and at their ends: those of all
        tokens may need more memory than generation."""
        half = len(prompt) // 2
        rows = sorted([list(prompt), [*prompt[:half], *prompt[:half][::-1]]])
        try:
            with torch.inference_mode():
                tree, places = tree_of(rows), [_compared(half, len(row)) for row in rows]
                asks = [way[at] for way, at in zip(tree.ways, places, strict=True)]
                cache, logits, where = self._pass(tree, asks)
                last = logits[[of_row[-1] for of_row in where]].argmax(dim=-1)
                begun = self._begun([0, 1], tree.ways, cache, last)
                after = self._step(last, begun.seen, _cache(begun.layers))
                pairs = []
                for k, row in enumerate(rows):
                    alone = self._model(
                        input_ids=self._tensor([[*row, int(last[k])]]),
                        logits_to_keep=self._tensor([*places[k], len(row)]),
                    ).logits[0]
                    pairs.append((torch.cat([logits[where[k]], after[k : k + 1]]), alone))
            largest = max(float(alone.abs().max()) for _, alone in pairs)
            apart = max(float((ours - alone).abs().max()) for ours, alone in pairs)
        except Exception:  # models are code of others
            return False
        return apart <= ROUNDING * max(1.0, largest)

    def _tried(
        self, rows: list[int], asked: Sequence[Asked], found: list[list[int]], at_most: int
    ) -> Begun:
        """One pass: `found` gets what each of the rows says as far as its draft goes with it, and
        one token on. Returns the rows whose answers do not end there."""
        tree = tree_of([asked[i].fed for i in rows])
        asks = [way[len(asked[i].prompt) - 1 :] for i, way in zip(rows, tree.ways, strict=True)]
        cache, logits, where = self._pass(tree, asks)
        likeliest = logits.argmax(dim=-1).cpu().numpy()
        ways, left = [], []
        for i, way, at in zip(rows, tree.ways, where, strict=True):
            tokens = likeliest[at]
            draft = asked[i].draft[: len(tokens) - 1]
            right = int(np.cumprod(tokens[: len(draft)] == draft).sum())
            found[i] = self._with_end(tokens[: right + 1].tolist())
            if not self._ended(found[i], at_most):
                left.append(i)
                ways.append(way[: len(asked[i].prompt) + right])
        return self._begun(left, ways, cache, self._tensor([found[i][-1] for i in left]))

    def _pass(
        self, tree: Tree, asks: Sequence[np.ndarray]
    ) -> tuple["transformers.DynamicCache", "torch.Tensor", list[np.ndarray]]:
        """(the keys and values of a tree, its logits at all places asked for, which of them are at
        the places of each row). asks: the places of each row."""
        kept, where = np.unique(np.concatenate(asks), return_inverse=True)
        dtype, cache = self._model.dtype, transformers.DynamicCache()
        sees = torch.as_tensor(tree.sees, device=self._model.device)
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        mask.masked_fill_(~sees, torch.finfo(dtype).min)
        logits = self._model(
            input_ids=self._tensor(tree.ids)[None],
            attention_mask=mask[None, None],
            position_ids=self._tensor(tree.depth)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._tensor(kept),
        ).logits[0]
        return cache, logits, np.split(where, np.cumsum([len(a) for a in asks])[:-1])

    def _begun(self, rows: list[int], ways: Sequence[np.ndarray], cache, last) -> Begun:
        """Rows with the keys and values on their ways through a tree."""
        width = max(map(len, ways), default=0)
        at, seen = np.zeros((2, len(ways), width), np.int64)
        for k, way in enumerate(ways):
            at[k, width - len(way) :], seen[k, width - len(way) :] = way, 1
        index = self._tensor(at)
        layers = [
            tuple(x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values))
            for layer in cache.layers
            if rows
        ]
        return Begun(rows, layers, self._tensor(seen), last)

    def _go_on(self, waiting: Sequence[Begun], found: list[list[int]], at_most: int) -> None:
        """Generates the rest of answers, which stand in `found` as far as they are said."""
        if not waiting:
            return
        rows, layers, seen, last = _together(waiting)
        cache = _cache(layers)
        while not all(ended := [self._ended(found[i], at_most) for i in rows]):
            if 2 * sum(ended) >= len(rows):  # until then they are computed with the others
                left = [k for k, done in enumerate(ended) if not done]
                rows, chosen = [rows[k] for k in left], self._tensor(left)
                cache.batch_select_indices(chosen)
                seen, last, ended = seen[chosen], last[chosen], [False] * len(rows)
            last = self._step(last, seen, cache).argmax(dim=-1)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            for i, token, done in zip(rows, last.tolist(), ended, strict=True):
                found[i] += [] if done else [token]

    def _step(self, last: "torch.Tensor", seen: "torch.Tensor", cache) -> "torch.Tensor":
        """Logits (n, V) behind the newest token of each row, whose keys the cache gets."""
        return self._model(
            input_ids=last[:, None],
            attention_mask=torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1),
            position_ids=seen.sum(dim=1, keepdim=True),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _with_end(self, tokens: list[int]) -> list[int]:
        """Up to and with the first end."""
        end = next((n for n, token in enumerate(tokens, 1) if token in self._ends), len(tokens))
        return tokens[:end]

    def _ended(self, tokens: Sequence[int], at_most: int) -> bool:
        return len(tokens) >= at_most or not self._ends.isdisjoint(tokens)

    def _tensor(self, values) -> "torch.Tensor":
        """int64, where the model is."""
        return torch.as_tensor(values, dtype=torch.int64, device=self._model.device)


def _compared(parting: int, length: int) -> np.ndarray:
    """The tokens of a row that are compared."""
    parts, end = range(parting - COMPARED, parting + COMPARED), range(length - COMPARED, length)
    return np.array(sorted({at for at in (*parts, *end) if 0 <= at < length}))


def _cache(layers: Sequence[tuple["torch.Tensor", "torch.Tensor"]]) -> "transformers.DynamicCache":
    cache = transformers.DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _together(begun: Sequence[Begun]) -> Begun:
    """Rows of several passes, padded on the left."""
    width = max(b.seen.shape[1] for b in begun)

    def joined(tensors: Sequence["torch.Tensor"], behind: tuple[int, ...]) -> "torch.Tensor":
        axis = -1 - len(behind) // 2
        pad = torch.nn.functional.pad
        return torch.cat([pad(x, (*behind, width - x.shape[axis], 0)) for x in tensors])

    layers = [
        tuple(joined(kind, (0, 0)) for kind in zip(*of_layer, strict=True))
        for of_layer in zip(*(b.layers for b in begun), strict=True)
    ]
    rows, last = [i for b in begun for i in b.rows], torch.cat([b.last for b in begun])
    return Begun(rows, layers, joined([b.seen for b in begun], ()), last)
