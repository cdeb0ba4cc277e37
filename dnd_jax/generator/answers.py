"""The loss of generated LoRAs on the answers of their tasks: weight tokens -> LoRA matrices -> the
frozen base -> cross-entropy, or divergence from what a tuned LoRA makes of it (docs/METHOD.md
section 9)."""

import dataclasses
from collections.abc import Mapping

import jax

from dnd_jax.base.architecture import BaseLM
from dnd_jax.base.layers import common_name
from dnd_jax.base.loss import answer_loss, distillation_loss
from dnd_jax.lora.targets import Target


def loras_of(target: Target, tokens_KxTxHxW: jax.Array) -> dict[str, jax.Array]:
    """Weight tokens of K tasks -> their LoRA matrices, the numbers that an exported adapter has:
    {key: (K, rows, columns)}, or of all layers together, {name inside a layer: (K, layers, rows,
    columns)}. Differentiable; a gather for each kind of matrix."""
    stacked = jax.vmap(lambda tokens: target.layout.stacked(target.chunks(tokens)))(tokens_KxTxHxW)
    found = {}
    for stack, values in zip(target.layout.stacks, stacked, strict=True):
        if name := common_name(stack.keys):
            found[name] = values
        else:
            found |= {key: values[:, i] for i, key in enumerate(stack.keys)}
    return found


@dataclasses.dataclass(frozen=True)
class Answering:
    """The frozen base that generated LoRAs are asked through. lora_scale: alpha / rank, or what the
    adapters' settings make of it. over_tasks: where tasks lie while they are computed, if on a
    mesh."""

    module: BaseLM
    lora_scale: float
    over_tasks: jax.sharding.NamedSharding | None = None

    def losses(
        self,
        params: Mapping,
        target: Target,
        tokens_KxTxHxW: jax.Array,
        rows: Mapping,
        teacher_KxTxHxW: jax.Array | None = None,
        shown: Mapping | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """(mean cross-entropy over the answers' tokens, share of answers whose every token is the
        most likely one), (K,) each, float32. With the tokens of tuned LoRAs as a teacher, or with
        `shown`, the first is the divergence from what the base expects under these, or of itself
        where it reads these.

        params: of the base. target: what the tokens mean. rows: `packed_rows` of questions and
        answers of each task, or {"ids" (K, n, S), "at", "labels" (K, n, R)} of `Sequences.batch`.
        shown: the same answers behind answered examples, R the same.
        """

        teacher = None if teacher_KxTxHxW is None else loras_of(target, teacher_KxTxHxW)
        return self.losses_of(params, loras_of(target, tokens_KxTxHxW), rows, teacher, shown)

    def losses_of(
        self,
        params: Mapping,
        loras: Mapping,
        rows: Mapping,
        teachers: Mapping | None = None,
        shown: Mapping | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`losses` of matrices, (K, ...) as of `loras_of`, in place of their tokens."""

        def one(lora, rows, teacher, shown):
            if teacher is None and shown is None:
                return answer_loss(self.module, params, rows, lora, self.lora_scale)
            how = lora, teacher, self.lora_scale, shown
            return distillation_loss(self.module, params, rows, *how)

        split = None if self.over_tasks is None else self.over_tasks.spec[0]
        return jax.vmap(one, spmd_axis_name=split)(loras, rows, teachers, shown)
