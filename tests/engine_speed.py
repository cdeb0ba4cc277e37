"""The same questions to the same adapters by PyTorch and by a running server: answers that differ,
and tokens a second. docs/EVALUATION.md has its table.

    python tests/engine_speed.py --server=http://127.0.0.1:8200 --base=FOLDER
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.hub import resolve
from dnd_jax.config.load import DEFAULTS, load_file
from dnd_jax.config.schema import Evaluate
from dnd_jax.config.validate import freeze
from dnd_jax.data.skills import write_skills
from dnd_jax.data.sources import Example
from dnd_jax.data.suite import load_suite
from dnd_jax.lora.adapter import save_adapter
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.scoring.engine import each, open_engine, with_adapters

TARGETS, RANK = ("q_proj", "v_proj"), 8


class Asked(NamedTuple):
    """What one engine did."""

    answers: dict[str, list[list[int]]]  # {adapter: token ids of each answer}
    seconds: float

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(len(ids) for rows in self.answers.values() for ids in rows)

    @property
    def said(self) -> str:
        """In a line."""
        rate = self.tokens / self.seconds
        return f"{self.tokens} tokens, {self.seconds:.1f} s, {rate:.1f} a second"


def random_adapters(root: pathlib.Path, base: pathlib.Path, name: str, count: int) -> list[str]:
    """LoRAs that change answers and leave them English."""
    shapes = load_base_config(base).lora_shapes(RANK, TARGETS)
    settings, folders = AdapterConfig(name, RANK, 16.0, TARGETS), []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        tensors = {k: 0.02 * rng.standard_normal(s, np.float32) for k, s in shapes.items()}
        folders.append(str(save_adapter(root / f"random_{seed}", tensors, settings)))
    return folders


def questions(root: pathlib.Path, count: int) -> list[Example]:
    """Test questions of the embedded skills, as many of each unseen task."""
    write_skills(root, 0, 0)
    unseen = load_suite(root, 0).unseen
    mixed = [row for rows in zip(*(d.test for d in unseen), strict=False) for row in rows]
    return mixed[:count]


def ask(base, c: Evaluate, folders: Sequence[str], asked: Sequence[Example]) -> Asked:
    """Every question to every adapter; loading an adapter counts, loading the base does not."""
    engine = open_engine(base, c)
    engine.answer_ids(asked[:4])  # what is compiled or allocated once

    def work(one, folder: str) -> tuple[str, list[list[int]]]:
        one.use(folder)
        return folder, one.answer_ids(asked)

    begun = time.perf_counter()
    with with_adapters(engine, folders, c.engine_adapters) as bases:
        answers = dict(each(bases, folders, work))
    return Asked({folder: answers[folder] for folder in folders}, time.perf_counter() - begun)


def same(ours: Asked, theirs: Asked) -> tuple[int, int]:
    """(how many answers are the same, of how many)."""
    pairs = [
        (a, b)
        for folder, rows in ours.answers.items()
        for a, b in zip(rows, theirs.answers[folder], strict=True)
    ]
    return sum(a == b for a, b in pairs), len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    base = resolve(given.base)
    c = dataclasses.replace(
        freeze(load_file(DEFAULTS)).evaluate,
        max_new_tokens=given.tokens,
        batch_size=given.questions,
    )
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        folders = random_adapters(root, base, str(base), given.adapters)
        asked = questions(root / "skills", given.questions)
        in_torch = ask(base, c, folders, asked)
        print(f"PyTorch: {in_torch.said}", flush=True)
        for at_once in (given.adapters, 1):
            served = dataclasses.replace(c, engine=given.server, engine_adapters=at_once)
            found = ask(base, served, folders, asked)
            alike, every = same(in_torch, found)
            print(
                f"server, {at_once} at once: {found.said}, {alike} of {every} the same", flush=True
            )


if __name__ == "__main__":
    main()
