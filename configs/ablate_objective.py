"""What should the generator learn from: weights of LoRAs, answers through the base, what the base
answers with those LoRAs, or several?

    dnd ablate --config=configs/ablate_objective.py --workdir=runs/ablate_objective [--seeds=0,1,2]

All at equal steps; a step on answers takes longer, as each generated LoRA answers 8 questions
through the base (metrics.jsonl of each variant has the seconds).
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py (weights) with the other objectives."""
    config = mini.get_config()
    objectives = ("weights", "answers", "distill", "weights+answers")
    config.ablate.axes = (("train.objective", objectives),)
    config.ablate.variants = (
        ("weights_then_answers", {"train.objective": "answers", "train.weights_first": 500}),
    )
    return config
