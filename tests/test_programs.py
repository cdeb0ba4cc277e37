"""The programs of the train, generation and collect steps are those that are stored: a change that
only moves code leaves their lowered text as it is.

One that is meant to change a program writes the file anew and says so:

    python -m pytest tests/test_programs.py --update-golden
"""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import numpy as np
import pytest

from dnd_jax.base.architecture import BaseLM, LmConfig, sizes_to_pretrain
from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.costs.collect_cost import row_shapes
from dnd_jax.costs.step_cost import generate_arguments, train_arguments
from dnd_jax.loop.optimizers import lora_optimizer
from dnd_jax.lora.task_step import first_state, make_collect_step
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.rules import leading, replicated, sharding_table

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/programs.txt"
MESHES = ((8, 1, 1), (2, 4, 1), (1, 4, 2))
TASKS, LENGTH, ANSWER = 8, 64, 8  # of the collect step: K, L, the answer's tokens
# Setting -> the sizes of its base; None: what `dnd pretrain` makes, with 512 tokens.
BASES = {
    "mini": None,
    "qwen2_5_0_5b_commonsense": LmConfig(151936, 896, 4864, 24, 14, 2, 1e-6, 1e6, True),
    "qwen2_5_7b_code": LmConfig(152064, 3584, 18944, 28, 28, 4, 1e-6, 1e6, False),
}
SLOW = pytest.mark.slow


def on_mesh(config: Config, data: int, fsdp: int, tensor: int) -> Config:
    return dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
    )


def collect_text(config: Config, sizes: LmConfig) -> str:
    """The lowered step of `dnd collect` for 8 tasks, one a device."""
    lora, mesh, module = config.lora, make_mesh(config.mesh), BaseLM(sizes)
    params = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    optimizer = lora_optimizer(lora)
    shapes = sizes.lora_shapes(lora.rank, lora.targets)
    made = functools.partial(first_state, shapes=shapes, optimizer=optimizer, tasks=TASKS)
    state = jax.eval_shape(made, jax.random.key(0))
    over_tasks = leading(mesh, TASKS, "tasks")
    lengths = dataclasses.replace(config.base, max_length=LENGTH)
    of_rows = dataclasses.replace(config, base=lengths), TASKS, lora.batch_size, ANSWER, over_tasks
    batch = row_shapes(*of_rows)
    step = jax.jit(
        make_collect_step(module, optimizer, lora.alpha / lora.rank, over_tasks),
        out_shardings=(over_tasks, replicated(mesh)),
        donate_argnums=1,
    )
    return step.lower(params, state, batch).as_text()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def programs(setting: str, sizes: LmConfig | None) -> list[str]:
    """A line for each program of a setting: its mesh, step, length and digest of its text, and the
    digest of the table of its parameters' and optimiser's shardings."""
    config, lines = freeze(load_file(f"{ROOT}/configs/{setting}.py")), []
    for shape in MESHES:
        here = on_mesh(config, *shape)
        mesh, where = make_mesh(here.mesh), f"{setting} {'x'.join(map(str, shape))}"
        for step, arguments in (("train", train_arguments), ("generate", generate_arguments)):
            jitted, shapes = arguments(here, mesh)
            text = jitted.lower(*shapes).as_text()
            lines.append(f"{where} {step} {len(text)} {digest(text)}")
            table = sharding_table(shapes[0], jax.tree.map(lambda x: x.sharding, shapes[0]))
            lines.append(f"{where} {step} shardings {digest(chr(10).join(table))}")
    text = collect_text(on_mesh(config, 8, 1, 1), sizes or sizes_to_pretrain(config.base, 512))
    return [*lines, f"{setting} 8x1x1 collect {len(text)} {digest(text)}"]


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=() if name == "mini" else SLOW) for name in BASES]
)
def test_programs_are_those_that_are_stored(setting, update_golden):
    version, *stored = GOLDEN.read_text().splitlines()
    written_with = version.removeprefix("jax ")
    if written_with != jax.__version__ and not update_golden:
        pytest.skip(
            f"compares nothing: {GOLDEN.name} holds programs of jax {written_with}, and this is "
            f"{jax.__version__}; --update-golden writes it anew"
        )
    found = programs(setting, BASES[setting])
    if update_golden:  # the other settings' programs of this version stay
        lines = {name: [] for name in BASES}
        for line in stored if written_with == jax.__version__ else ():
            lines[line.partition(" ")[0]].append(line)
        text = [f"jax {jax.__version__}", *sum((lines | {setting: found}).values(), [])]
        GOLDEN.write_text("\n".join(text) + "\n")
    assert found == [
        line for line in GOLDEN.read_text().splitlines() if line.startswith(f"{setting} ")
    ]
