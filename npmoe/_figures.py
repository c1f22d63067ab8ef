"""What all pictures share: a figure without a display, written whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from npmoe.errors import BackendUnavailableError
from npmoe.training.files import write_bytes_atomic


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its axes (rows, columns), without any display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise BackendUnavailableError(
            "plots: package matplotlib must be installed, got none. Run: pip install 'npmoe[cli]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a PNG whole, or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_bytes_atomic(path, picture.getvalue(), function="plots", noun="picture")
