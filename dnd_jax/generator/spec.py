"""`DecoderSpec`: everything that defines a decoder, in one value; its parameters, operations and
convolutions in closed form (docs/METHOD.md section 5)."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from dnd_jax.config import schema
from dnd_jax.config.schema import Features
from dnd_jax.ops.choice import choose
from dnd_jax.ops.cost_model import ConvPlan, Problem
from dnd_jax.ops.rates import Rates


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A generator's decoder and its length projection: sizes, and how they are computed."""

    # (N, L, C) of the decoder's input and after every stage; the last is the token grid (T, h, w).
    features: tuple[Features, ...]
    kernel_size: int  # k of every convolution, odd
    length_projection: str = ""  # of config.schema.LENGTH_PROJECTIONS; "": none
    text_length: int = 0  # L of the condition where a length projection shortens it; 0: features'
    dtype: str = "float32"  # of the computation; parameters are float32
    convolution: str = "auto"  # of config.choices.METHODS
    remat: str = "none"  # of config.choices.REMAT: what the backward pass computes again
    precision: str = "default"  # of config.choices.PRECISIONS
    # The plans of these convolutions; those of all others are chosen by `convolution`.
    chosen: tuple[tuple[Problem, ConvPlan], ...] = ()
    rates: Rates | None = None  # by which `convolution` chooses; None: the shipped ones

    @classmethod
    def of(
        cls,
        generator: schema.Generator,
        condition: schema.Condition,
        dtype: str,
        remat: str = "none",
        features: Sequence[Features] | None = None,
        precision: str = "default",
    ) -> "DecoderSpec":
        """From the sections of a configuration. features: those of `generator` with their zeros
        filled in, None where it has no zeros."""
        projection = generator.length_projection
        return cls(
            features=tuple(features or generator.features),
            kernel_size=generator.kernel_size,
            length_projection=projection,
            text_length=condition.max_text_length if projection else 0,
            dtype=dtype,
            convolution=generator.convolution,
            remat=remat,
            precision=precision,
        )

    @property
    def condition_shape(self) -> Features:
        """(N, L, C) of a condition, before any length projection."""
        n, length, c = self.features[0]
        return n, self.text_length or length, c

    @property
    def token_grid(self) -> Features:
        """(T, h, w) of what the decoder makes."""
        return self.features[-1]

    @property
    def stages(self) -> Iterator[tuple[Features, Features]]:
        """(N, L, C) before and after every stage."""
        return zip(self.features[:-1], self.features[1:], strict=True)

    def plan(self, problem: Problem) -> ConvPlan:
        """How a convolution is computed. Raises as `choose`."""
        return dict(self.chosen).get(problem) or choose(problem, self.convolution, self.rates)

    @property
    def num_parameters(self) -> int:
        """Parameters of the decoder, without the length projection's."""
        return sum(
            self.kernel_size**2 * (2 * c * c2 + 2 * length * l2 + n * n2)
            + (2 * length * c + l2 * c2 + n2)
            for (n, length, c), (n2, l2, c2) in self.stages
        )

    @property
    def forward_macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass by the direct method, without the
        length projection's; FLOP are twice that."""
        return self.kernel_size**2 * sum(
            n * length * c * c2  # conv1w
            + n * c2 * length * l2  # conv1h
            + n * c * length * l2  # conv2h
            + n * l2 * c * c2  # conv2w
            + l2 * c2 * n * n2  # conv_n
            for (n, length, c), (n2, l2, c2) in self.stages
        )

    def convolutions(
        self, batch: int, platform: str | None = None, tensor: int = 1
    ) -> dict[str, Problem]:
        """Every convolution by its parameter's path, as the shapes that its method is chosen from.

        batch: a device's part. platform: None for the present one. tensor: parts of the output
        channels, where it divides them.
        """
        platform = platform or jax.default_backend()
        problems = {}
        for i, ((n, length, c), (n2, l2, c2)) in enumerate(self.stages):
            shapes = {  # grid, channels in and out
                "conv1w": ((n, length), c, c2),
                "conv1h": ((n, c2), length, l2),
                "conv2h": ((n, c), length, l2),
                "conv2w": ((n, l2), c, c2),
                "conv_n": ((l2, c2), n, n2),
            }
            for name, (grid, size_in, size_out) in shapes.items():
                ways = tensor if size_out % tensor == 0 else 1
                problems[f"stage_{i}/{name}"] = Problem(
                    batch, *grid, size_in, size_out // ways, self.kernel_size, self.dtype, platform
                )
        return problems
