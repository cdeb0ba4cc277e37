"""Eight virtual CPU devices (and no other), no network, and the same hypothesis examples in every
run."""

import os
import pathlib
import tempfile

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Several of PyTorch's processes on few cores: threads that wait for each other by spinning are many
# times slower than one each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A program is compiled once for all tests, the processes that they start, and the next run.
compiled = pathlib.Path(tempfile.gettempdir(), f"dnd_jax_tests_{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden tables of shardings and programs anew",
    )


@pytest.fixture
def update_golden(request) -> bool:
    return request.config.getoption("--update-golden")
