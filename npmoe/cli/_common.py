"""What several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npmoe.errors import DataError


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


def print_text(text: str) -> None:
    """Print text that the terminal's encoding may not hold."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
