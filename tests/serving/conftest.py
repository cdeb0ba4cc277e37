"""One generator and one `dnd serve`, with a base to ask, for all tests that end nothing."""

import pytest
from pipeline import tiny_generator
from serve import serving
from small_models import write_qwen


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A workdir with a trained generator."""
    return tiny_generator(tmp_path_factory.mktemp("served_run"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base that its adapters fit."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("served_base") / "base"
    return write_qwen(folder, hidden_size=32, intermediate_size=64, **heads)


@pytest.fixture(scope="session")
def service(run, base, tmp_path_factory):
    """(URL, cache) of a service that calls its base "the-base"."""
    folder = tmp_path_factory.mktemp("service")
    flags = "--max-prompts=20", "--max-body-mb=0.1", "--base-name=the-base", "--at-once=8"
    with serving(run, folder, *flags, f"--base={base}") as (url, _):
        yield url, folder / "cache"
