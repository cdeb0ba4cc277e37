"""The adapters that `evaluate` scores: generated ones, their controls and their competitors, as
PEFT folders."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from dnd_jax.config.records import check_same_run
from dnd_jax.config.schema import Config
from dnd_jax.core import digests
from dnd_jax.core import workdir as paths
from dnd_jax.core.stopping import stop
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import Dataset, Suite
from dnd_jax.generator.folder import read_record
from dnd_jax.generator.nearest import nearest
from dnd_jax.generator.trained import Generated, TrainedGenerator, draw_prompts
from dnd_jax.lora.adapter import as_folder, is_made_from, save_adapter
from dnd_jax.lora.checkpoints import Checkpoints
from dnd_jax.lora.collect import DONE as COLLECTED
from dnd_jax.lora.controls import find_controls
from dnd_jax.lora.listing import dataset_checkpoints
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.lora.targets import ElementTarget
from dnd_jax.scoring.competitors import Ridge, mean_weights, running_mean
from dnd_jax.scoring.draws import draw_training, repeat_few, seeds_of_draws, wrong_task

RIDGE_DRAWS = 16
# What decides of a generator's competitors.
TRAINED_BY = ("datasets", "objective", "weights_first", "shots")


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Adapter folders to score: of each unseen dataset by method, and those that every unseen
    dataset shares."""

    by_dataset: dict[str, dict[str, list[pathlib.Path]]]
    training: dict[str, pathlib.Path]  # the last checkpoint of each training dataset; {}: none
    # unseen dataset -> the training dataset nearest to each draw of its prompts
    nearest: dict[str, tuple[str, ...]]
    # unseen dataset -> its answered examples, which the base without an adapter gets in its context
    shots: dict[str, tuple[Example, ...]] = dataclasses.field(default_factory=dict)
    # training datasets whose adapters are scored on every unseen one; None: all
    drawn: tuple[str, ...] | None = None

    def of_nearest(self, name: str) -> list[pathlib.Path]:
        """The adapter of the training dataset nearest to each draw of an unseen one's prompts; none
        where none has any."""
        return [self.training[one] for one in self.nearest[name]] if self.training else []

    @property
    def everywhere(self) -> dict[str, pathlib.Path]:
        """Of `training`, the adapters that are scored on every unseen dataset."""
        names = self.training if self.drawn is None else self.drawn
        return {name: self.training[name] for name in names}


def check_asked_alike(config: Config, generator: TrainedGenerator) -> None:
    """Raises InputError unless the configuration gives a generator what it was trained on, listing
    what differs; another suite may be asked of it."""
    asked = ("num_prompts", "max_text_length", "layer", "form")
    # An imported generator does not say on how many datasets it was trained.
    trained = read_record(generator.folder)["train"]
    taught = {"objective": "weights", "weights_first": 0, "shots": 0} | trained if trained else {}
    then, now = (
        {
            "condition": {key: getattr(condition, key) for key in asked},
            "train": {key: of.get(key, getattr(config.train, key)) for key in TRAINED_BY},
        }
        for condition, of in ((generator.condition, taught), (config.condition, {}))
    )
    check_same_run(generator.folder, then, now, None)


def make_candidates(
    config: Config, suite: Suite, base_path: str, workdir: pathlib.Path
) -> Candidates:
    """Generates the adapters of all unseen datasets and builds their competitors, as PEFT folders;
    those that are there and were made from this generator, these prompts and checkpoints are
    kept. base_path: of the base that controls were tuned on."""
    controls = find_controls(config, suite, base_path, workdir)
    maker = _Maker(config, suite.with_training(config.train.datasets, config.seed), workdir)
    shared = {**maker.mean(), **maker.from_no_prompts_of_the_task()}
    by_dataset, closest = {}, {}
    for dataset in tqdm(suite.unseen, desc="generate", unit="dataset", dynamic_ncols=True):
        stop.check()
        name, prompts = dataset.name, maker.texts(dataset)
        wrong = maker.texts(wrong_task(suite, name))
        drawn = maker.drawn(name, prompts)
        closest[name] = tuple(nearest(maker.pooled(d), maker.training) for d in drawn.values())
        by_dataset[name] = {
            **shared,
            "generated": maker.generated(name, prompts),
            "wrong_prompts": maker.from_wrong_prompts(name, wrong),
            **maker.predicted(name, drawn),
            **{method: [of[name]] for method, of in controls.items() if name in of},
            **maker.tuned(name),
        }
    maker.say_what_is_anew()
    shots = {d.name: maker.shots(d) for d in suite.unseen if d.labeled}
    training = maker.last_of_training()
    drawn = draw_training(list(training), config.evaluate.train_adapters, config.seed)
    return Candidates(by_dataset, training, closest, shots, drawn)


