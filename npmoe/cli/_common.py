"""What several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npmoe.errors import DataError


def check_output(option: str, path: str | None) -> None:
    """Raise before the work starts if the file of an option could not be written after it."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise DataError(
            f"{option} must name a file that can be written, got {path}. "
            "Make its folder, or choose another file."
        )


def write_json(path: str | None, values: dict[str, Any]) -> None:
    """Write a summary for programs, if a file was asked for."""
    if path is not None:
        write_output("--json", path, json.dumps(values, indent=1) + "\n")


def write_output(option: str, path: str, text: str) -> None:
    """Write the file of an option."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{option}: {path} could not be written: {error.strerror}. Choose another file."
        ) from error


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print label and value in two columns."""
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")
