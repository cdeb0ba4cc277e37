"""LoRAs of several tasks, tuned in one step: vmap over the tasks, the base shared."""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dnd_jax.base.architecture import BaseLM, LmConfig
from dnd_jax.base.chat import ends_of
from dnd_jax.base.folder import load_base, load_tokenizer
from dnd_jax.base.found import find_base
from dnd_jax.base.layers import of_each_layer
from dnd_jax.base.sequences import Sequences, encode, packed_rows, shared_prefix
from dnd_jax.config import schema
from dnd_jax.config.schema import Config
from dnd_jax.core.files import read_object, write_json
from dnd_jax.core.stage import Given
from dnd_jax.core.workdir import METRICS
from dnd_jax.data.opened import open_suite
from dnd_jax.data.sources import Example
from dnd_jax.loop.optimizers import lora_optimizer
from dnd_jax.loop.prefetch import shuffled_rows
from dnd_jax.loop.run import run_loop
from dnd_jax.loop.training import Options, Training
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig, adapter_of
from dnd_jax.lora.scores import Score, score_loras
from dnd_jax.lora.task_step import Flattening, first_state, make_collect_step
from dnd_jax.parallel import hosts, together
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.placement import batch_ways
from dnd_jax.parallel.programs import compiler_options
from dnd_jax.parallel.room import free_bytes
from dnd_jax.parallel.rules import leading, replicated, shaped

GROUPS = "groups.json"  # in the folder of a training in groups
ROOM = 0.6  # of the free memory that a step may take
SCORED = 2  # times as many rows at once as a step has: no gradient needs what lies between


def bytes_of_task(base: LmConfig, c: schema.Lora, rows: Sequences) -> int:
    """About how much a training step holds for one task: its state and gradient, and what the
    backward pass needs of each token. That is one layer at a time, and of all their inputs, and
    without lora.remat their products."""
    shapes = base.lora_shapes(c.rank, c.targets).values()
    state = 4 * 4 * sum(math.prod(shape) for shape in shapes)
    length, item = rows.ids.shape[1], jnp.dtype(c.dtype).itemsize
    heads, kv_heads, width = base.num_attention_heads, base.num_key_value_heads, base.head_width
    # Inputs of norms and projections, queries, keys, values, and the feed-forward's inner states.
    layer = 6 * base.hidden_size + 2 * (heads + kv_heads) * width + 4 * base.intermediate_size
    layer = item * layer + 4 * 2 * heads * length  # attention is in float32
    products = base.hidden_size + (heads + 2 * kv_heads) * width + 2 * base.intermediate_size
    kept = item * (base.hidden_size + (0 if c.remat else products))
    layers = layer + base.num_hidden_layers * kept
    logits = 4 * 3 * rows.response_width * base.vocab_size
    return state + c.batch_size * (length * layers + logits)


