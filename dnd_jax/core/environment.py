"""What the libraries read of the environment: set before any of them is imported, and checked where
they would end in an abort or a stack."""

import glob
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Collection

from dnd_jax.core.errors import CheckFailed, InputError, first_line
from dnd_jax.core.files import cache_folder

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
XLA = "XLA_FLAGS"
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
# Of these alone, XLA_FLAGS is known to be right.
_KNOWN = re.compile(r"(\s*--xla_force_host_platform_device_count=\d+)*\s*")


def prepare() -> None:
    """Sets what is not set."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not _has_tpu():
        # libtpu without a TPU: no questions to a metadata server
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if accelerated():
        os.environ.setdefault(PROGRAMS, str(programs_folder()))


def programs_folder() -> pathlib.Path:
    """Where compiled programs are kept, for the next start, unless the user names another place.
    Of a run of several processes it is in the workdir, which all of them see."""
    return cache_folder() / "programs"


def accelerated() -> bool:
    """Whether JAX will find a TPU or GPU, as far as is known before it starts. On CPUs no program
    is kept unless the user says where: on those that gather slowly, as many of Intel's, XLA refuses
    with errors what it wrote on the same machine (openxla/xla issue 44565, open with jaxlib 0.10);
    on others it reads it, and `dnd generate` starts in two thirds of the time."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    plugins = (f"jax_cuda{version}_plugin" for version in (12, 13))
    if glob.glob("/dev/nvidia[0-9]*") and any(map(importlib.util.find_spec, plugins)):
        return True
    return _has_tpu()


def _has_tpu() -> bool:
    """Whether this machine has one, by its devices' files."""
    return bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def settle(needed: Collection[str]) -> None:
    """What a stage with these modules wants of the environment, before JAX starts: beside PyTorch,
    JAX takes the memory of a GPU as it needs it, unless the user has said otherwise. Raises
    InputError as `check_xla_flags`."""
    if "torch" in needed:
        os.environ.setdefault(PREALLOCATE, "false")
    check_xla_flags()


def check_xla_flags() -> None:
    """Raises InputError for flags that this version of XLA does not take: it would abort. They are
    read by a process of its own, for a quarter of a second, and only where there are any."""
    given = os.environ.get(XLA, "")
    if _KNOWN.fullmatch(given):
        return
    read = "from jaxlib import xla_client; xla_client.CompileOptions()"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", read],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if not ended.returncode or "parse_flags" not in ended.stderr:
        return  # taken, or not to be known in this way
    why = re.search(r"^[EF]\d{4} .*flags\w*\.cc:\d+\] (.*)", ended.stderr, re.MULTILINE)
    if why:
        raise InputError(f"{XLA}={given}: {why[1]}; mend the environment variable, or unset it")


def refused(error: Exception) -> InputError | CheckFailed | None:
    """The line for an error that JAX raises when it starts: InputError because of its environment
    variables, CheckFailed for a device that fails, which another start may have; None for any
    other."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if isinstance(error, AssertionError) and platforms and _has_no_backend():
        # jaxlib knows the platform's name, and passes over a plugin that is not there.
        return InputError(
            f"JAX cannot start: JAX_PLATFORMS={platforms}: its plugin is not installed; "
            'install it (for cuda: pip install "dnd-jax[gpu]"), or unset the variable'
        )
    text = first_line(error)
    of_jax = isinstance(error, ValueError) and re.search(r"\bJAX_\w+|JAX flag jax_\w+", text)
    unknown = text.startswith("Unknown backend") or "list of known backends" in text
    if of_jax or unknown:
        return InputError(f"JAX cannot start: {text}; mend its environment variable, or unset it")
    if text.startswith("Unable to initialize backend"):
        return CheckFailed(f"JAX cannot start: {text}")
    return None


def _has_no_backend() -> bool:
    """Whether JAX, where it was imported, ends in an assertion when it is asked for its devices."""
    try:
        if "jax" in sys.modules:
            sys.modules["jax"].devices()
    except AssertionError:
        return True
    except RuntimeError:
        pass
    return False
