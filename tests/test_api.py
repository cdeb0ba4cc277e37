"""The public API: what docs/API.md documents is what dnd_jax exports, and its examples run as they
are written."""

import importlib
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from pipeline import ROOT, tiny_suite

import dnd_jax
from dnd_jax.base.architecture import BaseLM, sizes_to_pretrain
from dnd_jax.base.folder import save_base
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.generator.import_released import import_generator

PAGE = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
# {heading: its example}.
EXAMPLES = {
    section.split("\n", 1)[0]: re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
    for section in PAGE.split("\n### ")[1:]
}


def random_params(module, inputs: np.ndarray) -> dict:
    """Without `module.init`, whose compilation takes longer than all else here."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(module.init, jax.random.key(0), inputs)
    return jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, x.dtype), shapes["params"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with the base, the generator and the suite that the examples speak of, of random
    weights."""
    root = tmp_path_factory.mktemp("api")
    suite = dnd_jax.load_suite(tiny_suite(root / "example"))
    settings = dnd_jax.load_config("tests/tiny.py")
    settings.base.path = str(root / "runs" / "tiny" / "base")
    config = dnd_jax.freeze(settings)

    tokenizer = build_tokenizer([e.prompt for e in suite.corpus], 300)
    sizes = sizes_to_pretrain(config.base, len(tokenizer))
    ids = np.zeros((1, 2), np.int32)
    save_base(config.base.path, sizes, random_params(BaseLM(sizes), ids), tokenizer)

    layout = dnd_jax.layout_of(config)
    grid = layout.num_tokens, *layout.token_shape
    spec = dnd_jax.DecoderSpec(((4, 16, 384), (8, 6, 20), grid), kernel_size=3)
    module = dnd_jax.Generator(spec)
    params = random_params(module, np.zeros((1, *spec.condition_shape), np.float32))
    released = root / "released.pth"
    dnd_jax.save_reference_generator(module, params, released, np.ones(layout.num_tokens))
    import_generator(released, root / "runs" / "tiny" / "generator", config)
    return root


def test_examples_run_as_they_are_written(place, monkeypatch):
    monkeypatch.chdir(place)
    for heading, example in EXAMPLES.items():
        exec(compile(example, f"docs/API.md, {heading}", "exec"), {"__name__": "__main__"})


def test_the_page_and_all_name_the_same():
    documented = [name for heading in EXAMPLES for name in heading.split(", ")]
    assert sorted(documented) == dnd_jax.__all__
    for heading, example in EXAMPLES.items():
        for name in heading.split(", "):
            assert f"dnd_jax.{name}" in example


def test_every_name_is_the_one_that_type_checkers_see():
    """The imports below TYPE_CHECKING, and the table by which names are found."""
    source = (ROOT / "dnd_jax" / "__init__.py").read_text(encoding="utf-8")
    seen = re.findall(
        r"^    from dnd_jax\.(\S+) import (\w+) as (\w+)(?:  # noqa: F401)?$", source, re.M
    )
    assert sorted(name for _, _, name in seen) == dnd_jax.__all__ == dir(dnd_jax)
    for module, there, name in seen:
        home = importlib.import_module(f"dnd_jax.{module}")
        assert getattr(dnd_jax, name) is getattr(home, there)
    with pytest.raises(AttributeError, match="has no attribute 'convolv'"):
        dnd_jax.convolv  # noqa: B018


def test_the_package_alone_imports_nothing():
    ours = (
        "import sys; before = set(sys.modules); import dnd_jax; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)), dnd_jax.convolve.__name__, "
        "'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", ours], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "['dnd_jax'] convolve True\n", done.stderr