@dataclasses.dataclass(frozen=True)
class TaskBatches:
    """The batches of all tasks, one entry a task, on a mesh.

    A number of tasks that the mesh does not divide is filled up with copies inside the step alone.
    The state, then whole on every device, has none of them: a stopped run goes on with any number
    of devices.
    """

    tasks: Sequence[Sequences]
    batch_size: int
    seed: int
    pad: int  # token id
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def _entries(self) -> np.ndarray:
        """The task of each entry of a batch."""
        count, ways = len(self.tasks), batch_ways(self.mesh)
        return np.arange(-(-count // ways) * ways) % count

    @functools.cached_property
    def over_tasks(self) -> jax.sharding.NamedSharding:
        """Where a batch's entries lie."""
        return leading(self.mesh, len(self._entries), "the number of tasks")

    @property
    def of_state(self) -> jax.sharding.NamedSharding:
        """Where the state of the tasks lies between steps."""
        return self.over_tasks if len(self._entries) == len(self.tasks) else replicated(self.mesh)

    @functools.cached_property
    def _prefix(self) -> int:
        return shared_prefix(self.tasks)

    def at(self, i: int) -> dict[str, jax.Array]:
        """The i-th batch, `packed_rows` of the entries: all tasks read their examples in the same
        order."""
        index = [shuffled_rows(len(t), self.batch_size, self.seed, i) for t in self.tasks]
        rows = packed_rows(self.tasks, index, self._prefix, self.pad)

        def placed(of_tasks: np.ndarray) -> jax.Array:
            whole = of_tasks[self._entries]
            return jax.make_array_from_callback(whole.shape, self.over_tasks, whole.__getitem__)

        return jax.tree.map(placed, rows)


class Task(NamedTuple):
    """What a LoRA is tuned on. It is written after each of its last `kept` steps, and after those
    of `also`. test: what `train_in_groups` scores it on, if anything."""

    name: str
    train: Sequences
    kept: int
    test: Sequences | None = None
    also: Collection[int] = ()


class Tuned(NamedTuple):
    """How a task ended."""

    steps: int  # that its LoRA has taken
    exact: float | None  # match on its test examples


def run_stage(
    name: str,
    make: Callable[..., pathlib.Path],
    said: Callable[[pathlib.Path], str],
    given: Given,
) -> None:
    """Runs a stage, in one process or several, that makes LoRAs of a run's base: make(config,
    suite, base, workdir, allowed, base name) -> their folder, of which `said` is printed."""
    with together.together(given, name):
        with hosts.lead_first():
            suite = open_suite(given.config, given.workdir, given["strict"])
            base = find_base(given.config, given.workdir)
        more = given["allow"], given["base-name"]
        folder = make(given.config, suite, base, given.workdir, *more)
        if hosts.lead():
            print(said(folder))


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """LoRAs of one base: its parameters on the mesh, and how its questions are asked."""

    config: Config
    module: BaseLM
    params: Mapping
    mesh: jax.sharding.Mesh
    adapter: AdapterConfig
    tokenizer: Any
    ends: Collection[int]  # tokens that end an answer
    steps: dict = dataclasses.field(default_factory=dict)  # jitted, by how tasks lie

    @classmethod
    def of(cls, config: Config, base_path: str, name: str = "") -> "Tuning":
        """Loads the base. name: what the adapters call it; empty: its hub id or absolute path.
        Raises InputError for a base that cannot be read, or whose answers have no end."""
        c, mesh = config.lora, make_mesh(config.mesh)
        module, params = load_base(base_path, mesh, jnp.dtype(c.dtype))
        module = dataclasses.replace(module, remat=c.remat, mesh=mesh)
        tokenizer = load_tokenizer(base_path)
        ends = ends_of(base_path, tokenizer)  # refused now, not when the LoRAs are scored
        adapter = adapter_of(base_path, c, name)
        return cls(config, module, params, mesh, adapter, tokenizer, ends)

    def encoded(self, examples: Sequence[Example], what: str) -> Sequences:
        """Examples as tokens; says how many of them are too long for the base."""
        length, too_long = self.config.base.max_length, self.config.lora.too_long
        found = encode(self.tokenizer, examples, length, too_long, self.ends)
        if (lost := found.lost(what, length)) and hosts.lead():
            print(f"{lost} (config.lora.too_long={too_long})", flush=True)
        return found

    def train_in_groups(
        self,
        title: str,
        directory: pathlib.Path,
        tasks: Sequence[Task],
        folder: pathlib.Path,
        record: Mapping,
        options: Options,
    ) -> dict[str, Tuned]:
        """Trains as many LoRAs at once as have room, one group after the other, each in a folder of
        its own where there are several. Returns how each task ended. Arguments as of `train`."""
        at_once = self._at_once(tasks, directory) if hosts.lead() else 0
        size, tuned = hosts.of_lead(at_once), {}
        count = -(-len(tasks) // size)
        size = -(-len(tasks) // count)
        for number in range(count):
            group = tasks[number * size : (number + 1) * size]
            where, which = directory / f"group_{number:03d}", f"{title} {number + 1}/{count}"
            here, named = (title, directory), record
            if count > 1:
                here, named = (which, where), {**record, "tasks": [task.name for task in group]}
            lora, ends = self.train(*here, group, folder, named, options)
            exact = [None] * len(group)
            if any(task.test for task in group):
                scores = self.scores(lora, [task.test for task in group])
                exact = [round(score.exact, 4) for score in scores]
            for task, end, score in zip(group, ends, exact, strict=True):
                tuned[task.name] = Tuned(end, score)
        return tuned

    def _at_once(self, tasks: Sequence[Task], directory: pathlib.Path) -> int:
        """How many tasks have room at once. What was chosen first stays, so that a stopped run goes
        on with the same groups."""
        c, path = self.config.lora, directory / GROUPS
        if path.is_file():
            size = int(read_object(path)["tasks_at_once"])
            if c.tasks_at_once not in (0, size):
                print(f"{path}: {size} tasks at once, as this run began", flush=True)
            return size
        if (directory / METRICS).is_file():  # begun by a version that knew no groups
            return len(tasks)
        rows = [of for task in tasks for of in (task.train, task.test) if of]
        largest = max(bytes_of_task(self.module.config, c, of) for of in rows)
        free = ROOM * free_bytes(self.mesh.local_devices[0])
        fit = c.tasks_at_once or max(1, int(free / largest)) * batch_ways(self.mesh)
        write_json(path, {"tasks_at_once": fit})
        return fit

    def train(
        self,
        title: str,
        directory: pathlib.Path,
        tasks: Sequence[Task],
        folder: pathlib.Path,
        record: Mapping,
        options: Options,
        lora: schema.Lora | None = None,
    ) -> tuple[dict[str, jax.Array], list[int]]:
        """Trains the LoRAs of tasks in one loop and returns (the last of each, as `first_state` has
        them; the steps of each); process 0 writes folder/TASK/step_NNNNNN. directory: of the loop.
        lora: settings in place of the configuration's. Raises as `run_loop`."""
        c, seed = lora or self.config.lora, self.config.seed
        pad = self.tokenizer.pad_token_id
        batches = TaskBatches([t.train for t in tasks], c.batch_size, seed, pad, self.mesh)
        optimizer, flattening = lora_optimizer(c), Flattening.of(c)

        def init(key):
            matrices = self.module.config.lora_shapes(c.rank, c.targets)
            return first_state(key, matrices, optimizer, len(tasks), flattening)

        key = jax.random.fold_in(jax.random.key(seed), 1)
        shapes = jax.eval_shape(init, key)
        step = self._step(c, optimizer, batches)

        # The last step of each task, known M steps ahead: that of the step before will do, which is
        # there while this one is computed.
        known = collections.deque([[c.steps] * len(tasks)], maxlen=2)

        def ends(state: Mapping) -> list[int]:
            if not flattening:
                return known[0]
            return np.asarray(hosts.to_all_hosts(state["flat"]["end"])).tolist()

        def take(state: Mapping, batch: Mapping) -> tuple[Mapping, Mapping]:
            if flattening and len(known) < 2:
                known.append(ends(state))
            state, values = step(self.params, state, batch)
            if flattening:
                known.append(values.pop("end"))
            return state, values

        def keep(done: int, state: Mapping) -> None:
            before = np.asarray(known[0]).tolist()
            now = [
                k
                for k, (task, end) in enumerate(zip(tasks, before, strict=True))
                if end - task.kept < done <= end or done in task.also
            ]
            loras = hosts.to_all_hosts(state["lora"]) if now else {}
            for k in now if hosts.lead() else ():
                tensors = of_each_layer({name: value[k] for name, value in loras.items()})
                save_adapter(folder / tasks[k].name / f"step_{done:06d}", tensors, self.adapter)

        training = Training(
            title,
            directory,
            record,
            shaped(shapes, jax.tree.map(lambda _: batches.of_state, shapes)),
            init=lambda: jax.jit(init, out_shardings=batches.of_state)(key),
            step=take,
            batch_at=batches.at,
            steps=c.steps,
            save_every=c.save_every,
            after_step=keep,
            ended=lambda done, state: done >= max(ends(state)),
        )
        state = run_loop(training, options)
        return state["lora"], ends(state)

    def scores(self, lora: Mapping[str, jax.Array], rows: Sequence[Sequences]) -> list[Score]:
        """Those of LoRAs (K, ...), each on rows of its own."""
        how = self.module, self.params, hosts.to_all_hosts(lora), self.adapter.scale
        return score_loras(*how, rows, SCORED * self.config.lora.batch_size)

    def _step(self, c: schema.Lora, optimizer, batches: TaskBatches) -> Callable:
        """The jitted step of tasks that lie so, one for all groups of them."""
        key = c, batches.over_tasks, batches.of_state
        if key not in self.steps:
            how = self.adapter.scale, batches.over_tasks, Flattening.of(c)
            step = make_collect_step(self.module, optimizer, *how)
            out = batches.of_state, replicated(self.mesh)
            options = compiler_options(self.mesh.devices.flat[0].platform)
            self.steps[key] = jax.jit(
                step, out_shardings=out, donate_argnums=1, compiler_options=options
            )
        return self.steps[key]
