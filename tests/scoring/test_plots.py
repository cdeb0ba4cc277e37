"""The pictures of a report."""

import json

from dnd_jax.core import figures
from dnd_jax.scoring import plots

TRAININGS = {
    "pretrain": "base",
    "collect/group_000": "LoRAs (mean), group 000",
    "collect/group_001": "LoRAs (mean), group 001",
    "generator": "generator",
    "controls/training/multi_task_0.001": "controls, multi task 0.001",
    "controls/training/few_shot/group_000": "controls, few shot, group 000",
}


def test_every_training_has_its_curve(tmp_path, monkeypatch):
    assert plots.curves(tmp_path) == ""
    row = {"step": 1, "loss": 0.5}
    means = {"output_mean_square": 1.0, "target_mean_square": 1.0}
    for name in TRAININGS:
        (tmp_path / name).mkdir(parents=True)
        more = means if name == "generator" else {"accuracy": 0.5}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row | more) + "\n")
    titles = []

    def embedded(figure):
        titles.append([axis.get_title() for axis in figure.axes if axis.get_title()])
        return "<img>"

    monkeypatch.setattr(figures, "embedded", embedded)
    assert plots.curves(tmp_path) == "<img><img>"  # two rows of pictures
    assert [len(row) for row in titles] == [plots.PANELS, 2]
    assert sum(titles, []) == list(TRAININGS.values())
