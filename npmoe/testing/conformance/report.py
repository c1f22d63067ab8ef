"""What a run of checks found: a table for people, JSON for machines, cases to run again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from npmoe.testing.conformance.case import Case

Status = Literal["passed", "failed", "expected failure", "unexpected pass", "not run"]
_DETAILED = 4  # failures shown with their cases; one mistake often fails many checks
_BAD = ("failed", "unexpected pass")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Failure:
    """One failed check.

    Attributes
    ----------
    check : str
        Its name.
    message : str
        What was wrong.
    case : Case
        The smallest case found that still fails.
    reproducer : str
        A script that shows the failure with NumPy and the target alone; `Report.write` puts the
        arrays beside it.
    arrays : dict
        What the script loads: inputs, expected outputs and bounds.
    """

    check: str
    message: str
    case: Case
    reproducer: str
    arrays: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One line of the table."""

    name: str
    about: str
    status: Status
    cases: int
    seconds: float
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """The outcome for one target.

    Attributes
    ----------
    target, kind : str
    results : list of CheckResult
        One per check, in order.
    failures : list of Failure
        Of checks that were not expected to fail.
    notes : list of str
        What was not covered, and why.
    known : tuple of str
        Names of all checks of the kind for this dtype, run or not.
    """

    target: str
    kind: str
    results: list[CheckResult]
    failures: list[Failure]
    notes: list[str] = field(default_factory=list)
    known: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed or failed as expected."""
        return not any(r.status in _BAD for r in self.results)

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.results), default=0)
        lines = [f"{self.kind}: {self.target}"]
        for r in self.results:
            mark = {"passed": "ok", "failed": "FAILED", "not run": "-"}.get(r.status, r.status)
            lines.append(f"  {r.name:<{width}}  {mark:<6}  {r.cases:>4} cases  {r.seconds:6.2f} s")
        for failure in self.failures[:_DETAILED]:
            lines += ["", f"{failure.check}: {failure.message}", f"  case: {failure.case.note}"]
            lines += [f"    {name} = {_short(v)}" for name, v in failure.case.arguments.items()]
        more = self.failures[_DETAILED:]
        if more:
            lines += ["", f"and {len(more)} more: {', '.join(f.check for f in more)}"]
        lines += [f"note: {note}" for note in self.notes]
        wrong = sum(r.status in _BAD for r in self.results)
        run = sum(r.status != "not run" for r in self.results)
        lines.append(f"{run - wrong} of {run} checks passed" + ("" if self.passed else ": WRONG"))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "target": self.target,
            "kind": self.kind,
            "passed": self.passed,
            "notes": self.notes,
            "checks": [
                {n: getattr(r, n) for n in CheckResult.__dataclass_fields__} for r in self.results
            ],
            "failures": [
                {"check": f.check, "message": f.message, "case": f.case.note} for f in self.failures
            ],
        }

    def write(self, folder: str | Path) -> list[Path]:
        """Write a ``.npz`` and a script for every failure; return the scripts' paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        scripts = []
        for failure in self.failures:
            np.savez(folder / f"{failure.check}.npz", allow_pickle=False, **failure.arrays)
            script = folder / f"{failure.check}.py"
            script.write_text(failure.reproducer, encoding="utf-8")
            scripts.append(script)
        return scripts


def _short(value: Any) -> str:
    """Return an argument in one line."""
    if not isinstance(value, np.ndarray):
        return repr(value)
    text = np.array2string(value, separator=",", threshold=24, precision=4).replace("\n", "")
    text = " ".join(text.split())
    shape = "x".join(map(str, value.shape))
    return f"{value.dtype} {shape} {text if len(text) <= 100 else text[:97] + '...'}"
