"""Trained through the base: the loss on answers and its gradient are PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from peft import LoraConfig, get_peft_model
from small_models import write_qwen
from transformers import AutoModelForCausalLM

from dnd_jax.base.folder import load_base
from dnd_jax.base.sequences import Sequences, packed_rows
from dnd_jax.generator.answers import Answering
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.targets import from_statistics

RANK, ALPHA, TARGETS = 2, 6.0, ("q_proj", "v_proj", "down_proj")
TASKS, ROWS, LENGTH, ANSWER = 3, 4, 9, 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    """Two layers, four heads on two key-value heads."""
    folder = tmp_path_factory.mktemp("base")
    return write_qwen(folder, tie_word_embeddings=request.param)


def target_of(kind: str, shapes) -> object:
    layout, rng = LoraLayout.from_shapes(shapes), np.random.default_rng(1)
    mean = 0.1 * rng.normal(size=(layout.num_tokens, *layout.chunk_shape)).astype(np.float32)
    scale = rng.uniform(0.1, 0.5, layout.num_tokens).astype(np.float32)
    return from_statistics(kind, layout, {"mean": mean, "scale": scale})


def behind_others(rows: dict[str, np.ndarray], vocabulary: int) -> dict[str, np.ndarray]:
    """The same questions and answers behind four tokens more."""
    before = np.random.default_rng(5).integers(0, vocabulary, (TASKS, ROWS, 4)).astype(np.int32)
    ids = np.concatenate([before, rows["ids"]], axis=-1)
    return {"ids": ids, "at": rows["at"] + 4, "labels": rows["labels"]}


def rows_of(vocabulary: int) -> dict[str, np.ndarray]:
    """Questions and answers of 1 to 3 tokens, padded."""
    rng = np.random.default_rng(2)
    ids = rng.integers(0, vocabulary, (TASKS, ROWS, LENGTH)).astype(np.int32)
    lengths = rng.integers(1, ANSWER + 1, (TASKS, ROWS, 1))
    at = np.minimum(LENGTH - ANSWER - 1 + np.arange(ANSWER), LENGTH - 2) + 0 * lengths
    labels = np.where(np.arange(ANSWER) < lengths, np.take_along_axis(ids, at + 1, -1), -1)
    return {"ids": ids, "at": at.astype(np.int32), "labels": labels.astype(np.int32)}


def packed(rows: dict[str, np.ndarray], prefix: int = 0) -> dict[str, np.ndarray]:
    """The same as a step of training has them."""
    tasks = []
    for ids, at, labels in zip(rows["ids"], rows["at"], rows["labels"], strict=True):
        start = at[:, 0] + 1
        tasks.append(Sequences(ids, start, start + (labels >= 0).sum(axis=1)))
    return packed_rows(tasks, [np.arange(ROWS)] * TASKS, prefix, 0)


def in_pytorch(
    base, target, tokens: np.ndarray, rows, teacher: np.ndarray | None = None, shown=None
) -> tuple[list[float], np.ndarray]:
    """(each task's loss, gradient of their mean by the tokens): a PEFT model with each task's LoRA,
    and autograd through B, A and what makes them of tokens. teacher: tokens of the LoRAs whose
    answers are to be met. shown: rows behind which the base's own are."""
    layout = target.layout
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    model = get_peft_model(model, settings).eval()
    shapes = {m.key: m.shape for m in layout.matrices}

    def chosen(tokens: torch.Tensor, k: int) -> torch.Tensor:
        """The logits (n * R, V) of task k's answers under the LoRA of these tokens."""
        if hasattr(target, "mean"):
            chunks = tokens * torch.from_numpy(target.scale)[:, None, None]
            chunks = chunks + torch.from_numpy(target.mean)
            lora = {}
            for m in layout.matrices:
                parts = chunks[m.first_token : m.first_token + m.num_tokens]
                matrix = torch.cat(list(parts), dim=1)[:, : max(m.shape)]
                lora[m.key] = matrix.T if m.is_b else matrix
        else:
            lora = torch_reference.detokenize(tokens, shapes, layout.chunk_width)
        named = {
            f"base_model.model.{key.replace('.weight', '.default.weight')}": value
            for key, value in lora.items()
        }
        ids = torch.from_numpy(rows["ids"][k]).long()
        logits = torch.func.functional_call(model, named, kwargs={"input_ids": ids}).logits
        at = torch.from_numpy(rows["at"][k]).long()
        return torch.take_along_dim(logits, at[..., None], 1).flatten(0, 1)

    leaves, losses = torch.from_numpy(tokens).requires_grad_(), []
    for k in range(TASKS):
        labels, logits = torch.from_numpy(rows["labels"][k]).long().flatten(), chosen(leaves[k], k)
        if teacher is None and shown is None:
            losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1))
            continue
        with torch.no_grad():
            if shown is None:
                wanted = chosen(torch.from_numpy(teacher[k]), k)
            else:
                with model.disable_adapter():
                    logits_k = model(torch.from_numpy(shown["ids"][k]).long()).logits
                at = torch.from_numpy(shown["at"][k]).long()
                wanted = torch.take_along_dim(logits_k, at[..., None], 1).flatten(0, 1)
            wanted = wanted[labels >= 0].log_softmax(-1)
        student = logits[labels >= 0].log_softmax(-1)
        how = {"reduction": "batchmean", "log_target": True}
        losses.append(torch.nn.functional.kl_div(student, wanted, **how))
    torch.stack(losses).mean().backward()
    return [float(loss.detach()) for loss in losses], leaves.grad.numpy()


