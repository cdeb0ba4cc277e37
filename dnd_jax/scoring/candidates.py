"""The adapters that `evaluate` scores: generated ones, their controls and their competitors, as
PEFT folders."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from dnd_jax.config.records import check_same_run
from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core.stopping import stop
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.generator.folder import read_record
from dnd_jax.generator.generate import TrainedGenerator, draw_prompts
from dnd_jax.generator.nearest import nearest
from dnd_jax.lora.adapter import as_folder, is_made_from, save_adapter
from dnd_jax.lora.checkpoints import Checkpoints, dataset_checkpoints
from dnd_jax.lora.targets import ElementTarget
from dnd_jax.scoring.competitors import Ridge, mean_weights, running_mean

RIDGE_DRAWS = 16


def wrong_task(suite: Suite, name: str) -> Dataset:
    """The unseen dataset whose prompts serve as the wrong ones for `name`: the next of its kind, or
    else the next of all."""
    same = [d for d in suite.unseen if suite.kinds[d.name] == suite.kinds[name]]
    pool = (
        same
        if len(same) > 1
        else suite.unseen
        if len(suite.unseen) > 1
        else [*suite.unseen, *suite.train]
    )
    at = [d.name for d in pool].index(name)
    return pool[(at + 1) % len(pool)]


def repeat_few(prompts: Sequence[str], different: int, count: int, seed: int) -> Sequence[str]:
    """`different` of the prompts, drawn by the seed and repeated side by side to `count`; all
    prompts as they are for 0."""
    if not different:
        return prompts
    few = draw_prompts(prompts, different, seed)
    return [few[i * different // count] for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Adapter folders to score: of each unseen dataset by method, and those that every unseen
    dataset shares."""

    by_dataset: dict[str, dict[str, list[pathlib.Path]]]
    training: dict[str, pathlib.Path]  # the last checkpoint of each training dataset
    nearest: dict[str, str]  # unseen dataset -> training dataset


def check_asked_alike(config: Config, generator: TrainedGenerator) -> None:
    """Raises InputError unless the configuration gives a generator what it was trained on, listing
    what differs; another suite may be asked of it."""
    asked = ("num_prompts", "max_text_length", "layer", "form")
    datasets = read_record(generator.folder)["train"].get(
        "datasets", config.train.datasets
    )  # an imported one does not say
    then, now = (
        {
            "condition": {key: getattr(condition, key) for key in asked},
            "train": {"datasets": number},
        }
        for condition, number in (
            (generator.condition, datasets),
            (config.condition, config.train.datasets),
        )
    )
    check_same_run(generator.folder, then, now, None)


def make_candidates(config: Config, suite: Suite, workdir: pathlib.Path) -> Candidates:
    """Generates the adapters of all unseen datasets and builds their competitors, as PEFT folders;
    those that are there and were made from this generator, these prompts and checkpoints are
    kept."""
    suite = suite.with_training(config.train.datasets, config.seed)
    generator = TrainedGenerator(workdir / "generator", encoder=config.condition.encoder)
    check_asked_alike(config, generator)
    checkpoints = Checkpoints(config, suite, workdir)
    loras = checkpoints.digest()
    encoder, adapter, competitors = generator.encoder, generator.adapter, workdir / "competitors"
    n, samples, different = (
        config.condition.num_prompts,
        config.evaluate.samples,
        config.evaluate.num_prompts,
    )
    anew: list[pathlib.Path] = []

    def kept(folder: pathlib.Path, card: str, make: Callable[[], object]) -> pathlib.Path:
        """The folder, written by `make` unless it is there and made from what its card is to
        name."""
        if not is_made_from(folder, card):
            anew.extend([folder] if folder.is_dir() else [])
            make()
        return folder

    def texts(dataset: Dataset) -> list[str]:
        return condition_texts(dataset.pool, config.condition.form, config.seed)

    def pooled(prompts: list[str]) -> np.ndarray:
        return encoder.cached_means(prompts, workdir / "embeddings")

    training = {
        d.name: pooled(condition_texts(d.train, config.condition.form, config.seed))
        for d in suite.train
    }
    mean_card = f"The mean of the training LoRA checkpoints (sha256 {loras}).\n"
    mean_folder = kept(
        competitors / "mean_adapter",
        mean_card,
        lambda: save_adapter(
            competitors / "mean_adapter",
            mean_weights(tensors for _, tensors in checkpoints.tensors()),
            adapter,
            mean_card,
        ),
    )

    @functools.cache
    def ridge() -> Ridge:
        target = generator.target
        if not isinstance(target, ElementTarget):
            target = ElementTarget.fit(generator.layout, checkpoints.tensors)
        tokens = (
            running_mean(target.encode(x, source) for source, x in checkpoints.tensors(name))
            for name in training
        )
        rng = np.random.default_rng(config.seed)
        draws = [
            [rng.choice(len(x), n, replace=False) for _ in range(RIDGE_DRAWS)]
            for x in training.values()
        ]
        return Ridge.fit(target, training, tokens, draws)

    def generated(
        pool: Sequence[str], folder: pathlib.Path, seed: int, source: str
    ) -> pathlib.Path:
        prompts = repeat_few(pool, different, n, seed)
        card = generator.card(generator.draw(prompts, seed, source), seed)
        return kept(folder, card, lambda: generator.write(prompts, folder, seed, source))

    def predicted(prompts: list[str], folder: pathlib.Path) -> pathlib.Path:
        card = (
            f"Ridge regression from prompts (sha256 {digests.of_texts(prompts)}), fitted to the training "
            f"LoRA checkpoints (sha256 {loras}) "
            f"as the tokens of a generator (sha256 {generator.fingerprint}).\n"
        )
        return kept(
            folder,
            card,
            lambda: save_adapter(folder, ridge().tensors(pooled(prompts)), adapter, card),
        )

    by_dataset, closest = {}, {}
    for dataset in tqdm(suite.unseen, desc="generate", unit="dataset", dynamic_ncols=True):
        stop.check()
        name, prompts = dataset.name, texts(dataset)
        wrong = texts(wrong_task(suite, name))
        drawn = draw_prompts(repeat_few(prompts, different, n, 0), n, 0)
        closest[name] = nearest(pooled(drawn), training)
        found: dict[str, list[pathlib.Path]] = {
            "mean_adapter": [mean_folder],
            "generated": [],
            "wrong_prompts": [],
        }
        for seed in range(samples):
            folder = (
                competitors / "generated" / name / f"seed_{seed}"
                if seed
                else workdir / "adapters" / name
            )
            found["generated"].append(generated(prompts, folder, seed, f"prompts of {name}"))
            folder = competitors / "wrong_prompts" / name / f"seed_{seed}"
            found["wrong_prompts"].append(generated(wrong, folder, seed, f"prompts of {name}"))
        if len(suite.train) > 2:
            found["ridge"] = [predicted(drawn, competitors / "ridge" / name)]
        tuned = dataset_checkpoints(checkpoints.root / name)
        if tuned:
            found["tuned"] = [as_folder(tuned[-1], competitors / "tuned" / name)]
        by_dataset[name] = found
    last = {
        name: as_folder(paths[-1], competitors / "training" / name)
        for name, paths in checkpoints.folders.items()
    }
    if anew:
        what = (
            "were of another generator, other prompts or other LoRA checkpoints, and are made anew"
        )
        print(
            f"{workdir}: {len(anew)} adapter(s) {what} ({anew[0].relative_to(workdir)}, ...)",
            flush=True,
        )
    return Candidates(by_dataset, last, closest)
