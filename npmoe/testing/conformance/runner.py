"""Run a kind's checks on one subject, shrink what fails, and write down how to see it again."""

from __future__ import annotations

import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from npmoe._half import HALF_DTYPES, named_dtype
from npmoe._typing import HostArray
from npmoe.errors import RangeError
from npmoe.testing.conformance.case import Case, Check, Effort, Finding, Kind
from npmoe.testing.conformance.report import CheckResult, Failure, Report, Status
from npmoe.testing.conformance.subject import Subject

_SHRINKS = 400  # calls spent on making a failing case smaller
_COSTLY_SHRINKS = 4
_CASES = {True: 6, False: 30}
_BYTES = "[np.asarray(x).tobytes() for x in arguments]"
_HALF_NOTE = "expert weights in {}, all else float32; what they do not meet is left to float32."
COMPARISON = """\
for i in range(sum(key.startswith("expected") for key in d)):
    value, want = np.asarray(got[i]), d[f"expected{i}"]
    value = value.reshape(()) if want.ndim == 0 else value
    assert value.shape == want.shape, (i, value.shape, want.shape)
    assert d[f"dtype{i}"] in ("", str(value.dtype)), (i, value.dtype)
    ok = (value == want) | (np.abs(value - want.astype(float)) <= d[f"bound{i}"])
    ok |= np.isinf(d[f"bound{i}"])
    assert ok.all(), f"output {i}: got\\n{value}\\nexpected\\n{want}"
"""


class Settings(TypedDict, total=False):
    """Keywords that every ``check_...`` function takes; see `run_checks`."""

    name: str | None
    array: str | Callable[[HostArray], Any]
    dtype: str
    quick: bool
    seed: int
    expected_failed_checks: dict[str, str] | None
    only: Iterable[str] | None
    stop: bool
    progress: Callable[[str], None] | None


