"""Find a target by its name, and say why it cannot be used."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npmoe.errors import NpmoeError
from npmoe.testing.conformance.case import Case
from npmoe.testing.conformance.report import CheckResult, Failure, Report


class TargetNotUsable(NpmoeError):
    """A target that cannot be imported, found or called."""


def load_target(target: str) -> Callable[..., Any]:
    """Return the function of "module:function" or "path/to/file.py:function".

    The working directory is on the path.

    Raises
    ------
    TargetNotUsable
        If it cannot be imported, has no such name, or is not callable.
    """
    module_name, _, name = target.rpartition(":")
    if not module_name or not name:
        raise TargetNotUsable(f"target must be 'module:function', got {target!r}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = _import(module_name)
    except (Exception, SystemExit) as error:  # whatever happens at import is the target's
        raise TargetNotUsable(
            f"{module_name} must be importable, got {type(error).__name__}: {error}."
        ) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = ", ".join(n for n in vars(module) if not n.startswith("_"))
            raise TargetNotUsable(f"{module_name} must hold {name!r}, got only: {known}.")
        found = getattr(found, part)
    if not callable(found):
        raise TargetNotUsable(f"{target} must be callable, got {type(found).__name__}.")
    function: Callable[..., Any] = found
    return function


def check_arguments(function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """Raise TargetNotUsable unless the function can be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C: the first call will tell
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TargetNotUsable(
            f"the function must take ({', '.join(arguments)}), got {signature}: {error}."
        ) from error


def unusable_report(target: str, kind: str, error: TargetNotUsable) -> Report:
    """Return the report of a target that was never called: one named finding."""
    name = "target-takes-the-arguments" if "must take" in str(error) else "target-can-be-imported"
    case = Case(arguments={}, note="no call was made", options={})
    result = CheckResult(
        name=name,
        about="the target is a function of the right signature",
        status="failed",
        cases=0,
        seconds=0.0,
        message=str(error),
    )
    module = target.rpartition(":")[0]
    script = f'"""{name}: {error}"""\nimport importlib\n\nimportlib.import_module({module!r})\n'
    failure = Failure(check=name, message=str(error), case=case, reproducer=script, arrays={})
    return Report(target=target, kind=kind, results=[result], failures=[failure])


def _import(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no file {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
