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
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.data.sources import text_fault
from dnd_jax.generator.trained import AT_ONCE, Generated, TrainedGenerator, check_strength
from dnd_jax.lora.adapter import DTYPES
from dnd_jax.serving.store import AdapterStore, Entry, NoRoom

ID = 32  # hexadecimal digits
LARGEST_SEED = 2**63 - 1
ROOM, OF_A_TENSOR = 1 << 14, 256  # bytes of an adapter's files beside its tensors, at most


class Busy(Exception):
    """As many requests wait as may: its argument."""


class Closed(Exception):
    """The service is about to end."""


class Unwritable(Exception):
    """The disk of the kept adapters does not take another one."""


class Failed(Exception):
    """The generator, or the machine, failed at an order that was right."""


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
    drawn: list[str]
    future: concurrent.futures.Future
    ordered: float  # time.perf_counter()
    names: set[str] = dataclasses.field(default_factory=set)
    warnings: list[str] = dataclasses.field(default_factory=list)


class Service:
    """A generator that takes orders from any thread. waiting: orders that may wait; dtype: of
    stored tensors; made: called with the number of adapters and the seconds of every batch.

    Raises InputError where the store cannot keep the adapters of one batch, and for a generator
    that takes more than prompts.
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
        self._pending: dict[str, _Job] = {}
        self._lock, self._closed = threading.Lock(), False
        self._waiting = waiting
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        matrices, of_a_cell = generator.layout.matrices, DTYPES[dtype].itemsize
        cells = sum(math.prod(matrix.shape) for matrix in matrices)
        self.size = of_a_cell * cells + OF_A_TENSOR * len(matrices) + ROOM  # bytes, at most
        kept = 2 * max(AT_ONCE, generator.at_once)  # so that one that was just made is there still
        if store.limit < kept * self.size:
            raise InputError(
                f"--cache-gb: {kept} adapters of this generator take "
                f"{kept * self.size / 1e9:.2g} GB; give more"
            )
        if (form := generator.condition.form) != "prompt":
            raise InputError(
                f"{generator.folder}: takes examples with answers (condition.form = {form!r}), "
                "which are not served; use `dnd generate`"
            )
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Orders that are not done."""
        return len(self._pending)

    def warm(self, say: Callable[[str], None]) -> None:
        """Compiles the program of each size of a batch; says how long each took."""
        generator, text = self.generator, "warm up"
        n = generator.condition.num_prompts
        size = 1
        while size < 2 * generator.at_once:
            started = time.perf_counter()
            generator.generate_many([[text] * n] * min(size, generator.at_once))
            say(f"batches of {size}: ready after {time.perf_counter() - started:.1f} s")
            size *= 2

    def id_of(self, order: Order) -> str:
        """The hash of all that decides what an order gives."""
        generator = self.generator
        adapter = generator.adapter.to_json()
        all_of_it = [generator.fingerprint, adapter, self._dtype, order.to_json()]
        all_of_it += [generator.key_prefix] * (generator.key_prefix != "")
        return digests.of_json(all_of_it)[:ID]

    def order(self, order: Order, name: str = "") -> tuple[concurrent.futures.Future, bool]:
        """(an adapter's entry, when it is there; whether it is made for this order: what has been
        made, or is being made, is not made again). name: what else it is to be called by.

        Raises InputError for an order that cannot be, Busy and Closed. The future raises InputError
        for prompts that the generator refuses, NoRoom, Unwritable and Failed.
        """
        check_strength(order.strength, "strength")
        if not 0 <= order.seed <= LARGEST_SEED:
            raise InputError(f"seed: {order.seed} is not between 0 and {LARGEST_SEED}")
        for number, prompt in enumerate(order.prompts):
            if fault := text_fault(prompt):
                raise InputError(f"prompts.{number}: {fault}")
        drawn = self.generator.draw(order.prompts, order.seed)
        if name:
            self.store.check_name(name, order.to_json())
        id = self.id_of(order)
        with self._lock:
            self._check_pending(name, id)
            job = self._pending.get(id)
            entry = self.store.get(id) if job is None else None
            if job is None and entry is None:
                if self._closed:
                    raise Closed
                if len(self._pending) >= self._waiting:
                    raise Busy(self._waiting)
                job = _Job(id, order, drawn, concurrent.futures.Future(), time.perf_counter())
                job.future.set_running_or_notify_cancel()  # a client that leaves cancels no others'
                self._pending[id] = job
                job.names |= {name} - {""}
                self._jobs.put(job)
                return job.future, True
            if job is not None:
                job.names |= {name} - {""}
                return job.future, False
        if name:
            self._call(name, id, order)
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(entry)
        return future, False

    def _check_pending(self, name: str, id: str) -> None:
        """Raises InputError for a name that an order which is not done has asked for."""
        if name and any(name in job.names for job in self._pending.values() if job.id != id):
            raise InputError(f"name: {name!r} stands for another order; take another name")

    def _call(self, name: str, id: str, order: Order) -> None:
        """Keeps a name. Raises InputError where another order has it by now, NoRoom and
        Unwritable."""
        self.store.check_name(name, order.to_json())
        try:
            self.store.call(name, id, order.to_json())
        except InputError as error:
            raise _of_disk(error) from None

    def find(self, key: str) -> str:
        """The id of what an id, or a name, stands for by this generator; empty where it is
        neither."""
        if self.store.get(key) is not None:
            return key
        order = self._order_of(key)
        return self.id_of(order) if order else ""

    def again(self, name: str) -> concurrent.futures.Future | None:
        """The entry of the adapter that a name stands for, made again where it has gone; None for
        what is no name. Raises as `order`."""
        order = self._order_of(name)
        return self.order(order)[0] if order else None

    def delete(self, key: str) -> bool:
        """Whether there was one: the adapter of an id or a name, and its names. Raises InUse."""
        id = self.find(key)
        if id:
            self.store.delete(id)
            self.store.forget(key)
        return id != ""

    def _order_of(self, name: str) -> Order | None:
        known = self.store.order_of(name)
        try:
            return Order(tuple(known["prompts"]), int(known["seed"]), float(known["strength"]))
        except (KeyError, TypeError, ValueError):  # of no name, or of a file that was changed
            return None

    def close(self) -> None:
        """Takes no more orders, refuses those that wait, and ends when the present batch is
        done."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._finish(self._jobs.get_nowait(), error=Closed())
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            jobs = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < self.generator.at_once:  # what has come meanwhile
                    jobs.append(self._jobs.get_nowait())
            ended = None in jobs
            ready = [job for job in jobs if job is not None and self._prepared(job)]
            if ready:
                self._generate(ready)

    def _prepared(self, job: _Job) -> bool:
        """Whether an order's prompts can be used."""
        try:
            self.generator.check(job.order.prompts, "prompts", say=job.warnings.append)
        except InputError as error:
            self._finish(job, error=error)
        except BaseException as error:  # a thread that ends would leave every client waiting
            self._finish(job, error=failed(error))
        return not job.future.done()

    def _generate(self, jobs: Sequence[_Job]) -> None:
        """Makes and keeps the adapters of some orders. What one of a batch fails for need not be
        the others' fault: they are made one by one then."""
        started = time.perf_counter()
        try:
            made = [*self.generator.make([job.drawn for job in jobs])]
        except BaseException as error:
            if len(jobs) == 1:
                self._finish(jobs[0], error=failed(error))
            else:
                for job in jobs:
                    self._generate([job])
            return
        self._made(len(jobs), time.perf_counter() - started)
        for job, one in zip(jobs, made, strict=True):
            try:
                entry = self._kept(job, one)
            except NoRoom as error:
                self._finish(job, error=error)
            except InputError as error:
                self._finish(job, error=_of_disk(error))
            except BaseException as error:
                self._finish(job, error=failed(error))
            else:
                self._finish(job, entry)

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
        """Gives an order's clients the entry or the error, and the adapter its names."""
        with self._lock:
            self._pending.pop(job.id, None)
        try:
            for name in sorted(job.names) if entry is not None else ():
                self._call(name, job.id, job.order)
        except Exception as fault:
            entry, error = None, fault
        if entry is not None:
            job.future.set_result(entry)
        else:
            job.future.set_exception(error)


def _of_disk(error: InputError) -> Unwritable:
    """What clients are told of a disk's error, which is said where the service runs."""
    print(f"dnd: {error}", file=sys.stderr, flush=True)
    return Unwritable()


def failed(error: BaseException) -> Failed:
    """What clients are told of any other."""
    print(f"dnd: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
    return Failed()
