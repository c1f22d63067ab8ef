"""The log of a run: one JSON object a line, safe to kill at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from npmoe.errors import CheckpointError, RangeError
from npmoe.training.files import exists, write_error, write_text_atomic


class JsonlLog:
    """Append records to a JSONL file.

    Parameters
    ----------
    path : path
        Made at the first record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record as one line, flushed; NumPy numbers and arrays become JSON ones.

        Raises
        ------
        RangeError
            If a value is not JSON, or a number is not finite.
        CheckpointError
            If the line cannot be written.
        """
        try:
            line = json.dumps(record, allow_nan=False, default=_plain) + "\n"
        except (TypeError, ValueError) as error:
            raise RangeError(
                "JsonlLog.append: record must hold finite numbers and plain JSON values, "
                f"got {record!r} ({error})."
            ) from error
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise write_error("JsonlLog.append", self.path, error, "log") from error

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps after `step`, and a last line torn by a kill.

        For resuming at a checkpoint: the steps are made, and logged, again. Records without a
        "step" stay. The file is replaced atomically.

        Raises
        ------
        CheckpointError
            If a line other than the last is not JSON, or the file cannot be written.
        """
        if not exists(self.path):
            return
        kept = [r for r in read_log(self.path) if not r.get("step", step) > step]
        write_text_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a log, without a last line that is torn or still being written.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or a line other than the last is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(
            f"read_log: {path} could not be read: {error.strerror}. Give the log.jsonl of a run."
        ) from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CheckpointError(
                f"read_log: {path} must hold a JSON object on each line, got {line[:40]!r} on "
                f"line {number}. Delete that line."
            )
        records.append(record)
    return records


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
