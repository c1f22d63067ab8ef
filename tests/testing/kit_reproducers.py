"""Run what `Report.write` wrote, in this process."""

from __future__ import annotations

import runpy
from pathlib import Path

from npmoe.testing.conformance.report import Report


def reproduces(report: Report, folder: Path, *, target: str | None = None) -> bool:
    """Return whether the first failure's script fails; `target` is run instead of its own."""
    script = report.write(folder)[0]
    if target is not None:
        module, name = target.split(":")
        lines = [
            f"target = importlib.import_module({module!r}).{name}"
            if x.startswith("target =")
            else x
            for x in script.read_text(encoding="utf-8").splitlines()
        ]
        script.write_text("\n".join(lines), encoding="utf-8")
    try:
        runpy.run_path(str(script))
    except (ArithmeticError, AssertionError, IndexError, ValueError):
        return True
    return False
