"""The step that tunes the LoRAs of several tasks, vmapped over them, and the state that it keeps.

A task may stop by itself: where the loss has flattened, M steps later (docs/METHOD.md section 1).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dnd_jax.base.architecture import BaseLM
from dnd_jax.base.layers import stacked
from dnd_jax.base.loss import answer_loss
from dnd_jax.config import schema

FALL = 0.02  # a mean loss has flattened that fell by a smaller share


class Flattening(NamedTuple):
    """When a task stops by itself."""

    window: int  # steps whose mean loss is compared with that of as many before
    more: int  # steps that follow: M checkpoints
    last: int  # step, lora.steps

    @classmethod
    def of(cls, c: schema.Lora) -> "Flattening | None":
        """None where every task takes all steps."""
        return cls(c.flat_window, c.checkpoints, c.steps) if c.flat_window else None

    def first(self) -> dict[str, jax.Array]:
        """Of a task that has taken no step."""
        return {
            "step": jnp.int32(0),  # steps taken
            "end": jnp.int32(self.last),
            "sum": jnp.float32(0),  # of the losses of this window
            "before": jnp.float32(jnp.inf),  # of those of the window before
        }

    def after(self, then: Mapping[str, jax.Array], loss: jax.Array) -> dict[str, jax.Array]:
        """A task's state after one more step."""
        step, losses = then["step"] + 1, then["sum"] + loss
        full = step % self.window == 0
        known = then["end"] < self.last
        flat = full & ~known & (step + self.more < self.last)
        flat &= losses > (1 - FALL) * then["before"]
        return {
            "step": step,
            "end": jnp.where(flat, step + self.more, then["end"]),
            "sum": jnp.where(full, 0.0, losses),
            "before": jnp.where(full, losses, then["before"]),
        }


def init_lora(key: jax.Array, shapes: Mapping[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """PEFT's default: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0."""
    keys = dict(zip(sorted(shapes), jax.random.split(key, len(shapes)), strict=True))

    def init(name: str, shape: tuple[int, int]) -> jax.Array:
        if ".lora_B." in name:
            return jnp.zeros(shape)
        return jax.random.uniform(keys[name], shape, minval=-1, maxval=1) * shape[1] ** -0.5

    return {name: init(name, shape) for name, shape in shapes.items()}


def first_state(
    key: jax.Array,
    shapes: Mapping[str, tuple[int, int]],
    optimizer: optax.GradientTransformation,
    tasks: int = 1,
    flattening: Flattening | None = None,
) -> dict[str, Any]:
    """The state of K tasks that start from the same A, (K, ...): the LoRA's matrices, those of all
    layers stacked, and the optimiser's. shapes: of each layer's matrices."""
    lora = stacked(init_lora(key, shapes))
    state = {"lora": lora, "opt": optimizer.init(lora)}
    if flattening:
        state["flat"] = flattening.first()
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (tasks, *x.shape)), state)


def make_collect_step(
    module: BaseLM,
    optimizer: optax.GradientTransformation,
    lora_scale: float,
    over_tasks: jax.sharding.NamedSharding | None = None,
    flattening: Flattening | None = None,
):
    """step(base params, state of K tasks, batch (K, ...)) -> (state, metrics).

    over_tasks: where the tasks lie while they are computed. The batch may have more entries than K,
    copies of the first ones that make them divide; nothing of what is returned depends on them. A
    task that has stopped stays as it is, whatever its batch. With `flattening` the metrics have
    "end" (K,), the last step of each task as far as it is known.
    """

    def one(params, state, batch):
        def loss_of(lora):
            return answer_loss(module, params, batch, lora, lora_scale)

        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["lora"])
        updates, opt = optimizer.update(gradient, state["opt"], state["lora"])
        new = {"lora": optax.apply_updates(state["lora"], updates), "opt": opt}
        if flattening:
            flat = state["flat"]
            new["flat"] = flattening.after(flat, loss)
            goes_on = flat["step"] < flat["end"]
            new = jax.tree.map(lambda now, then: jnp.where(goes_on, now, then), new, state)
        return new, loss, accuracy

    def step(params, state, batch):
        tasks, entries = (len(jax.tree.leaves(tree)[0]) for tree in (state, batch))
        if entries > tasks:
            state = jax.tree.map(lambda x: x[np.arange(entries) % tasks], state)
            state = jax.lax.with_sharding_constraint(state, over_tasks)
        split = None if over_tasks is None else over_tasks.spec[0]
        found = jax.vmap(one, in_axes=(None, 0, 0), spmd_axis_name=split)(params, state, batch)
        state, losses, accuracies = jax.tree.map(lambda x: x[:tasks], found)
        metrics = {
            "loss": losses.mean(),
            "accuracy": accuracies.mean(),
            "worst_loss": losses.max(),
        }
        return state, metrics | ({"end": state["flat"]["end"]} if flattening else {})

    return step
