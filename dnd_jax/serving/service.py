"""Adapters on order: one thread generates, several orders in one batch, and what was made is kept.

The same order (generator, prompts, seed, strength, base, type) is the same adapter, made once.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence

from dnd_jax.core import digests
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import text_fault
from dnd_jax.generator.trained import AT_ONCE, Generated, TrainedGenerator, check_strength
from dnd_jax.lora.adapter import DTYPES
from dnd_jax.serving.store import AdapterStore, Entry

ID = 32  # hexadecimal digits
LARGEST_SEED = 2**63 - 1
ROOM, OF_A_TENSOR = 1 << 16, 256  # bytes of an adapter's files beside its tensors, at most


class Busy(Exception):
    """More orders wait than may."""


class Closed(Exception):
    """The service is about to end."""


class Unwritable(Exception):
    """The disk of the kept adapters does not take another one."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What an adapter is made from."""

    prompts: tuple[str, ...]
    seed: int = 0
    strength: float = 1.0

    def to_json(self) -> dict:
        return {"prompts": [*self.prompts], "seed": self.seed, "strength": self.strength}


@dataclasses.dataclass
class _Job:
    id: str
    order: Order
    future: concurrent.futures.Future
    ordered: float  # time.perf_counter()
    drawn: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


class Service:
    """A generator that takes orders from any thread. waiting: orders that may wait; dtype: of
    stored tensors; made: called with the number of adapters and the seconds of every batch.

    Raises InputError where the store cannot keep one adapter.
    """

    def __init__(
        self,
        generator: TrainedGenerator,
        store: AdapterStore,
        waiting: int,
        dtype: str = "float32",
        made: Callable[[int, float], None] = lambda count, seconds: None,
    ):
        self.generator, self.store, self._dtype, self._made = generator, store, dtype, made
        self._pending: dict[str, concurrent.futures.Future] = {}
        self._lock, self._closed = threading.Lock(), False
        self._waiting = waiting
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        matrices, of_a_cell = generator.layout.matrices, DTYPES[dtype].itemsize
        cells = sum(math.prod(matrix.shape) for matrix in matrices)
        self.size = of_a_cell * cells + OF_A_TENSOR * len(matrices) + ROOM  # bytes, at most
        if store.limit < self.size:
            raise InputError(
                f"--cache-gb: an adapter of this generator takes {self.size / 1e9:.2g} GB; give "
                "room for some of them"
            )
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Orders that are not done."""
        return len(self._pending)

    def warm(self, say: Callable[[str], None]) -> None:
        """Compiles the program of each size of a batch; says how long each took."""
        text, n = "warm up", self.generator.condition.num_prompts
        size = 1
        while size <= AT_ONCE:
            started = time.perf_counter()
            self.generator.generate_many([[text] * n] * size)
            say(f"batches of {size}: ready after {time.perf_counter() - started:.1f} s")
            size *= 2

    def id_of(self, order: Order) -> str:
        """The hash of all that decides what an order gives."""
        generator = self.generator
        adapter = generator.adapter.to_json()
        return digests.of_json([generator.fingerprint, adapter, self._dtype, order.to_json()])[:ID]

    def order(self, order: Order, name: str = "") -> concurrent.futures.Future:
        """An adapter's entry, when it is there; an order that has been made, or is being made, is
        not made again. name: what else it is to be called by.

        Raises InputError for an order that cannot be, Busy and Closed. The future raises InputError
        for prompts that the generator refuses, NoRoom and Unwritable.
        """
        check_strength(order.strength, "strength")
        if not 0 <= order.seed <= LARGEST_SEED:
            raise InputError(f"seed: {order.seed} is not between 0 and {LARGEST_SEED}")
        for number, prompt in enumerate(order.prompts):
            if fault := text_fault(prompt):
                raise InputError(f"prompts.{number}: {fault}")
        self.generator.draw(order.prompts, order.seed)
        id = self.id_of(order)
        if name:
            self.store.call(name, order.to_json())
        if (entry := self.store.get(id)) is not None:
            return _done(entry)
        with self._lock:
            if (entry := self.store.get(id)) is not None:
                return _done(entry)
            if (future := self._pending.get(id)) is not None:
                return future
            if self._closed:
                raise Closed
            if len(self._pending) >= self._waiting:
                raise Busy
            future = self._pending[id] = concurrent.futures.Future()
            future.set_running_or_notify_cancel()  # one client that leaves cancels no others'
            self._jobs.put(_Job(id, order, future, time.perf_counter()))
            return future

    def find(self, key: str) -> str:
        """The id that an id, or a name, stands for; empty where it is neither."""
        if self.store.get(key) is not None:
            return key
        order = self._order_of(key)
        return self.id_of(order) if order else ""

    def again(self, name: str) -> concurrent.futures.Future | None:
        """The entry of the adapter that a name stands for, made again where it has gone; None for
        what is no name."""
        order = self._order_of(name)
        return self.order(order) if order else None

    def delete(self, id: str) -> None:
        """An adapter and its names. Raises InUse."""
        self.store.delete(id)
        for name in self.store.names():
            if self.find(name) == id:
                self.store.forget(name)

    def _order_of(self, name: str) -> Order | None:
        known = self.store.order_of(name)
        with contextlib.suppress(KeyError, TypeError):  # of a file that somebody has changed
            return Order(tuple(known["prompts"]), known["seed"], known["strength"])
        return None

    def close(self) -> None:
        """Takes no more orders, and ends when those that wait are done."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            jobs = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < AT_ONCE:  # what has come meanwhile
                    jobs.append(self._jobs.get_nowait())
            ended = None in jobs
            ready = [job for job in jobs if job is not None and self._prepared(job)]
            try:
                if ready:
                    self._generate(ready)
            except BaseException as error:  # a thread that dies silently would hang every client
                for job in ready:
                    self._finish(job, error=error)

    def _prepared(self, job: _Job) -> bool:
        """Whether an order's prompts can be used; draws them."""
        try:
            self.generator.check(job.order.prompts, "prompts", say=job.warnings.append)
            job.drawn = self.generator.draw(job.order.prompts, job.order.seed)
        except Exception as error:
            self._finish(job, error=error)
            return False
        return True

    def _generate(self, jobs: Sequence[_Job]) -> None:
        """Makes and keeps the adapters of some orders. What one of a batch is refused for is not
        the others' fault: they are made one by one then."""
        started = time.perf_counter()
        try:
            made = [*self.generator.make([job.drawn for job in jobs])]
        except InputError as error:
            if len(jobs) == 1:
                self._finish(jobs[0], error=error)
            else:
                for job in jobs:
                    self._generate([job])
            return
        self._made(len(jobs), time.perf_counter() - started)
        for job, one in zip(jobs, made, strict=True):
            try:
                self._finish(job, self._kept(job, one))
            except InputError as error:  # of the disk: the order itself was right
                print(f"dnd: {error}", file=sys.stderr, flush=True)
                self._finish(job, error=Unwritable())
            except Exception as error:
                self._finish(job, error=error)

    def _kept(self, job: _Job, made: Generated) -> Entry:
        order, adapter = job.order, self.generator.adapter
        warnings = job.warnings + [made.warning] * (made.warning != "")

        def write(folder):
            self.generator.save(made, folder, order.seed, self._dtype, order.strength)

        return self.store.put(
            job.id,
            self.size,
            write,
            base=adapter.base,
            rank=adapter.rank,
            seed=order.seed,
            strength=order.strength,
            prompts=len(order.prompts),
            seconds=round(time.perf_counter() - job.ordered, 4),
            made=round(time.time(), 3),
            closest=made.closest,
            warnings=tuple(warnings),
        )

    def _finish(
        self, job: _Job, entry: Entry | None = None, error: BaseException | None = None
    ) -> None:
        """Gives an order's client the entry or the error, once."""
        with self._lock:
            self._pending.pop(job.id, None)
        if job.future.done():
            return
        if entry is not None:
            job.future.set_result(entry)
        else:
            job.future.set_exception(error)


def _done(entry: Entry) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    future.set_result(entry)
    return future
