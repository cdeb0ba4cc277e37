"""How the train step and the generation step are computed: precision of products, order of sums."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.costs.step_cost import train_arguments
from dnd_jax.generator.generation import ONE_DEVICE, shard_generation
from dnd_jax.generator.sizes import spec_of
from dnd_jax.parallel.mesh import make_mesh
from dnd_jax.parallel.programs import compiler_options
from dnd_jax.parallel.rules import shaped

PRODUCTS = ("stablehlo.convolution", "stablehlo.dot_general")


def settings(**train):
    raw = load_file("tests/tiny.py")
    raw.train.update(train)
    return freeze(raw)


def products(text: str, precision: str) -> tuple[int, int]:
    """(products of a precision, all products) of a lowered program."""
    lines = [line for line in text.splitlines() if any(name in line for name in PRODUCTS)]
    twice = re.compile(rf"\b{precision}\b.*\b{precision}\b")
    return sum(bool(twice.search(line)) for line in lines), len(lines)


@pytest.mark.parametrize(
    ("convolution", "precision", "written"),
    [
        ("direct", "highest", "HIGHEST"),
        ("direct", "tensorfloat32", "HIGH"),
        ("dft", "tensorfloat32", "HIGHEST"),
    ],
)
def test_the_products_of_all_passes_have_the_precision_that_is_set(convolution, precision, written):
    """Those of the forward pass, and of its gradients; in the Fourier domain always float32's."""
    config = settings(precision=precision)
    config = dataclasses.replace(
        config, generator=dataclasses.replace(config.generator, convolution=convolution)
    )
    mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
    step, arguments = train_arguments(config, mesh)
    some, every = products(step.lower(*arguments).as_text(), written)
    assert some == every >= 3 * 5 * len(list(spec_of(config).stages))
    generation = shard_generation(spec_of(config), mesh, ONE_DEVICE.rules)
    condition = jax.ShapeDtypeStruct((1, *spec_of(config).condition_shape), np.float32)
    params = shaped(generation.shapes, generation.shardings)
    some, every = products(generation.step.lower(params, condition).as_text(), written)
    assert some == every > 0


def test_options_are_known_to_the_compiler():
    """A GPU's too are read, wherever one compiles."""
    assert compiler_options("cpu", True) == compiler_options("cpu")
    assert compiler_options("tpu", True) is None is compiler_options("gpu")
    chosen = compiler_options("gpu", True)
    assert jax.jit(lambda x: x + 1, compiler_options=chosen)(1) == 2
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={f"{next(iter(chosen))}x": True})(1)
