"""Pictures by matplotlib, drawn without a screen."""

import base64
import io
import pathlib
from typing import Any

import numpy as np

from dnd_jax.core import packages
from dnd_jax.core.files import replacing


def panels(columns: int, width: float, height: float, share_y: bool = False) -> tuple[Any, Any]:
    """(figure, its axes (columns,)) side by side, in inches. Raises InputError without
    matplotlib."""
    figure = packages.load("matplotlib.figure").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure, np.atleast_1d(figure.subplots(1, columns, sharey=share_y))


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def embedded(figure: Any) -> str:
    """A figure as an <img> that holds its PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