@pytest.mark.parametrize("of", ["answers", "a LoRA", "answered examples"])
@pytest.mark.parametrize("kind", ["element", "chunk"])
def test_loss_and_gradient_are_those_of_peft(base, kind, of):
    module, params = load_base(base)
    target = target_of(kind, module.config.lora_shapes(RANK, TARGETS))
    rng, rows = np.random.default_rng(3), rows_of(module.config.vocab_size)
    tokens = rng.normal(size=(TASKS, *target.shape)).astype(np.float32)
    teacher = rng.normal(size=tokens.shape).astype(np.float32) if of == "a LoRA" else None
    shown = behind_others(rows, module.config.vocab_size) if of == "answered examples" else None
    answering = Answering(module, ALPHA / RANK)

    asked, behind = packed(rows), packed(shown) if shown else None

    def mean_loss(tokens):
        losses, exact = answering.losses(params, target, tokens, asked, teacher, behind)
        return losses.mean(), (losses, exact)

    (_, (losses, exact)), gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(tokens)
    expected, by_torch = in_pytorch(base, target, tokens, rows, teacher, shown)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert exact.shape == (TASKS,)
    assert np.abs(by_torch).max() > 1e-2  # the comparison says something
    np.testing.assert_allclose(gradient, by_torch, rtol=1e-4, atol=1e-6)
    if teacher is not None:  # who gives the teacher's answers has nothing left to learn
        own, _ = answering.losses(params, target, jnp.asarray(tokens), rows, jnp.asarray(tokens))
        np.testing.assert_allclose(own, 0, atol=1e-6)


def test_a_task_is_its_own_affair(base):
    """Its loss depends on its own tokens and rows alone; and a shared prefix changes nothing."""
    module, params = load_base(base)
    target = target_of("element", module.config.lora_shapes(RANK, TARGETS))
    rows = rows_of(module.config.vocab_size)
    tokens = np.random.default_rng(4).normal(size=(TASKS, *target.shape)).astype(np.float32)
    answering = Answering(module, ALPHA / RANK)
    losses, _ = answering.losses(params, target, jnp.asarray(tokens), rows)
    for k in range(TASKS):
        one = {key: value[k : k + 1] for key, value in rows.items()}
        alone, _ = answering.losses(params, target, jnp.asarray(tokens[k : k + 1]), one)
        np.testing.assert_allclose(alone[0], losses[k], rtol=1e-6)
    rows["ids"][:, :, :3] = rows["ids"][:, :1, :3]
    whole, _ = answering.losses(params, target, jnp.asarray(tokens), rows)
    for prefix in (0, 3):
        parted, _ = answering.losses(params, target, jnp.asarray(tokens), packed(rows, prefix))
        np.testing.assert_allclose(parted, whole, rtol=1e-5)
