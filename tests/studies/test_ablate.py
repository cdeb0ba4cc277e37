"""`dnd ablate`: what it runs, what its variants share, and what it reports; and the keys that were
made for it."""

import dataclasses
import json
import pathlib
import signal
import statistics

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline import ROOT, TINY, dnd, start, tiny_suite, when
from scored_runs import runs_of

from dnd_jax.config.load import load_file
from dnd_jax.config.schema import Config
from dnd_jax.config.validate import freeze
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import read_json, write_json
from dnd_jax.data.suite import load_suite
from dnd_jax.generator.pairs import PairedDataset, Pairs
from dnd_jax.main import main
from dnd_jax.scoring.draws import repeat_few
from dnd_jax.scoring.evaluate import evaluation_settings
from dnd_jax.scoring.results import rule
from dnd_jax.studies import ablate, ablate_report, quickstart


def settings(axes=(), variants=(), **changes) -> Config:
    raw = load_file("tests/tiny.py")
    raw.ablate.update(axes=axes, variants=variants)
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return freeze(raw)


def test_variants_are_every_combination_and_those_with_names():
    axes = (("train.pairing", ("random", "fixed")), ("condition.num_prompts", (2, 4)))
    named = (("both", {"generator.target": "chunk", "generator.importance": False}),)
    found = ablate.variants(settings(axes, named))
    assert {v.name: v.changes for v in found} == {
        "pairing=random,num_prompts=2": {"condition.num_prompts": 2},
        "pairing=random,num_prompts=4": {},  # what tests/tiny.py says
        "pairing=fixed,num_prompts=2": {"train.pairing": "fixed", "condition.num_prompts": 2},
        "pairing=fixed,num_prompts=4": {"train.pairing": "fixed"},
        "both": dict(named[0][1]),
    }
    assert [v.folder for v in found][1] == ablate.DEFAULT and found[-1].touches({"generator"})
    assert not found[-1].touches({"generator.importance_", "gen", "train"})
    changed = ablate.with_changes(settings(), found[-1].changes)
    assert changed.generator.target == "chunk" and changed.train == settings().train


def test_the_default_is_there_even_if_no_variant_is_it():
    found = ablate.variants(settings((("generator.importance", (False,)),)))
    assert [(v.name, v.changes) for v in found] == [
        ("default", {}),
        ("importance=False", {"generator.importance": False}),
    ]


@pytest.mark.parametrize(
    "axes, named, message",
    [
        (
            (("train.paring", ("fixed",)),),
            (),
            r"paring=fixed: .*config\.train\.paring is unknown; did you mean pairing\?",
        ),
        ((("trian.pairing", ("fixed",)),), (), r"config\.trian is unknown; did you mean train\?"),
        (
            (("condition.form", ("promt", "both")),),
            (),
            r"form=promt: .*config\.condition\.form = 'promt' is none of",
        ),
        ((("train.steps", ("8",)),), (), r"config\.train\.steps = '8' should be int"),
        ((("suite.name", ("x",)),), (), r"config\.suite\.name is unknown"),
        ((("seed", (1, 2)),), (), r"seed is no ablation; give --seeds=0,1,2"),
        (
            (("mesh.fsdp", (2,)),),
            (),
            r"mesh\.fsdp changes no score; sharding layouts are compared by dnd plan --sweep",
        ),
        (
            (("train.datasets", (1,)),),
            (),
            r"config\.train\.datasets = 1 must be at least 2, or 0 for all",
        ),
        (
            (("evaluate.num_prompts", (5,)),),
            (),
            r"config\.evaluate\.num_prompts = 5 must be 1 to condition\.num_prompts = 4",
        ),
        (
            ("train.pairing",),
            (),
            r"config\.ablate\.axes = .*expected \(\(key, \(value, \.\.\.\)\), \.\.\.\)",
        ),
        ((), (("x", {"train.pairing": "fixed"}), ("x", {"train.steps": 9})), "x is there twice"),
        (
            (),
            (("a/b", {"train.pairing": "fixed"}), ("default", {"train.steps": 9})),
            "'a/b' cannot name .*'default' cannot name .*something else",
        ),
        (
            (),
            tuple((name, {"train.steps": 9}) for name in ("..", "base", "seed_1", "-x", "a.json")),
            r"'\.\.' .*begins with \.; 'base' .*else there; 'seed_1' .*a seed; '-x' .*; 'a\.json'",
        ),
        (
            (),
            (("Wide", {"train.steps": 9}), ("wide", {"train.steps": 8})),
            "'Wide' and 'wide' are one folder on some systems",
        ),
        ((), (), r"config\.ablate lists nothing to compare; take one of configs/ablate_\*\.py"),
    ],
)
def test_faults_are_named(axes, named, message):
    with pytest.raises(InputError, match=message):
        ablate.variants(settings(axes, named))


