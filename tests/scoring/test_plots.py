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


def test_losses_of_two_kinds_are_two_curves(monkeypatch):
    """On weights first, then through the base with the share that was right, a line between."""
    drawn = []
    monkeypatch.setattr(plots.figures, "embedded", lambda figure: drawn.append(figure) or "")
    of_weights = [{"step": i, "loss": 1.0, "output_mean_square": 1.0} for i in (1, 2, 3)]
    through = [{"step": i, "loss": 2.0, "answers_loss": 2.0, "exact": 0.5} for i in (4, 5)]
    plots._row_of_curves([("both", of_weights + through), ("weights", of_weights)])
    both, weights, twin, _ = drawn[0].axes
    steps = [list(line.get_xdata()) for line in both.lines]
    assert steps == [[1, 2, 3], [4, 5], [4, 4]] and "through the base" in both.get_ylabel()
    assert [list(line.get_xdata()) for line in twin.lines if len(line.get_xdata())] == [[4, 5]]
    assert [len(line.get_xdata()) for line in weights.lines] == [3, 0]
