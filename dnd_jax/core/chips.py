"""What accelerators can do, by their makers' data sheets: for shares of peak, limits and plans."""

import dataclasses
import os
import re

from dnd_jax.core.errors import InputError

FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one device: bfloat16 operations a second, memory in bytes, its bytes a second, and bytes a
    second of one link one way."""

    name: str
    platform: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    # Bytes a second to other slices or hosts, over the data centre's network.
    network: float = 6.25e9

    @property
    def room(self) -> float:
        """Bytes that a program may take: of a GPU those that XLA takes, three quarters unless the
        environment says otherwise. Raises InputError for a share that is no number."""
        if self.platform != "gpu":
            return self.memory
        for name in FRACTIONS:
            if given := os.environ.get(name):
                try:
                    return self.memory * float(given)
                except ValueError:
                    raise InputError(f"{name}={given}: expected a share, such as 0.9") from None
        return 0.75 * self.memory

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for operations and bytes that overlap perfectly."""
        return max(flops / self.peak, moved / self.bandwidth)


# Pattern of jax.Device.device_kind -> the chip. Memory is what a program may use, in GiB as the
# compilers count it.
_GIB = 2**30
CHIPS = {
    r"TPU v4$": Chip("TPU v4", "tpu", 275e12, 31.75 * _GIB, 1228e9, 45e9),
    r"TPU v5 lite|TPU v5e": Chip("TPU v5e", "tpu", 197e12, 15.75 * _GIB, 819e9, 45e9),
    r"TPU v5p|TPU v5$": Chip("TPU v5p", "tpu", 459e12, 95.74 * _GIB, 2765e9, 90e9),
    r"TPU v6 lite|TPU v6e": Chip("TPU v6e", "tpu", 918e12, 31.25 * _GIB, 1640e9, 90e9),
    # The figures are those of one of a chip's two devices.
    r"TPU7x|TPU v7": Chip("TPU7x", "tpu", 1154e12, 96 * _GIB, 3690e9, 100e9),
    r"A100.*40GB": Chip("A100 40GB", "gpu", 312e12, 40 * _GIB, 1555e9, 300e9),
    r"A100": Chip("A100 80GB", "gpu", 312e12, 80 * _GIB, 2039e9, 300e9),
    r"H100": Chip("H100", "gpu", 989e12, 80 * _GIB, 3350e9, 450e9),
    r"H200": Chip("H200", "gpu", 989e12, 141 * _GIB, 4800e9, 450e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a jax.Device.device_kind; None when it is not in the table (a CPU)."""
    return next((chip for pattern, chip in CHIPS.items() if re.search(pattern, device_kind)), None)