def run_checks(
    kind: Kind,
    function: Callable[..., Any],
    *,
    name: str | None = None,
    array: str | Callable[[HostArray], Any] = "numpy",
    dtype: str = "float32",
    quick: bool = False,
    seed: int = 0,
    expected_failed_checks: dict[str, str] | None = None,
    only: Iterable[str] | None = None,
    stop: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run the checks of a kind.

    Parameters
    ----------
    kind : Kind
    function : callable
        Of the kind's signature.
    name : str, optional
        For the report; "module:function" by default.
    array : {"numpy", "torch", "cupy"} or callable
        Array type of the subject.
    dtype : {"float32", "float64"}
        Of all floating arguments. A backend also takes "float16" and "bfloat16": expert weights
        in half precision and everything else float32; only checks that meet them are run.
    quick : bool
        A fifth of the cases.
    seed : int
        Of the cases.
    expected_failed_checks : dict of str to str, optional
        Known failures with their reasons; one that passes is a failure of the ledger.
    only : iterable of str, optional
        Names of the checks to run, in this order.
    stop : bool
        Stop at the first failure.
    progress : callable, optional
        Called with every check's name before it runs.

    Returns
    -------
    Report

    Raises
    ------
    RangeError
        For an unknown check, dtype or seed.
    BackendUnavailableError
        If a package is missing: that of the array type, or ml_dtypes for "bfloat16".
    """
    known = expected_failed_checks or {}
    *others, last = dict.fromkeys(d for check in kind.checks for d in check.dtypes)
    if dtype not in (*others, last):
        raise RangeError(
            f"check_{kind.name}: dtype must be {', '.join(map(repr, others))} or {last!r}, got "
            f"{dtype!r}."
        )
    by_name = {check.name: check for check in kind.checks if dtype in check.dtypes}
    order = list(by_name) if only is None else list(only)
    every = {check.name for check in kind.checks}
    for given in (*(name for name in known if name not in every), *order):
        if given not in by_name:
            raise RangeError(
                f"check_{kind.name}: check must be a known name, got {given!r}. "
                f"Known{f' for {dtype}' if given in every else ''}: {', '.join(by_name)}."
            )
    half = named_dtype(f"check_{kind.name}", dtype, "test").name if dtype in HALF_DTYPES else None
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RangeError(f"check_{kind.name}: seed must be an integer >= 0, got {seed!r}.")
    subject = Subject(function, name or _name_of(function), array)
    effort = Effort(cases=_CASES[quick], quick=quick, dtype="float32" if half else dtype, half=half)
    results: list[CheckResult] = []
    failures: list[Failure] = []
    for check in (by_name[n] for n in order):
        if stop and failures:
            results.append(_result(check, "not run", 0, 0.0))
            continue
        if progress is not None:
            progress(check.name)
        start = time.perf_counter()
        failure, tried = _run(kind, check, subject, effort, seed)
        status: Status = "passed" if failure is None else "failed"
        message = "" if failure is None else failure.message
        if check.name in known:
            status = "unexpected pass" if failure is None else "expected failure"
            message = message or f"the ledger says it fails: {known[check.name]}"
        elif failure is not None:
            failures.append(failure)
        results.append(_result(check, status, tried, time.perf_counter() - start, message))
    return Report(
        target=subject.name,
        kind=kind.name,
        results=results,
        failures=failures,
        notes=[_HALF_NOTE.format(half)] if half else [],
        known=tuple(by_name),
    )


def _run(
    kind: Kind, check: Check, subject: Subject, effort: Effort, seed: int
) -> tuple[Failure | None, int]:
    """Return the shrunk failure of one check, if there is one, and the number of cases tried."""
    rng = np.random.default_rng((seed, zlib.crc32(check.name.encode())))
    tried = 0
    for case in check.cases(rng, effort):
        tried += 1
        finding = judge(kind, check, subject, case)
        if finding is not None:
            smallest, finding = _shrink(kind, check, subject, case, finding)
            return _failure(kind, check, subject, smallest, finding), tried
    return None, tried


def judge(kind: Kind, check: Check, subject: Subject, case: Case) -> str | None:
    """Return what is wrong with one case, or None."""

    def call(one: Case) -> tuple[HostArray, ...]:
        return subject.call(one, kind.expected(one))

    try:
        check.judge(call, case)
    except Finding as finding:
        return str(finding)
    return None


def _shrink(
    kind: Kind, check: Check, subject: Subject, case: Case, finding: str
) -> tuple[Case, str]:
    """Return the smallest case found that fails the same check in the same way."""
    calls, smaller, sort = 0, True, _sort_of(finding)
    # A child process that hangs or dies costs a time limit or a new start for every call.
    most = _COSTLY_SHRINKS if re.search(r"got (Hang|Died):", finding) else _SHRINKS
    while smaller and calls < most:
        smaller = False
        for candidate in kind.reductions(case):
            calls += 1
            found = judge(kind, check, subject, candidate)
            if found is not None and _sort_of(found) == sort:
                case, finding, smaller = candidate, found, True
                break
            if calls >= most:
                break
    return case, finding


def _sort_of(finding: str) -> str:
    """Return a finding without its numbers: a smaller case must not fail for another reason."""
    return re.sub(r"[-+]?(\d[\d.e+-]*|nan|inf)", "#", finding)[:60]


def _failure(kind: Kind, check: Check, subject: Subject, case: Case, finding: str) -> Failure:
    expected = kind.expected(case)
    arrays: dict[str, Any] = {f"arg{i}": v for i, v in enumerate(case.arguments.values())}
    arrays = {n: np.asarray(np.nan if v is None else v) for n, v in arrays.items()}
    for i, want in enumerate(expected):
        arrays[f"expected{i}"] = want.value
        arrays[f"dtype{i}"] = np.asarray(want.dtype or "")
        bound = np.zeros(want.value.shape) if want.bound is None else want.bound
        free = np.zeros(want.value.shape, bool) if want.free is None else want.free
        arrays[f"bound{i}"] = np.where(free, np.inf, bound)
    return Failure(
        check=check.name,
        message=finding,
        case=case,
        reproducer=_script(kind, check, subject, case, finding),
        arrays=arrays,
    )


def _script(kind: Kind, check: Check, subject: Subject, case: Case, finding: str) -> str:
    module, _, function = subject.name.partition(":")
    folder = "."
    if module.endswith(".py"):
        folder, module = str(Path(module).parent), Path(module).stem
    load = []
    for i, (name, value) in enumerate(case.arguments.items()):
        if isinstance(value, np.ndarray):
            # NumPy's files know its size and no more.
            part = f"d['arg{i}']{'.view(ml_dtypes.bfloat16)' if _is_brain(value) else ''}"
            if not value.flags.c_contiguous:  # as the subject gets it
                part = f"np.repeat({part}, 2, axis=-1)[..., ::2]"
            if subject.array == "torch":
                part = f"torch.from_numpy({part})"
            elif subject.array == "cupy":
                part = f"cupy.asarray({part})"
        else:
            part = repr(value)
        load.append(f"{name}={part}")
    imports = {"torch": "import torch\n", "cupy": "import cupy\n"}.get(str(subject.array), "")
    if any(map(_is_brain, case.arguments.values())):
        imports = f"import ml_dtypes\n{imports}"
    values = ", ".join(part.partition("=")[2] for part in load)
    names = ", ".join(case.arguments)
    written = "[]" if subject.array == "cupy" else _BYTES
    judged = check.script or kind.script
    frozen = "[x.setflags(write=False) for x in arguments if isinstance(x, np.ndarray)]\n"
    arrays = [v for v in case.arguments.values() if isinstance(v, np.ndarray)]
    return f'''"""{check.name}: {finding}

Case: {case.note}. Arguments: {names}.
"""
import importlib
import sys
from pathlib import Path

import numpy as np
{imports}
sys.path.insert(0, {folder!r})
d = np.load(Path(__file__).with_suffix(".npz"))
target = importlib.import_module({module!r}).{function}
# Memory that was never written should not look like zeros.
junk = [np.full(max(1, v.size), np.nan) for n, v in d.items() if n.startswith("expected")]
del junk
arguments = ({values},)
{"" if all(v.flags.writeable for v in arrays) else frozen}\
before = {written}
got = target(*arguments)
assert {written} == before, "arguments were written to"
got = got if isinstance(got, (tuple, list)) else (got,)
{COMPARISON if judged is None else judged(case)}'''


def _is_brain(value: Any) -> bool:
    """Return whether an argument is an array of bfloat16."""
    return isinstance(value, np.ndarray) and value.dtype.name == "bfloat16"


def _result(
    check: Check, status: Status, cases: int, seconds: float, message: str = ""
) -> CheckResult:
    return CheckResult(
        name=check.name,
        about=check.about,
        status=status,
        cases=cases,
        seconds=seconds,
        message=message,
    )


def _name_of(function: Callable[..., Any]) -> str:
    module = getattr(function, "__module__", None) or type(function).__module__
    main = getattr(sys.modules["__main__"], "__file__", None)
    if module == "__main__" and main is not None:
        module = os.path.relpath(main)
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"