def has_checkpoints(config: Config, suite: Suite, workdir: pathlib.Path) -> bool:
    """Whether the training datasets have LoRA checkpoints: the given ones, or the workdir's own
    when their collection is whole."""
    given = config.train.checkpoints
    if not given and not (workdir / paths.LORAS / COLLECTED).is_file():
        return False
    root = pathlib.Path(given or workdir / paths.LORAS)
    return all(dataset_checkpoints(root / dataset.name) for dataset in suite.train)


class _Maker:
    """What a run's adapters are made of, and how each kind is made."""

    def __init__(self, config: Config, suite: Suite, workdir: pathlib.Path):
        self._config, self._suite, self._workdir = config, suite, workdir
        self._generator = TrainedGenerator(
            workdir / paths.GENERATOR, encoder=config.condition.encoder
        )
        check_asked_alike(config, self._generator)
        self._root = pathlib.Path(config.train.checkpoints or workdir / paths.LORAS)
        self._checkpoints, self._loras = None, ""  # of the training datasets, if there are any
        if config.train.from_loras or has_checkpoints(config, suite, workdir):
            self._checkpoints = Checkpoints(config, suite, workdir)
            self._loras = self._checkpoints.digest()
        self._competitors = workdir / paths.COMPETITORS
        self._anew: list[pathlib.Path] = []
        self._n, self._different = config.condition.num_prompts, config.evaluate.num_prompts
        # {training dataset: mean-pooled embeddings of its texts (n, C)}
        self.training = {
            d.name: self.pooled(self._condition(d.train))
            for d in tqdm(suite.train, desc="embed", unit="dataset", dynamic_ncols=True)
        }

    def texts(self, dataset: Dataset) -> list[str]:
        """What of an unseen dataset the generator may be given."""
        return self._condition(dataset.pool)

    def drawn(self, name: str, prompts: Sequence[str]) -> dict[int, list[str]]:
        """{seed: the N prompts of the adapter that it generates} of a dataset's S draws."""
        n, source = self._n, f"prompts of {name}"
        return {
            seed: draw_prompts(repeat_few(prompts, self._different, n, seed), n, seed, source)
            for seed in self._draws(name)
        }

    def pooled(self, prompts: Sequence[str]) -> np.ndarray:
        """Mean-pooled embeddings (n, C)."""
        return self._generator.encoder.cached_means(prompts, self._workdir / paths.EMBEDDINGS)

    def mean(self) -> dict[str, list[pathlib.Path]]:
        """{"mean_adapter": [it]}, one for all unseen datasets; nothing without LoRAs."""
        if self._checkpoints is None:
            return {}
        card = f"The mean of the training LoRA checkpoints (sha256 {self._loras}).\n"
        folder = self._saved(
            self._competitors / "mean_adapter",
            card,
            lambda: mean_weights(tensors for _, tensors in self._checkpoints.tensors()),
            self._as_collected,
        )
        return {"mean_adapter": [folder]}

    def generated(self, name: str, prompts: Sequence[str]) -> list[pathlib.Path]:
        """S adapters from a dataset's own prompts; the first is the run's result."""
        first, others = (
            self._workdir / paths.ADAPTERS / name,
            self._competitors / "generated" / name,
        )
        draws = enumerate(self._draws(name))
        folders = {s: others / f"seed_{s}" if i else first for i, s in draws}
        return self._of_prompts(name, prompts, folders)

    def from_wrong_prompts(self, name: str, wrong: Sequence[str]) -> list[pathlib.Path]:
        """As many from another dataset's prompts, the control."""
        folder = self._competitors / "wrong_prompts" / name
        folders = {seed: folder / f"seed_{seed}" for seed in self._draws(name)}
        return self._of_prompts(name, wrong, folders)

    def from_no_prompts_of_the_task(self) -> dict[str, list[pathlib.Path]]:
        """Controls that all unseen datasets share: adapters from prompts each of another training
        dataset, drawn anew for each sample, and one from empty prompts."""
        generator = self._generator
        if not self._config.controls.prompts:
            return {}
        folder = self._competitors / "random_prompts"
        folders = {seed: folder / f"seed_{seed}" for seed in self._draws("")}
        for seed, path in folders.items():
            self._of_prompts("the training datasets", self._random(seed), {seed: path})
        empty = [""] * self._n
        card = generator.card(Generated(tuple(empty), {}), 0)
        path = self._competitors / "empty_prompts"
        self._saved(path, card, lambda: generator.tensors(empty))
        return {"random_prompts": list(folders.values()), "empty_prompts": [path]}

    def _random(self, seed: int) -> list[str]:
        """N texts, each of another training dataset as far as these go."""
        rng, pools = np.random.default_rng([seed, self._n]), self._suite.train
        rounds = -(-self._n // len(pools))
        order = np.concatenate([rng.permutation(len(pools)) for _ in range(rounds)])[: self._n]
        return [self._condition(pools[i].train)[rng.integers(len(pools[i].train))] for i in order]

    def shots(self, dataset: Dataset) -> tuple[Example, ...]:
        """Answered examples of an unseen dataset, drawn by the seed."""
        count = min(self._config.controls.in_context, len(dataset.pool))
        rng = np.random.default_rng([self._config.seed, count])
        return tuple(dataset.pool[i] for i in rng.choice(len(dataset.pool), count, replace=False))

    def predicted(
        self, name: str, drawn: Mapping[int, Sequence[str]]
    ) -> dict[str, list[pathlib.Path]]:
        """{"ridge": its adapter of each draw}; nothing where the training datasets are too few for
        it, or have no LoRAs."""
        if len(self._suite.train) <= 2 or self._checkpoints is None:
            return {}
        folders = []
        for seed, prompts in drawn.items():
            card = (
                f"Ridge regression from prompts (sha256 {digests.of_texts(prompts)}), fitted to "
                f"the training LoRA checkpoints (sha256 {self._loras}) "
                f"as the tokens of a generator (sha256 {self._generator.fingerprint}).\n"
            )
            folder = self._competitors / "ridge" / name / f"seed_{seed}"
            make = functools.partial(self._from_ridge, prompts)
            folders.append(self._saved(folder, card, make, self._as_collected))
        return {"ridge": folders}

    def _from_ridge(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return self._ridge.tensors(self.pooled(prompts))

    def tuned(self, name: str) -> dict[str, list[pathlib.Path]]:
        """{"tuned": [the dataset's own last LoRA checkpoint]}, where it has any."""
        own = dataset_checkpoints(self._root / name)
        return {"tuned": [as_folder(own[-1], self._competitors / "tuned" / name)]} if own else {}

    def last_of_training(self) -> dict[str, pathlib.Path]:
        """{training dataset: its last LoRA checkpoint}; nothing where there are none."""
        folders = self._checkpoints.folders if self._checkpoints else {}
        return {
            name: as_folder(checkpoints[-1], self._competitors / "training" / name)
            for name, checkpoints in folders.items()
        }

    def say_what_is_anew(self) -> None:
        """Prints how many adapters were there, but made from something else."""
        if self._anew:
            print(
                f"{self._workdir}: {len(self._anew)} adapter(s) were of another generator, other "
                "prompts or other LoRA checkpoints, and are made anew "
                f"({self._anew[0].relative_to(self._workdir)}, ...)",
                flush=True,
            )

    def _draws(self, name: str) -> range:
        """The seeds of the S draws of a dataset's prompts."""
        return seeds_of_draws(name, self._config.seed, self._config.evaluate.samples)

    def _condition(self, examples: Sequence[Example]) -> list[str]:
        return condition_texts(examples, self._config.condition.form, self._config.seed)

    def _kept(self, folder: pathlib.Path, card: str, make: Callable[[], object]) -> pathlib.Path:
        """The folder, written by `make` unless it is there and made from what its card is to
        name."""
        if not is_made_from(folder, card):
            self._anew.extend([folder] if folder.is_dir() else [])
            make()
        return folder

    @property
    def _as_collected(self) -> AdapterConfig:
        """The settings of adapters made of LoRA checkpoints: theirs, on the generator's base."""
        base, revision = self._generator.adapter.base, self._generator.adapter.revision
        return dataclasses.replace(self._checkpoints.adapter, base=base, revision=revision)

    def _saved(
        self,
        folder: pathlib.Path,
        card: str,
        tensors: Callable[[], dict],
        adapter: AdapterConfig | None = None,
    ) -> pathlib.Path:
        adapter = adapter or self._generator.adapter
        return self._kept(folder, card, lambda: save_adapter(folder, tensors(), adapter, card))

    def _of_prompts(
        self, name: str, pool: Sequence[str], folders: Mapping[int, pathlib.Path]
    ) -> list[pathlib.Path]:
        """Generated adapters, one a seed."""
        generator, source = self._generator, f"prompts of {name}"
        for seed, folder in folders.items():
            prompts = repeat_few(pool, self._different, self._n, seed)
            drawn = generator.draw(prompts, seed, source)
            card = generator.card(Generated(tuple(drawn), {}), seed)
            write = functools.partial(generator.write, prompts, folder, seed, source)
            self._kept(folder, card, write)
        return list(folders.values())

    @functools.cached_property
    def _ridge(self) -> Ridge:
        """Fitted to the training checkpoints as normalised tokens, when an adapter needs it."""
        target, checkpoints = self._generator.target, self._checkpoints
        same = isinstance(target, ElementTarget) and target.layout == checkpoints.layout
        if not same or not self._config.train.from_loras:
            target = ElementTarget.fit(checkpoints.layout, checkpoints.tensors)
        tokens = (
            running_mean(target.encode(x, source) for source, x in checkpoints.tensors(name))
            for name in self.training
        )
        rng = np.random.default_rng(self._config.seed)
        draws = [
            [rng.choice(len(x), self._n, replace=False) for _ in range(RIDGE_DRAWS)]
            for x in self.training.values()
        ]
        return Ridge.fit(target, self.training, tokens, draws)
