"""The kit as pytest: one test per named check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from npmoe.testing.conformance.registry import check_function, kind_of
from npmoe.testing.conformance.report import Report


class OneCheck:
    """A check of one subject, ready to run; its text is the test's name."""

    def __init__(self, kind: str, check: str, run: Callable[[], Report]) -> None:
        self.kind, self.check, self._run = kind, check, run

    def __str__(self) -> str:
        return f"{self.kind}-{self.check}"

    def __call__(self) -> None:
        """Raise AssertionError with the readable report if the check fails."""
        report = self._run()
        if not report.passed:
            raise AssertionError(f"\n{report}")


def parametrize_with_checks(
    subjects: Iterable[Any],
    *,
    expected_failed_checks: dict[str, str] | None = None,
    **options: Any,
) -> Any:
    """Return a pytest decorator that runs every check of every subject as a test of its own.

    Parameters
    ----------
    subjects : iterable
        Pairs (kind, subject), names or instances of backends, or functions whose kind is clear
        from their arguments: ``[("align", my_align), "numpy", my_combine]``.
    expected_failed_checks : dict of str to str, optional
        Known failures with reasons: strict expected failures (xfail) in pytest.
    **options
        Keywords of the ``check_...`` functions.

    Returns
    -------
    pytest.MarkDecorator
        For a test function with one argument, ``check``, that calls it.

    Examples
    --------
    ``@parametrize_with_checks([("align", my_align)])`` over ``def test_align(check): check()``.
    """
    import pytest  # noqa: PLC0415  # extra test

    known = expected_failed_checks or {}
    cases = []
    for kind, subject in map(_with_kind, subjects):
        check = check_function(kind)
        for name in check_names(kind, subject, **options):

            def run(check: Any = check, subject: Any = subject, name: str = name) -> Report:
                report: Report = check(subject, only=[name], **options)
                return report

            marks = [pytest.mark.xfail(reason=known[name], strict=True)] if name in known else []
            cases.append(pytest.param(OneCheck(kind, name, run), id=f"{kind}-{name}", marks=marks))
    return pytest.mark.parametrize("check", cases)


def _with_kind(subject: Any) -> tuple[str, Any]:
    """Return (kind, subject)."""
    if isinstance(subject, tuple):
        kind, function = subject
        return kind, function
    if isinstance(subject, str) or hasattr(subject, "accelerates"):
        return "backend", subject
    return kind_of(subject), subject


def check_names(kind: str, subject: Any, **options: Any) -> list[str]:
    """Return the names of the checks of a kind, without running them."""
    return list(check_function(kind)(subject, only=[], **options).known)
