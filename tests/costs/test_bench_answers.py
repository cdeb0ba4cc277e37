"""The case "answers" of `dnd bench`: both sides compute the same, what it refuses, and a run."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from pipeline import dnd
from small_models import WORDS, write_qwen

from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.sequences import LEAST_PREFIX, shared_prefix
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.costs.bench import answering, torch_answering
from dnd_jax.costs.bench.case import ANSWERING, TORCH_ANSWERING, Case
from dnd_jax.costs.bench.torch_generator import Generator as TorchGenerator
from dnd_jax.generator.model import Generator
from dnd_jax.generator.released import save_reference_generator
from dnd_jax.generator.sizes import spec_of
from dnd_jax.lora.initial import Initial


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """In place of the other tests' here: what programs compute is asked, not what they cost."""


CASE = Case("few", "tests/tiny.py", "answers", 2, "float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Whose chat template says a sentence before each question, which is computed once."""
    folder = write_qwen(tmp_path_factory.mktemp("base"), max_position_embeddings=128)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = " ".join(WORDS[:9]) + "\n" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


def settings(base, **changes):
    raw = load_file("tests/tiny.py")
    raw.base.update(path=str(base), max_length=128)
    raw.lora.targets = ("q_proj", "v_proj")
    raw.condition.update(num_prompts=2, max_text_length=4)
    raw.generator.features = ((0, 0, 0), (0, 0, 0))
    how = {"objective": "answers", "batch_size": 2, "answer_rows": 3, "condition_noise": 0.0}
    raw.train.update(how)
    raw.update_from_flattened_dict(changes)
    return freeze(raw)


@pytest.fixture(scope="module")
def ours(base):
    """Loss and norm of the gradient of the first step as `dnd train` makes it, by target."""

    @functools.cache
    def first(target: str, variant: str = "together"):
        config = settings(base, **{"generator.target": target})
        metrics = answering.operation(CASE, config, variant)()
        return float(metrics["loss"]), float(metrics["gradient_norm"])

    return first


@pytest.fixture(scope="module")
def state_of(tmp_path_factory):
    """The parameters that our side starts from, as PyTorch has them."""

    def state(config):
        module, key = Generator(spec_of(config)), jax.random.fold_in(jax.random.key(config.seed), 2)
        shape = 1, *module.spec.condition_shape
        params = jax.jit(module.init)(key, np.zeros(shape, np.float32))["params"]
        weight = np.ones(module.spec.token_grid[0], np.float32)
        path = tmp_path_factory.mktemp("state") / "state.pth"
        save_reference_generator(module, params, path, weight)
        return torch.load(path, weights_only=True)

    return state


@pytest.mark.parametrize(
    "target, variants",
    [
        ("element", ("together", "one by one")),
        pytest.param("chunk", ("together",), marks=pytest.mark.slow),
        pytest.param("element", ("compiled",), marks=pytest.mark.slow),
    ],
    ids=["element", "chunk", "compiled"],
)
def test_pytorch_computes_the_same_loss_and_gradient(base, ours, state_of, target, variants):
    """Of the same parameters, on the same rows, to rounding."""
    config = settings(base, **{"generator.target": target})
    work, spec, expected = answering.Work.of(CASE, config), spec_of(config), ours(target)
    for variant in variants:
        generator = TorchGenerator(list(spec.features), spec.kernel_size)
        generator.load_state_dict(state_of(config))
        step = torch_answering.train_step(generator, config, work, variant, torch.device("cpu"))
        before = [p.detach().clone() for p in generator.parameters()]
        np.testing.assert_allclose(step(), expected, rtol=2e-5, err_msg=variant)
        moved = zip(before, generator.parameters(), strict=True)
        assert all((old != new).any() for old, new in moved)


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("target", ["element", "chunk"])
def test_pytorch_makes_the_same_matrices_of_tokens(base, target, width):
    """Also where the last chunk of a matrix is cut."""
    config = settings(base, **{"generator.target": target, "generator.chunk_width": width})
    meaning = Initial(config, str(base)).target()
    tokens = np.random.default_rng(1).standard_normal((3, *meaning.shape), np.float32)
    found = torch_answering.Matrices(meaning, torch.device("cpu"))(torch.tensor(tokens))
    assert {*found} == {*meaning.layout.modules}
    for k, one in enumerate(tokens):
        for key, value in meaning.decode(one).items():
            name, side = key.removesuffix(".weight").rsplit(".lora_", 1)
            matrix = found[name]["AB".index(side)][k]
            np.testing.assert_allclose(matrix, value, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    "variant",
    ["whole rows", *(pytest.param(how, marks=pytest.mark.slow) for how in ANSWERING[1::2])],
)
def test_variants_of_ours_compute_the_same(base, ours, variant):
    work = answering.Work.of(CASE, settings(base))
    shared = shared_prefix(work.tasks)
    assert shared >= LEAST_PREFIX
    short, whole = ((work.rows(n)["labels"] >= 0).sum() for n in (shared, 0))
    assert short == whole and work.rows(0)["ids"].size > work.rows(shared)["ids"].size
    np.testing.assert_allclose(ours("element", variant), ours("element"), rtol=2e-5)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"base.path": ""}, "must name a base by base.path"),
        ({"train.objective": "weights"}, "must train on answers alone"),
        ({"train.objective": "weights+answers"}, "must train on answers alone"),
        ({"train.weights_first": 2}, "must train on answers alone"),
        ({"train.size_weight": 0.1}, "must train on answers alone"),
        ({"condition.in_graph": True}, "must encode prompts outside the step"),
    ],
    ids=lambda x: "_".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_a_setting_that_it_does_not_measure(base, changes, line):
    with pytest.raises(InputError, match=line) as caught:
        answering.Work.of(CASE, settings(base, **changes))
    assert "\n" not in str(caught.value) and "bench few: tests/tiny.py" in str(caught.value)


@pytest.mark.slow
@pytest.mark.long
def test_it_is_measured_beside_pytorch(base, tmp_path):
    """Every variant, of two tasks and a base of two layers; a setting on weights is refused."""
    (tmp_path / "tasks.py").write_text(
        "from tests.tiny import get_config as tiny\n\n\ndef get_config():\n    config = tiny()\n"
        f"    config.base.update(path={str(base)!r}, max_length=128)\n"
        "    config.train.objective = 'answers'\n    return config\n"
    )
    words = ["bench", "--config=tests/bench_tiny.py", f"--workdir={tmp_path / 'run'}"]
    case = ("few", str(tmp_path / "tasks.py"), "answers", 2, "float32")
    done = dnd(*words, f"--config.bench.cases=({case!r},)")
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "run" / "bench.json").read_text())["results"]
    ours, theirs = (f"jax {how}" for how in ANSWERING), (f"torch {how}" for how in TORCH_ANSWERING)
    assert list(result["rows"]) == [*ours, *theirs]
    assert all(min(row["seconds"]) > 0 for row in result["rows"].values())
    case = ("none", "tests/tiny.py", "answers", 2, "float32")
    done = dnd(*words, f"--config.bench.cases=({case!r},)")
    assert done.returncode == 2 and "must train on answers alone" in done.stderr
