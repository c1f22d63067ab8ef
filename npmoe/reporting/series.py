"""The log of a run as arrays over steps, each field checked, and absent fields known as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import CheckpointError
from npmoe.training.files import RunFolder
from npmoe.training.log import read_log

_SCALARS = (
    *("cross_entropy", "auxiliary", "learning_rate", "grad_norm", "drop_rate", "load_imbalance"),
    *("tokens_per_second", "val_loss", "val_accuracy"),
)
# Number of axes behind the step: layers, and experts or (least, largest).
_BY_LAYER = {
    "tokens_per_expert": 2,
    "kept_per_expert": 2,
    "router_entropy": 1,
    "selection_bias_range": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One field: the steps (N,) that have it, and its values (N, ...), float64."""

    steps: HostArray
    values: HostArray

    def __len__(self) -> int:
        """Return N."""
        return len(self.steps)

    def at(self, step: int) -> HostArray | None:
        """Return the value at a step; None if that record lacks the field."""
        found = np.flatnonzero(self.steps == step)
        return None if not found.size else np.asarray(self.values[found[-1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    """What the experts took in an evaluation: choices (layers, rows, E), and the rows' names."""

    step: int
    rows: tuple[str, ...]
    choices: HostArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog:
    """All fields of a log.

    Attributes
    ----------
    steps : (N,) int64 array
    fields : dict of str to Series
        Of length 0 where no record has the field.
    specialisations : list of Specialisation
    """

    steps: HostArray
    fields: dict[str, Series]
    specialisations: list[Specialisation]

    def __getitem__(self, name: str) -> Series:
        """Return one field."""
        return self.fields[name]


def read_run_log(folder: RunFolder) -> RunLog:
    """Read and check the log of a run.

    Raises
    ------
    CheckpointError
        If the log cannot be read, holds no step, has a damaged line, or a value that is no
        number, or of another shape than that of earlier steps.
    """
    records = [r for r in read_log(folder.log) if "step" in r]
    if not records:
        raise CheckpointError(
            f"report: {folder.log} must hold at least one step, got none. The run has not come to "
            "its first record yet."
        )
    # A step logged again, by a run that was continued, counts as it was last.
    by_step = {_step(folder, r): r for r in records}
    ordered = sorted(by_step.items())
    fields = {name: _series(folder, ordered, name, 0) for name in _SCALARS}
    fields |= {name: _series(folder, ordered, name, axes) for name, axes in _BY_LAYER.items()}
    return RunLog(
        steps=np.array([step for step, _ in ordered], np.int64),
        fields=fields,
        specialisations=[
            _specialisation(folder, step, record["specialisation"])
            for step, record in ordered
            if "specialisation" in record
        ],
    )


def _step(folder: RunFolder, record: dict[str, Any]) -> int:
    step = record["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(
            f"report: {folder.log} must hold a whole number as step, got {step!r}. "
            "Delete that line."
        )
    return step


def _series(
    folder: RunFolder, records: Sequence[tuple[int, dict[str, Any]]], name: str, axes: int
) -> Series:
    """Return one field of all records that have it; an empty list is nothing."""
    steps: list[int] = []
    values: list[HostArray] = []
    for step, record in records:
        if name not in record or record[name] == []:
            continue
        value = _numbers(folder, step, name, record[name], axes)
        if values and value.shape != values[0].shape:
            raise CheckpointError(
                f"report: {folder.log}, step {step}: {name} must have shape {values[0].shape}, as "
                f"at step {steps[0]}, got {value.shape}. Delete that line."
            )
        steps.append(step)
        values.append(value)
    shape = (0,) + (0,) * axes
    return Series(
        steps=np.array(steps, np.int64), values=np.stack(values) if values else np.empty(shape)
    )


def _numbers(folder: RunFolder, step: int, name: str, value: Any, axes: int) -> HostArray:
    """Return a JSON value as finite numbers with so many axes."""
    try:
        numbers: HostArray = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.full((), np.nan)
    if numbers.ndim != axes or not np.isfinite(numbers).all():
        what = "a number" if axes == 0 else f"numbers with {axes} axes"
        raise CheckpointError(
            f"report: {folder.log}, step {step}: {name} must hold {what}, got "
            f"{str(value)[:60]}. Delete that line."
        )
    return numbers


def _specialisation(folder: RunFolder, step: int, value: Any) -> Specialisation:
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or "choices" not in value:
        raise CheckpointError(
            f"report: {folder.log}, step {step}: specialisation must hold rows and choices, got "
            f"{str(value)[:60]}. Delete that line."
        )
    choices = _numbers(folder, step, "specialisation.choices", value["choices"], 3)
    if choices.shape[1] != len(rows):
        raise CheckpointError(
            f"report: {folder.log}, step {step}: specialisation must hold choices (layers, rows, "
            f"E) for {len(rows)} rows, got {choices.shape}. Delete that line."
        )
    return Specialisation(step=step, rows=tuple(map(str, rows)), choices=choices)
