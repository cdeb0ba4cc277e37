"""What the tests of results share: evaluations with random scores."""

import pathlib

import numpy as np

from dnd_jax.data.sources import Example
from dnd_jax.scoring.candidates import Candidates
from dnd_jax.scoring.evaluate import by_method, in_context

NAMES = {"x": "near", "y": "near", "z": "far"}


def candidates(rng, names) -> tuple[Candidates, dict]:
    """Three training adapters and four samples a dataset, each with random scores on 200 questions:
    {label: {dataset: scores}}."""
    training = {f"t{i}": pathlib.Path(f"loras/t{i}") for i in range(3)}
    by_dataset = {}
    for name in names:
        found = {
            "mean_adapter": ["mean"],
            "generated": [f"{name}_{i}" for i in range(4)],
            "ridge": [f"ridge_{name}_{i}" for i in range(4)],
        }
        found |= {
            "wrong_prompts": [f"wrong_{name}_{i}" for i in range(4)],
            "random_prompts": [f"random_{i}" for i in range(4)],
            "tuned": [f"tuned_{name}"],
        }
        shared = ("multi_task_tenth", "multi_task", "empty_prompts")
        found |= {method: [method] for method in shared}
        found |= {method: [f"{method}_{name}"] for method in ("few_shot_8", "few_shot_64")}
        by_dataset[name] = {
            method: [pathlib.Path(f) for f in folders] for method, folders in found.items()
        }
    labels = {"base", *map(in_context, names), *map(str, training.values())}
    labels |= {
        str(f) for found in by_dataset.values() for folders in found.values() for f in folders
    }
    scores = {
        label: {n: (rng.random(200) < rng.random()).astype(float).tolist() for n in names}
        for label in sorted(labels)
    }
    shots = dict.fromkeys(names, (Example("where ?", "here"),))
    return Candidates(by_dataset, training, {n: ("t1", "t2") for n in names}, shots), scores


def runs_of(seeds, without_tuned=()) -> dict[int, dict]:
    """Evaluations of three unseen datasets, as `evaluate` makes them."""
    runs = {}
    for seed in seeds:
        found, scores = candidates(np.random.default_rng(seed), NAMES)
        for name in without_tuned:
            del found.by_dataset[name]["tuned"]
        unseen, questions = {}, {}
        for name, kind in NAMES.items():
            values, each, training = by_method(
                found, name, lambda label, name=name, scores=scores: scores[label][name]
            )
            unseen[name] = {
                "kind": kind,
                **values,
                "training": training,
                "content": values,
                "format": values,
            }
            questions[name] = dict.fromkeys(("exact", "content", "format"), each)
        runs[seed] = {
            "suite": "s",
            "unseen": unseen,
            "questions": questions,
            "overhead": {},
            "agreement": {
                "questions": 2,
                "answers": 1,
                "same_answers": 1,
                "largest_logit_difference": seed / 10,
            },
            "seconds": {"train": 1.0},
            "scores": scores,
        }
    return runs
