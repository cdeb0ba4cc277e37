"""What programs cost is asked of programs as users compile them."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def optimised():
    before = jax.config.jax_disable_most_optimizations
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
