"""One generator and one `dnd serve` for all tests that end nothing."""

import pytest
from pipeline import tiny_generator
from serve import serving


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A workdir with a trained generator."""
    return tiny_generator(tmp_path_factory.mktemp("served_run"))


@pytest.fixture(scope="session")
def service(run, tmp_path_factory):
    """(URL, cache) of a service that calls its base "the-base"."""
    folder = tmp_path_factory.mktemp("service")
    flags = "--max-prompts=20", "--max-body-mb=0.1", "--base-name=the-base", "--at-once=8"
    with serving(run, folder, *flags) as (url, _):
        yield url, folder / "cache"
