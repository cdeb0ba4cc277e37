"""The convolution that the decoder is made of: direct, or tile by tile in the Fourier domain, chosen for each by a cost model."""

from dnd_jax.ops.convolution import METHODS, convolve
from dnd_jax.ops.plan import Plan, Problem, choose, compiler_options

__all__ = ["METHODS", "Plan", "Problem", "choose", "compiler_options", "convolve"]
