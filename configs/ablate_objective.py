"""What should the generator learn from: weights of LoRAs, answers through the base, what the base
answers with those LoRAs, or several?

    dnd ablate --config=configs/ablate_objective.py --workdir=runs/ablate_objective [--seeds=0,1,2]

The first five take as many steps as mini.py; the `_half` ones about its seconds, as a step on
answers, in which each generated LoRA answers 8 questions through the base, costs twice as much
(metrics.jsonl of each variant has the seconds). The last three are regularisers, at values that
nothing was chosen by.
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py (weights) with the other objectives."""
    config = mini.get_config()
    objectives = ("weights", "answers", "distill", "weights+answers")
    config.ablate.axes = (("train.objective", objectives),)
    answers = {"train.objective": "answers"}
    config.ablate.variants = (
        ("weights_then_answers", {**answers, "train.weights_first": 500}),
        ("answers_half", {**answers, "train.steps": 400}),
        ("weights_then_answers_half", {**answers, "train.weights_first": 500, "train.steps": 650}),
        ("answers_dropout", {**answers, "train.condition_dropout": 0.1}),
        ("answers_wording", {**answers, "train.wording_weight": 0.03}),
        ("size", {"train.size_weight": 0.1}),
    )
    return config
