"""Training pairs: N random prompts of a dataset with one of that dataset's LoRA checkpoints
(docs/METHOD.md section 1), with other questions and answers of it (section 9), or with both.

A pair is drawn from (seed, step) alone and knows its dataset by name. With pairing "fixed", the
paper's ablation, a checkpoint always comes with the same N prompts, which (seed, dataset,
checkpoint) draw; which checkpoints a step takes is random still. Every process draws the same
global batch, whatever their number, and reads only the part of it that its devices hold.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm import tqdm

from dnd_jax.base.sequences import Sequences, packed_rows, shared_prefix
from dnd_jax.config.schema import Config
from dnd_jax.config.training import ASKING, FEWEST, OF_LORAS
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import listed
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.encoders import cut
from dnd_jax.encoders.cache import PromptEncoder
from dnd_jax.generator.objective import Objective
from dnd_jax.lora.targets import Target
from dnd_jax.parallel import hosts

THREADS = min(8, os.cpu_count() or 1)  # that gather samples


@dataclasses.dataclass(frozen=True)
class PairedDataset:
    """prompts: one entry a prompt along axis 0 of every array, either {"condition": (n, L, C)} or
    {"ids", "valid": (n, L)}; targets: (M, T, h, w), one a checkpoint; questions: the prompts with
    their answers as the base is asked; shown: the same questions behind answered examples. Each of
    the three may be missing."""

    name: str
    prompts: Mapping[str, np.ndarray]
    targets: np.ndarray | None = None
    questions: Sequences | None = None
    shown: Sequences | None = None

    @property
    def num_prompts(self) -> int:
        return len(next(iter(self.prompts.values())))


class Pairs:
    """Batches of B pairs with N prompts each; few_prompts: the share of pairs whose prompts are of
    fewer different ones; wordings: so many pairs one after the other differ in their prompts alone;
    rows: questions of each pair's dataset, as `rows_at`. pad: token id.
    taught_at: step -> the parts of its loss, as of `Train`; of_loras: as there. kept: the targets
    are `kept_checkpoints`, and a batch has numbers of them. Raises InputError naming every dataset
    with fewer than N prompts."""

    def __init__(
        self,
        datasets: Sequence[PairedDataset],
        batch_size: int,
        num_prompts: int,
        seed: int,
        pairing: str = "random",
        few_prompts: float = 0.0,
        wordings: int = 1,
        rows: int = 0,
        pad: int = 0,
        taught_at: Callable[[int], Collection[str]] = lambda step: ("weights",),
        of_loras: Mapping[str, str] = OF_LORAS,
        kept: bool = False,
    ):
        self.datasets, self.batch_size, self.num_prompts, self.seed = (
            tuple(datasets),
            batch_size,
            num_prompts,
            seed,
        )
        self.pairing, self.few_prompts, self.wordings = pairing, few_prompts, wordings
        self.rows, self.pad, self.taught_at, self._of_loras = rows, pad, taught_at, of_loras
        self._kept = kept
        few = [
            f"{d.name} has {d.num_prompts} prompts"
            for d in self.datasets
            if d.num_prompts < num_prompts
        ]
        if few:
            raise listed(f"condition.num_prompts = {num_prompts} prompts a pair are needed", few)
        before = np.cumsum([0, *(0 if d.targets is None else len(d.targets) for d in datasets)])
        self._first = before[:-1].tolist()  # number of a dataset's first checkpoint
        self._prompts_of = [
            {key: _plain(values) for key, values in d.prompts.items()} for d in self.datasets
        ]
        self._threads = ThreadPoolExecutor(THREADS, "gather")
        self._buffers: dict[tuple, np.ndarray] = {}
        self._sent, self._turn = None, 0  # the last batch on a mesh, and which buffers it has
        # Every part of a batch asks for it, and the names of its datasets a few steps later.
        self._drawn = functools.lru_cache(maxsize=8)(self._draw)

    def draw(self, step: int) -> list[tuple[int, int, np.ndarray]]:
        """(dataset, checkpoint, N prompts) of each of the step's B pairs: a function of (seed,
        step)."""
        return self._drawn(step)

    def _draw(self, step: int) -> list[tuple[int, int, np.ndarray]]:
        rng = np.random.default_rng([self.seed, step])
        drawn = []
        for _ in range(self.batch_size // self.wordings):
            d = int(rng.integers(len(self.datasets)))
            dataset = self.datasets[d]
            checkpoint = 0 if dataset.targets is None else int(rng.integers(len(dataset.targets)))
            # A seed's trailing zeros do not count, hence the 1: no step has this one.
            of_prompts = (
                rng
                if self.pairing == "random"
                else np.random.default_rng([self.seed, d, checkpoint, 1])
            )
            for _ in range(self.wordings):
                drawn.append((d, checkpoint, self._prompts(of_prompts, dataset.num_prompts)))
        return drawn

    def _prompts(self, rng: np.random.Generator, pool: int) -> np.ndarray:
        """N prompts of a dataset that has `pool`; of a share of the pairs 2 to N - 1 different
        ones, each at least once."""
        if self.few_prompts and rng.random() < self.few_prompts:
            count = int(rng.integers(FEWEST, self.num_prompts))
            different = rng.choice(pool, count, replace=False)
            again = rng.choice(different, self.num_prompts - len(different))
            return np.concatenate([different, again])
        return rng.choice(pool, self.num_prompts, replace=False)

    def batch_at(
        self, step: int, first: int = 0, last: int | None = None, memory: int | None = None
    ) -> dict[str, np.ndarray]:
        """{"condition" (B, N, L, C) or "ids", "valid" (B, N, L); "target" (B, T, h, w), of kept
        checkpoints their numbers (B,), if the step is on weights; "teacher", the same, if it
        distills}, or its samples first..last - 1.
        memory: a number, of the arrays that these samples of another step may stand in and that are
        written again; None: new ones."""
        drawn, tokens = self.draw(step)[first:last], self._tokens_at(step)
        batch = {}
        for key, (shape, dtype) in self._samples(tokens).items():
            new = np.empty((len(drawn), *shape), dtype)  # takes no memory before it is written
            where = memory, key, first, len(drawn)
            batch[key] = new if memory is None else self._buffers.setdefault(where, new)

        def gather(i: int) -> None:
            """Reads a sample into its place: each number is copied once."""
            d, checkpoint, prompts = drawn[i]
            prompts = np.sort(prompts).tolist()
            for key, values in self._prompts_of[d].items():
                for place, prompt in zip(batch[key][i], prompts, strict=True):
                    np.copyto(place, values[prompt])
            for key in tokens:
                number = self._first[d] + checkpoint
                batch[key][i] = number if self._kept else self.datasets[d].targets[checkpoint]

        for _ in self._threads.map(gather, range(len(drawn))):
            pass  # raises what a thread did
        return batch

    def _samples(self, tokens: Collection[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{key: (shape, dtype) of a sample}; tokens: the keys of checkpoints."""
        one = self.datasets[0]
        found = {k: ((self.num_prompts, *v.shape[1:]), v.dtype) for k, v in one.prompts.items()}
        numbers = (), np.dtype(np.int32)
        of_one = numbers if self._kept or not tokens else (one.targets.shape[1:], one.targets.dtype)
        return found | dict.fromkeys(tokens, of_one)

    def _tokens_at(self, step: int) -> list[str]:
        """What a batch calls the tokens of its checkpoints."""
        return [name for part, name in self._of_loras.items() if part in self.taught_at(step)]

    def rows_at(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        """{"rows": the questions and answers of the step's pairs, as of `packed_rows`;
        "shown": the same behind answered examples, if it distills these}; nothing of a step that
        does not ask the base."""
        parts = {*self.taught_at(step)}
        if not ASKING & parts:
            return {}
        index = self.asked(step)
        found = {"rows": [self.datasets[d].questions for d, _, _ in self.draw(step)]}
        if "distill" in parts and "distill" not in self._of_loras:
            found["shown"] = [self.datasets[d].shown for d, _, _ in self.draw(step)]
        return {
            key: packed_rows(asked, index, self._prefixes[key], self.pad)
            for key, asked in found.items()
        }

    def asked(self, step: int) -> list[np.ndarray]:
        """Which questions of its dataset each of the step's pairs is asked, (rows,): none of the
        pair's own prompts, unless there are no others, and some twice where there are few."""
        index, drawn = [], self.draw(step)
        for i in range(len(drawn)):
            first = i - i % self.wordings  # pairs that differ in their prompts are asked the same
            shown = [prompts for *_, prompts in drawn[first : first + self.wordings]]
            questions = self.datasets[drawn[i][0]].questions
            of = np.arange(len(questions)) if questions.of is None else questions.of
            others = np.flatnonzero(~np.isin(of, np.concatenate(shown)))
            others = others if len(others) else np.arange(len(questions))
            # Another stream than that of the pairs, which so stay as they are.
            rng = np.random.default_rng([self.seed, step, first, 3])
            index.append(rng.choice(others, self.rows, replace=len(others) < self.rows))
        return index

    @functools.cached_property
    def _prefixes(self) -> dict[str, int]:
        """Tokens that all rows of a kind begin with alike."""
        kinds = {"rows": [d.questions for d in self.datasets]}
        kinds["shown"] = [d.shown for d in self.datasets if d.shown is not None]
        return {kind: shared_prefix(asked) for kind, asked in kinds.items() if asked}

    def placed(self, step: int, over_batch: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
        """`batch_at`, and of a step through the base `rows_at`, as global arrays on a mesh; of the
        samples only those are read that this process' devices hold."""
        # New memory costs as much as the copy into it; a CPU's arrays may be that memory itself.
        # Elsewhere two batches take turns: when the last one has been sent, so has the one before.
        memory = None
        if over_batch.mesh.devices.flat[0].platform != "cpu":
            jax.block_until_ready(self._sent)
            memory = self._turn = 1 - self._turn
        # Replicas share their samples.
        part = functools.lru_cache(maxsize=None)(
            functools.partial(self.batch_at, step, memory=memory)
        )

        def samples(key: str, index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(self.batch_size)
            return part(first, last)[key]

        batch = {
            key: jax.make_array_from_callback(
                (self.batch_size, *shape), over_batch, functools.partial(samples, key)
            )
            for key, (shape, _) in self._samples(self._tokens_at(step)).items()
        }
        self._sent = None if memory is None else batch
        asked = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, over_batch, x.__getitem__),
            self.rows_at(step),
        )
        return batch | asked

    def names(self, step: int) -> list[str]:
        """The dataset of each of a step's pairs."""
        return [self.datasets[d].name for d, _, _ in self.draw(step)]


def _plain(values: np.ndarray) -> np.ndarray:
    """Without NumPy's class for mapped files, which looks at each row for longer than a short one
    takes to read."""
    return values.view(np.ndarray) if isinstance(values, np.memmap) else values


def paired_datasets(
    config: Config,
    suite: Suite,
    workdir: pathlib.Path,
    encoder: PromptEncoder,
    objective: Objective,
    target: Target,
) -> tuple[list[PairedDataset], np.ndarray]:
    """(every training dataset with its encoded prompts and what they are paired with, the
    importance weights of the tokens (T,)); what was encoded before is read. Each process encodes
    its share of the datasets into the workdir, and every process must call this. Raises InputError
    where the encoder cuts too much of a task's prompts, of an unseen one's too."""
    kept = workdir / paths.PROMPTS_CUT
    with hosts.lead_first():  # who finds its files made by process 0 where the workdir is shared
        lost = cut.of_suite(suite, encoder.tokens, config, kept, encoder.fingerprint)
        say = functools.partial(print, flush=True) if hosts.lead() else lambda line: None
        cut.check(lost, config.condition.too_long, cut.RAISE, say)

    def prompts_of(dataset: Dataset) -> dict[str, np.ndarray]:
        prompts = condition_texts(dataset.train, config.condition.form, config.seed)
        if config.condition.in_graph:
            ids, valid = encoder.cached_tokens(prompts, workdir / "embeddings")
            return {"ids": ids, "valid": valid}
        states = encoder.cached(prompts, workdir / "embeddings", config.train.dtype)
        return {"condition": states}

    def progress(datasets: Sequence[Dataset], doing: str) -> tqdm:
        off = not hosts.lead()
        return tqdm(datasets, desc=doing, unit="dataset", dynamic_ncols=True, disable=off)

    inputs = {d.name: prompts_of(d) for d in progress(hosts.share(suite.train), "encode")}
    hosts.lead_waits()
    datasets, weights = [], []
    with hosts.lead_first():
        for dataset in progress(suite.train, "pair"):
            questions, tokens = objective.questions(dataset), objective.tokens(dataset.name, target)
            targets = tokens and tokens.targets
            beside = questions, objective.shown(dataset, questions)
            mine = inputs.get(dataset.name) or prompts_of(dataset)  # or what another has encoded
            datasets.append(PairedDataset(dataset.name, mine, targets, *beside))
            weights += [tokens.importance] if tokens and config.generator.importance else []
    if not weights:
        return datasets, np.ones(target.shape[0], np.float32)
    return datasets, np.mean(weights, axis=0).astype(np.float32)
