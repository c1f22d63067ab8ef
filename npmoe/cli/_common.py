"""What several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npmoe.errors import DataError


def check_json(path: str | None) -> None:
    """Raise before the work starts if `write_json` could not write after it."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise DataError(
            f"--json must name a file that can be written, got {path}. "
            "Make its folder, or choose another file."
        )


def write_json(path: str | None, values: dict[str, Any]) -> None:
    """Write a summary for programs, if a file was asked for."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"--json: {path} could not be written: {error.strerror}. Choose another file."
        ) from error


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print label and value in two columns."""
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")
