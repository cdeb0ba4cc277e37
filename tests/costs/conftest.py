"""What programs cost is asked of programs as users compile them."""

import os

import jax
import pytest

FLAG = "jax_disable_most_optimizations"


@pytest.fixture(autouse=True, scope="module")
def optimised():
    jax.config.update(FLAG, False)
    yield
    jax.config.update(FLAG, os.environ.get(FLAG.upper()) == "1")
