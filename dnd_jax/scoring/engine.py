"""What adapters are scored by: PyTorch, one after another, or a running server, several at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any, NamedTuple

from dnd_jax.base.asked_base import AskedBase
from dnd_jax.base.served import Served
from dnd_jax.base.served_base import ServedBase
from dnd_jax.base.torch_base import TorchBase
from dnd_jax.config.schema import Evaluate
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, labels_of
from dnd_jax.lora.served_adapters import served_adapters

SECONDS = 3600.0  # for the answers to a batch of questions, on a slow machine too


class Answers(NamedTuple):
    """To a dataset's test questions. cut: 1.0 for each that was cut off before its end token;
    nothing for labels."""

    texts: list[str]
    cut: list[float] | None


def open_engine(base_path, c: Evaluate) -> AskedBase:
    """The base as scores are asked for. Raises as `load_torch_base` or `ServedBase`."""
    if not c.engine:
        return TorchBase.of(base_path, c)
    server = Served(c.engine, c.engine_token_file, SECONDS)
    return ServedBase(base_path, server, c.batch_size, c.max_new_tokens)


@contextlib.contextmanager
def with_adapters(
    base: AskedBase, folders: Sequence[str], at_once: int
) -> Iterator[list[AskedBase]]:
    """Bases that can use these adapters, each another one at a time, while the block lasts: the one
    in PyTorch; of a server so many, which has then loaded them."""
    if not isinstance(base, ServedBase):
        yield [base]
        return
    with served_adapters(base, folders) as names:
        yield [base.knowing(names) for _ in range(at_once)]


def each(
    bases: Sequence[AskedBase], jobs: Sequence, work: Callable[[AskedBase, Any], Any]
) -> Iterator[Any]:
    """What `work` makes of each job with one of the bases: by a single base in order, by several as
    they finish. Where it raises, no other job begins, those that have begun are waited for, and the
    first error is raised behind what they made."""
    if len(bases) == 1:
        yield from (work(bases[0], job) for job in jobs)
        return
    idle, failed = SimpleQueue(), None
    for base in bases:
        idle.put(base)

    def by_one(job) -> Any:
        base = idle.get()
        try:
            return work(base, job)
        finally:
            idle.put(base)

    with ThreadPoolExecutor(len(bases)) as pool:
        waiting = [pool.submit(by_one, job) for job in jobs]
        cancel = lambda: [job.cancel() for job in waiting]
        try:
            for done in as_completed(waiting):
                if done.cancelled():
                    continue
                if error := done.exception():
                    failed = failed or error
                    cancel()
                else:
                    yield done.result()
        finally:
            cancel()
    if failed:
        raise failed


def answers_to(
    base: AskedBase, datasets: Sequence[Dataset], how: str, shots: Sequence[Example] = ()
) -> dict[str, Answers]:
    """{dataset: the answers} of the adapter in use; how: config.evaluate.answers. shots: answered
    examples before every question."""
    if how == "likelihood":
        return {d.name: Answers(base.choose(d.test, labels_of(d), shots), None) for d in datasets}
    ids = base.answer_ids([e for d in datasets for e in d.test], shots=shots)
    texts, cut = base.decode(ids), [float(len(row) >= base.max_new_tokens) for row in ids]
    found, first = {}, 0
    for d in datasets:
        here = slice(first, first + len(d.test))
        found[d.name], first = Answers(texts[here], cut[here]), here.stop
    return found
