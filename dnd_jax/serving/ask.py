"""Stage `ask`: what a base answers a question without and with an adapter of your prompts.

dnd ask "Which word is last in the list? bowl, chipmunk, quill" --generator=RUN --prompts=FILE
"""

import pathlib
import tempfile
import time

from dnd_jax.base.torch_base import TorchBase
from dnd_jax.core.errors import InputError
from dnd_jax.core.stage import Given
from dnd_jax.data.sources import Example, said_fault
from dnd_jax.generator.generate import trained_base
from dnd_jax.generator.trained import TrainedGenerator, check_strength


def run(given: Given) -> None:
    """Runs the stage."""
    given.need("generator", "prompts")
    check_strength(given["strength"], "--strength")
    if given["max-tokens"] < 1:
        raise InputError(f"--max-tokens={given['max-tokens']}: at least 1")
    if fault := said_fault(given.argument):
        raise InputError(f"QUESTION: {fault}")
    generator = TrainedGenerator(given["generator"], given.config.mesh)
    prompts = generator.read(given["prompts"])
    generator.check(prompts, given["prompts"])
    path = trained_base(given["base"], generator, "QUESTION")

    started = time.perf_counter()
    made = next(generator.make([generator.draw(prompts, given["seed"], given["prompts"])]))
    seconds = time.perf_counter() - started
    closest = f"; closest training tasks: {made.listed}" if made.closest else ""
    print(f"adapter: {seconds:.2f} s{closest}")
    if made.warning:
        print(f"warning: {made.warning}")

    base = TorchBase(path, batch_size=1, max_new_tokens=given["max-tokens"])
    question = [Example(given.argument, "", given["system"])]
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("base", "adapter"):
            if name == "adapter":
                folder = pathlib.Path(scratch, "adapter")
                base.use(generator.save(made, folder, given["seed"], strength=given["strength"]))
            answer = base.decode(base.answer_ids(question))[0]
            print(f"\n{name}\n{answer.strip()}", flush=True)
