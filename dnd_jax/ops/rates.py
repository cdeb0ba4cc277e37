"""`Rates`: what a platform achieves, by which dnd_jax/ops/cost_model.py compares methods.

RATES come with the package; those that `dnd bench --rates` learns of a processor lie in
$DND_JAX_CACHE/rates.json (default ~/.cache/dnd_jax), one entry a processor and JAX version.
"""

import dataclasses
import functools
import os
import pathlib
import platform as this
import re

import jax

from dnd_jax.core.errors import InputError
from dnd_jax.core.files import cache_folder, read_object, write_json


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a platform achieves: operations and bytes a second."""

    direct: float  # convolution, and its input gradient
    direct_kernel_gradient: float
    product: float  # batched matrix products over channels
    transform: float  # products with the small DFT matrices
    memory: float  # bytes a second
    # Channels from which on the direct convolution reaches its rate; below, in proportion.
    full_channels: float
    full_channels_gradient: float  # the same of its kernel's gradient
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
# What is learned; the others are of the algorithm or of the chip.
LEARNED = tuple(field.name for field in dataclasses.fields(Rates) if field.name != "lanes")


@functools.cache
def processor() -> str:
    """What rates are learned of: this processor, and how many of its threads this process has."""
    file = pathlib.Path("/proc/cpuinfo")
    says = dict(re.findall(r"(?m)^([\w ]+?)\s*: (.+)$", file.read_text()) if file.is_file() else ())
    names = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    found = " ".join(says[name] for name in names if name in says) or this.processor()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found or this.machine()}, {threads} threads"


def _key() -> str:
    return f"{processor()}, jax {jax.__version__}"


def rates_file() -> pathlib.Path:
    """Where learned rates are kept."""
    return cache_folder() / "rates.json"


def learned(platform: str) -> Rates | None:
    """The rates that were learned of this machine; None where none were. Only a CPU's are. Raises
    InputError for a damaged file."""
    file = rates_file()
    if platform != "cpu" or not file.is_file():
        return None
    found = read_object(file).get(_key())
    if found is None:
        return None
    sound = isinstance(found, dict) and set(found) == set(LEARNED)
    if not sound or not all(isinstance(x, int | float) and 0 < x < 1e18 for x in found.values()):
        raise InputError(
            f"{file}: {_key()!r} is not what `dnd bench --rates` writes ({', '.join(LEARNED)}); "
            "delete the file"
        )
    return dataclasses.replace(RATES["cpu"], **found)


def remember(rates: Rates) -> None:
    """Keeps rates as this machine's. Raises InputError when they cannot be written."""
    file = rates_file()
    known = read_object(file) if file.is_file() else {}
    write_json(file, known | {_key(): {name: getattr(rates, name) for name in LEARNED}})