def test_nothing_to_compare_on_the_command_line(tmp_path, capsys):
    assert main(["ablate", TINY, f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("dnd: config.ablate lists nothing to compare")
    # Lists given there are read.
    assert (
        main(
            [
                "ablate",
                TINY,
                f"--workdir={tmp_path}",
                "--config.ablate.axes=(('train.paring', ('random', 'fixed')),)",
            ]
        )
        == 2
    )
    assert "config.train.paring is unknown; did you mean pairing?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


FILES = sorted(
    f"configs/{p.name}"
    for p in (ROOT / "configs").glob("ablate_*.py")
    if p.name != "ablate_sharding.py"
)


@pytest.mark.parametrize("file", FILES)
def test_every_configuration_of_an_ablation(file):
    """Its variants are runs, one of them the default; its docstring has its command."""
    config = freeze(load_file(file))
    found = ablate.variants(config)
    assert (
        len(found) > 1
        and sum(not v.changes for v in found) == 1
        and found[0].name != ablate.DEFAULT
    )
    assert (
        f"dnd ablate --config={file} --workdir=runs/{pathlib.Path(file).stem}"
        in (ROOT / file).read_text()
    )
    plain = freeze(load_file("configs/mini.py"))
    assert dataclasses.replace(config, ablate=plain.ablate) == plain


def datasets(rng, prompts=(9, 12, 30), checkpoints=5) -> list[PairedDataset]:
    return [
        PairedDataset(
            f"d{i}", {"condition": rng.random((n, 3, 2))}, rng.random((checkpoints, 4, 2, 2))
        )
        for i, n in enumerate(prompts)
    ]


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_fixed_pairs_are_fixed_and_random_ones_are_not(seed, num_prompts):
    of = datasets(np.random.default_rng(0))
    met: dict[str, dict] = {}
    for pairing in ("fixed", "random"):
        pairs = Pairs(of, 16, num_prompts, seed, pairing)
        met[pairing] = {}
        for step in range(40):
            for d, checkpoint, prompts in pairs.draw(step):
                assert len(set(prompts)) == num_prompts and max(prompts) < of[d].num_prompts
                met[pairing].setdefault((d, checkpoint), set()).add(tuple(sorted(prompts)))
        assert len(met[pairing]) == 15  # every checkpoint, either way
        again = Pairs(of, 16, num_prompts, seed, pairing).batch_at(3)["condition"]
        # A batch is a function of seed and step alone.
        np.testing.assert_array_equal(pairs.batch_at(3)["condition"], again)
    assert all(len(batches) == 1 for batches in met["fixed"].values())
    if num_prompts < 9:
        assert all(len(batches) > 1 for batches in met["random"].values())
        # Not the same prompts for all checkpoints of a dataset: those of d2, 30 prompts, can hardly
        # all agree.
        assert len(set.union(*(met["fixed"][2, checkpoint] for checkpoint in range(5)))) > 1


def test_fewer_training_datasets_are_a_part_of_more(tmp_path):
    suite = load_suite(tiny_suite(tmp_path / "towns"))
    names = [d.name for d in suite.train]
    parts = {seed: [d.name for d in suite.with_training(2, seed).train] for seed in range(8)}
    assert len(set(map(tuple, parts.values()))) == 3  # of three datasets; each pair comes up
    for part in parts.values():
        assert len(part) == 2 and part == [name for name in names if name in part]
    many = dataclasses.replace(
        suite, train=tuple(dataclasses.replace(suite.train[0], name=str(i)) for i in range(20))
    )
    chosen = [{d.name for d in many.with_training(count, 5).train} for count in (2, 7, 15, 20)]
    assert all(fewer < more for fewer, more in zip(chosen, chosen[1:], strict=False))
    assert suite.with_training(0, 3) is suite and suite.with_training(2, 3).unseen == suite.unseen
    with pytest.raises(
        InputError, match=r"config\.train\.datasets = 4, but .*towns has 3 training dataset\(s\)"
    ):
        suite.with_training(4, 0)


@given(st.integers(1, 12), st.integers(0, 99))
def test_few_prompts_fill_the_generators_input(different, seed):
    pool = [f"prompt {i}" for i in range(30)]
    filled = repeat_few(pool, different, 12, seed)
    counts = [filled.count(p) for p in dict.fromkeys(filled)]
    assert len(filled) == 12 and len(counts) == different and max(counts) - min(counts) <= 1
    assert filled == sorted(filled, key=pool.index)  # side by side, in the pool's order
    assert repeat_few(pool, 0, 12, seed) is pool
    text = rule(settings(condition__num_prompts=12, evaluate__num_prompts=different))
    assert (
        f"draws of {different} prompt{'s' if different > 1 else ''}, mean" in text
        and "until the generator has its 12." in text
    )


@pytest.mark.parametrize(
    "keys, shared",
    [
        ("evaluate.num_prompts", "suite base loras targets embeddings generator controls"),
        ("controls.in_context", "suite base loras targets embeddings generator controls"),
        ("controls.learning_rates", "suite base loras targets embeddings generator"),
        ("train.pairing", "suite base loras targets embeddings controls"),
        ("train.datasets", "suite base loras targets embeddings"),
        ("generator.chunk_width", "suite base loras targets embeddings controls"),
        ("lora.rank", "suite base embeddings"),
        ("embedded", "embeddings"),
        ("pretrain.steps", "suite embeddings"),
        ("base.hidden_size evaluate.samples", "suite embeddings"),
        ("suite", "embeddings"),
    ],
)
def test_a_variant_links_what_its_keys_leave_as_it_is(tmp_path, keys, shared):
    root = tmp_path / "ablation"
    default, folder = root / "default" / "seed_0", root / "v" / "seed_0"
    for name in (
        "suite",
        "base",
        "loras",
        "targets",
        "embeddings",
        "generator",
        "controls",
        "adapters",
        "competitors",
        "collect",
    ):
        (default / name).mkdir(parents=True)
        (default / name / "file").write_text(name)
    for _ in range(2):  # as after an interruption
        ablate.link(folder, default, ablate.Variant("v", dict.fromkeys(keys.split())))
    assert {p.name for p in folder.iterdir()} == set(shared.split())
    # Relative links move with the workdir.
    moved = root.rename(tmp_path / "moved")
    assert all(
        (moved / "v" / "seed_0" / name / "file").read_text() == name for name in shared.split()
    )


def test_scores_that_both_runs_have_are_taken_over(tmp_path):
    config = settings(evaluate__num_prompts=1)
    default, folder = tmp_path / "default" / "seed_0", tmp_path / "v" / "seed_0"
    scores = {"base": {"x": 1}, "hash of an adapter": {"x": 2}}
    write_json(
        default / paths.EVALUATION,
        {"settings": evaluation_settings(settings(), "print"), "scores": scores, "result": {}},
    )
    other = settings(evaluate__max_new_tokens=3)
    ablate.share_scores(other, folder, default, "print")
    assert not folder.exists()  # other answers
    for _ in range(2):
        ablate.share_scores(config, folder, default, "print")
        assert read_json(folder / paths.EVALUATION) == {
            "format": 0,
            "settings": evaluation_settings(config, "print"),
            "scores": scores,
        }
        # A table that was begun stays.
        write_json(
            default / paths.EVALUATION,
            {"settings": evaluation_settings(settings(), "print"), "scores": {}},
        )


def test_report_of_several_seeds_and_of_one(tmp_path):
    config = settings(
        (("train.pairing", ("random", "fixed")),), (("few", {"evaluate.num_prompts": 1}),)
    )
    runs = {
        v.name: runs_of([i, i + 1], ["x"] if i else [])
        for i, v in enumerate(ablate.variants(config))
    }
    rows = [
        ablate_report.row(
            v.name,
            ablate.with_changes(config, v.changes),
            {k: [0, x] for k, x in v.changes.items()},
            v.folder,
            runs[v.name],
        )
        for v in ablate.variants(config)
    ]
    report = ablate_report.write(rows, [0, 1], tmp_path)
    assert json.loads((tmp_path / "ablation.json").read_text()) == {"format": 1, **report}
    for row, of_seeds in zip(rows, runs.values(), strict=True):
        for method in ("generated", "wrong_prompts"):
            by_seed = []
            for run in of_seeds.values():
                values = [
                    e[method]["mean"] if method == "generated" else e[method]
                    for e in run["unseen"].values()
                ]
                by_seed.append(statistics.fmean(values))
            found = row["scores"]["exact"][method]
            assert found["by_seed"] == pytest.approx(by_seed) and found["mean"] == pytest.approx(
                np.mean(by_seed)
            )
            assert found["std"] == pytest.approx(np.std(by_seed)) and found["std"] > 0
            assert found["interval"][0] < found["mean"] < found["interval"][1]
        assert row["scores"]["content"].keys() == row["scores"]["exact"].keys()
        for kind, datasets_of_kind in (("near", "xy"), ("far", "z")):
            of_kind = [
                statistics.fmean(run["unseen"][n]["wrong_prompts"] for n in datasets_of_kind)
                for run in of_seeds.values()
            ]
            assert row["by_kind"][kind]["wrong_prompts"]["by_seed"] == pytest.approx(of_kind)
    text = (tmp_path / "ablation.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| pairing=fixed"))
    exact = rows[1]["scores"]["exact"]
    cells = [
        f"{exact[m]['mean']:.2f}±{exact[m]['std']:.2f}" for m in ("generated", "wrong_prompts")
    ]
    assert (
        f"| train.pairing 0 → 'fixed' | **{cells[0]}** | " in line and f" | {cells[1]} | " in line
    )
    far = rows[2]["by_kind"]["far"]
    cells = [f"{far[m]['mean']:.2f}±{far[m]['std']:.2f}" for m in ("generated", "wrong_prompts")]
    assert (
        "| exact match of | near | wrong | far | wrong |" in text
        and f"| {cells[0]} | {cells[1]} |\n\n" in text
    )
    assert (
        "(the default)" in text
        and "over the seeds 0, 1" in text
        and "another task's prompts, the control" in text
    )
    assert "pairing=random, pairing=fixed: No selection" in text and "few: No selection" in text
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")

    one = ablate_report.row("a", config, {}, "default", runs_of([7]))
    draws = [e["generated"]["std"] for e in runs_of([7])[7]["unseen"].values()]
    assert one["scores"]["exact"]["generated"]["std"] == pytest.approx(np.mean(draws))
    assert "std" not in one["scores"]["exact"]["wrong_prompts"]
    assert "over draws of prompts, not over seeds" in ablate_report.as_markdown(
        {**report, "seeds": [7], "variants": [one]}
    )


def test_a_hub_id_is_the_commit_that_the_default_took(tmp_path, monkeypatch):
    """Newer commits there neither end a finished ablation nor come into its variants."""
    hub, newest = tmp_path / "models--a--b" / "snapshots", ["1" * 40]

    def snapshot_download(name, revision=None, **_):
        folder = hub / (revision or newest[-1])
        write_json(folder / "config.json", {"commit": folder.name})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(ablate, "run_seed", lambda *_: ({"made": len(newest)}, None))
    config, workdir = settings(base__path="a/b", condition__encoder="c/d"), tmp_path / "w"
    default = ablate.Variant("default", {})
    (workdir / "default" / "seed_0").mkdir(parents=True)
    for _ in range(2):
        assert ablate.run_variant(config, default, workdir, 0, "print") == {"made": 1}
        newest.append("2" * 40)
    ablate.run_variant(config, ablate.Variant("v", {"lora.rank": 1}), workdir, 0, "print")
    for name in ("default", "v"):
        pinned = read_json(workdir / name / "seed_0" / paths.REVISIONS)
        assert pinned == {"a/b": "1" * 40, "c/d": "1" * 40}, name


def test_runs_that_are_given_one_folder_for_checkpoints_share_none(tmp_path, monkeypatch):
    """Else a seed or variant would find the checkpoints of another."""
    seen = []
    monkeypatch.setattr(ablate, "run_seed", lambda c, *_: (seen.append(c) or {}, 0))
    monkeypatch.setattr(ablate, "share_scores", lambda *_: None)
    for root, folder in (("a", f"{tmp_path}/states"), ("b", "gs://bucket/states/")):
        config = settings(condition__encoder="{base}", train__checkpoint_dir=folder)
        for i, changes in enumerate(({}, {"train.steps": 7})):
            variant = ablate.Variant(f"v{i}", changes)
            for seed in (0, 1):
                own = dataclasses.replace(config, seed=seed)
                (tmp_path / root / variant.folder / f"seed_{seed}").mkdir(parents=True)
                ablate.run_variant(own, variant, tmp_path / root, seed, "print")
    places = [config.train.checkpoint_dir for config in seen]
    assert len(set(places)) == len(places) == 8
    assert places[:2] == [f"{tmp_path}/states/default/seed_{n}" for n in (0, 1)]
    assert places[-1] == "gs://bucket/states/v1/seed_1"
    assert quickstart.apart(settings(), "seed_1") == settings()


def test_other_controls_are_no_finished_run(tmp_path, monkeypatch):
    """Of another setting, of another folder's content, or of a version that did not record them."""
    runs = []
    monkeypatch.setattr(ablate, "run_seed", lambda *_: (runs.append(1) or {"made": len(runs)}, 0))
    default, where = ablate.Variant("default", {}), tmp_path / "default" / "seed_0"
    given = tmp_path / "given" / "controls.json"
    write_json(given, {})
    config = settings(condition__encoder="{base}", controls__folder=str(given.parent))
    for _ in range(2):
        assert ablate.run_variant(config, default, tmp_path, 0, "print") == {"made": 1}
    moved = given.parent.rename(tmp_path / "moved")
    config = settings(condition__encoder="{base}", controls__folder=str(moved))
    assert ablate.run_variant(config, default, tmp_path, 0, "print") == {"made": 1}
    other = settings(
        condition__encoder="{base}", controls__folder=str(moved), controls__in_context=2
    )
    with pytest.raises(InputError, match=r"controls\.in_context: 0 -> 2"):
        ablate.run_variant(other, default, tmp_path, 0, "print")
    write_json(moved / "controls.json", {"other": 1})
    with pytest.raises(InputError, match=r"contents\.controls: "):
        ablate.run_variant(config, default, tmp_path, 0, "print")
    stored = read_json(where / ablate.DONE)
    for key in ("controls", "embedded", "embedded_tasks"):
        del stored["settings"][key]
    del stored["settings"]["contents"]["controls"]
    write_json(where / ablate.DONE, stored)
    with pytest.raises(InputError, match="--allow=controls "):
        ablate.run_variant(config, default, tmp_path, 0, "print")
    again = ablate.run_variant(config, default, tmp_path, 0, "print", allowed=("controls",))
    assert again == {"made": 2}


def test_another_embedded_suite_is_a_variant():
    named = (("skills", {"embedded": "skills", "controls.in_context": 1}),)
    [_, variant] = ablate.variants(settings((), named))
    assert variant.touches({"suite", "embedded"})
    raw = load_file("tests/tiny.py")
    raw.ablate.variants, raw.suite = named, "tests"
    with pytest.raises(InputError, match="embedded chooses among embedded suites, and suite gives"):
        ablate.variants(freeze(raw))


def scores_of(run: dict) -> dict:
    """A run without what is measured beside its scores, which an ablation leaves out."""
    measured = ("seconds", "overhead", "agreement")
    return {key: value for key, value in run.items() if key not in measured}


@pytest.mark.slow
def test_variants_are_ordinary_runs_and_a_killed_ablation_goes_on(tmp_path):
    """Real processes on the tiny setting: killed in a variant, resumed, run again; a variant equals
    the same run by itself."""
    suite, workdir = tiny_suite(tmp_path / "towns"), tmp_path / "w"
    axes = "--config.ablate.axes=(('train.pairing', ('random', 'fixed')),)"
    named = (
        "--config.ablate.variants=(('one_prompt', {'evaluate.num_prompts': 1}), "
        "('vectors', {'train.datasets': 2, 'condition.encoder': '{base}', 'condition.layer': 0}))"
    )
    command = ("ablate", TINY, f"--suite={suite}", f"--workdir={workdir}", axes, named)
    fixed, default = workdir / "pairing=fixed" / "seed_0", workdir / "default" / "seed_0"
    process = start(*command)
    assert when(process, lambda: any((fixed / "generator" / "checkpoints").glob("[0-9]*"))), (
        process.communicate()
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = (default / ablate.DONE).stat().st_mtime_ns
    assert not (fixed / ablate.DONE).exists()

    done = dnd(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(workdir / "ablation.json")
    names = ["pairing=random", "pairing=fixed", "one_prompt", "vectors"]
    assert [row["name"] for row in report["variants"]] == names
    assert (workdir / "ablation.md").read_text().strip() in done.stdout
    assert (default / ablate.DONE).stat().st_mtime_ns == finished and (
        workdir / "ablation.png"
    ).is_file()
    assert len(read_json(workdir / "vectors" / "seed_0" / ablate.DONE)["run"]["train"]) == 2
    vectors = read_json(workdir / "vectors" / "seed_0" / "generator" / "generator.json")
    assert vectors["settings"]["condition"]["encoder"] == str(default / "base")

    def model(folder: pathlib.Path) -> bytes:
        return (folder / "generator" / "model.safetensors").read_bytes()

    assert model(fixed) != model(default) == model(workdir / "one_prompt" / "seed_0")
    adapters = [
        w / "adapters" / "bird-rank" / "adapter_model.safetensors"
        for w in (default, workdir / "one_prompt" / "seed_0")
    ]
    assert adapters[0].read_bytes() != adapters[1].read_bytes()

    alone = dnd(
        "quickstart",
        TINY,
        f"--suite={suite}",
        f"--workdir={tmp_path / 'alone'}",
        "--config.train.pairing=fixed",
    )
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert model(fixed) == model(tmp_path / "alone")
    run, by_itself = (
        read_json(folder / paths.EVALUATION)["result"] for folder in (fixed, tmp_path / "alone")
    )
    assert scores_of(run) == scores_of(by_itself)
    of_suite = {"suite": "towns", "fingerprint": load_suite(suite).fingerprint}
    assert read_json(fixed / ablate.DONE)["run"] == {
        **of_suite,
        **run,
        "seconds": read_json(fixed / "seconds.json"),
    }

    made = {p: p.stat().st_mtime_ns for p in workdir.glob("*/seed_0/*.json")}
    again = dnd(*command)
    assert again.returncode == 0 and read_json(workdir / "ablation.json") == report
    assert made == {p: p.stat().st_mtime_ns for p in workdir.glob("*/seed_0/*.json")}
    other = dnd(*command, "--config.train.steps=9")
    assert (
        other.returncode == 2
        and "variant pairing=random: " in other.stderr
        and "train.steps: 8 -> 9" in other.stderr
    )
