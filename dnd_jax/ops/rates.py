"""`RATES`: what a platform achieves, by which dnd_jax/ops/cost_model.py chooses."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a platform achieves: operations and bytes a second."""

    direct: float  # convolution, and its input gradient
    direct_kernel_gradient: float
    product: float  # batched matrix products over channels
    transform: float  # products with the small DFT matrices
    memory: float  # bytes a second
    # Channels from which on the direct convolution reaches its rate; below, in proportion.
    full_channels: int
    full_channels_gradient: int  # the same of its kernel's gradient
    # A convolution as a sum of shifted inputs: its rate, and the input channels that halve it.
    shifted: float = 0.0
    shifted_channels: float = 1.0
    lanes: int = 1  # the innermost dimension of an array takes a multiple of this
    turn: float = 0.0  # seconds for one turn of the loop over row frequencies


# cpu: two cores of a Zen 4 server, fitted to `dnd bench`; the direct gradient of kernels and the
# shifted sum are of an Intel Xeon, by single convolutions of mini beside the direct output. Only
# ratios matter, which are those of float32, in which a CPU computes 16-bit data too. tpu: v5p,
# bfloat16, by the compiler's estimate. gpu: guessed from an H100's data sheet, bfloat16; "auto"
# does not go by them.
GUESSED = ("gpu",)
RATES = {
    "cpu": Rates(170e9, 130e9, 110e9, 60e9, 10e9, 40, 40, 90e9, 2.7, turn=1e-4),
    "gpu": Rates(400e12, 350e12, 400e12, 60e12, 2.4e12, 64, 64),
    "tpu": Rates(394e12, 394e12, 394e12, 100e12, 2.35e12, 1, 1, lanes=128),
}
