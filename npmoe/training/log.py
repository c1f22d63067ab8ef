"""The log of a run: one JSON object a line, safe to kill at any moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import CheckpointError, RangeError, UnsupportedError
from npmoe.training.config import RunConfig, TrainConfig, VisionTrainConfig
from npmoe.training.data import character_class
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


def input_names(config: RunConfig) -> list[str]:
    """Return the name of each input that `Evaluation.served` counts: V of them.

    The class of each character; or the place of each patch, by rows.
    """
    if isinstance(config, TrainConfig):
        return [character_class(c) for c in config.characters]
    if not isinstance(config, VisionTrainConfig):
        raise UnsupportedError(
            f"input_names: config must be of text or images, got {type(config).__name__}."
        )
    columns = config.model.image_size // config.model.patch_size
    return [f"row {row}, column {column}" for row in range(columns) for column in range(columns)]


def specialisation(served: HostArray, names: Sequence[str]) -> dict[str, Any]:
    """Return what each expert took, by kind of input, as a record's field "specialisation".

    Parameters
    ----------
    served : (MoE layers, V, E) int array
        `Evaluation.served`.
    names : sequence of str
        A name for each of the V inputs, as from `input_names`; those of one name are added up.

    Returns
    -------
    dict
        "rows": the names in the order of their first input; "choices": (MoE layers, rows, E) int
        array.

    Raises
    ------
    RangeError
        If there is not one name for each input.

    Examples
    --------
    >>> served = np.array([[[1, 2], [3, 4], [5, 6]]])
    >>> table = specialisation(served, ["vowel", "other", "vowel"])
    >>> table["rows"], table["choices"].tolist()
    (['vowel', 'other'], [[[6, 8], [3, 4]]])
    """
    if len(names) != served.shape[1]:
        raise RangeError(
            f"specialisation: names must hold V = {served.shape[1]} names, got {len(names)}. "
            f"V is bound by served {served.shape}."
        )
    rows = list(dict.fromkeys(names))
    choices = np.zeros((served.shape[0], len(rows), served.shape[2]), np.int64)
    for value, name in enumerate(names):
        choices[:, rows.index(name)] += served[:, value]
    return {"rows": rows, "choices": choices}


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
