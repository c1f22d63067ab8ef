"""``npmoe check``: prove or break a function or a backend."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npmoe.backends import get_backend, get_emulated_backend
from npmoe.backends.registry import backend_options
from npmoe.cli._common import check_output, write_json, write_output
from npmoe.errors import DataError, RangeError
from npmoe.testing.conformance.case import WITH_HALVES
from npmoe.testing.conformance.isolate import IsolatedTarget
from npmoe.testing.conformance.page import html_page
from npmoe.testing.conformance.registry import (
    KINDS,
    check_function,
    kind_of,
    required_arguments,
)
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.targets import (
    TargetNotUsable,
    check_arguments,
    load_target,
    unusable_report,
)
from npmoe.testing.faults.matrix import Kill, all_faults, kill_matrix

HELP = "prove or break a function or a backend"
DESCRIPTION = (
    "Run named checks on a target: 'module:function', 'file.py:function' or the name of a backend. "
    "A failing case is made as small as it gets and written with a script that shows it."
)
_NOT_COVERED = "hangs and deaths of the process are not covered; use --isolate."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("target", nargs="?", metavar="TARGET", help="what to check")
    parser.add_argument(
        "--as",
        dest="kind",
        metavar="KIND",
        choices=[*KINDS, "backend"],
        help=f"what TARGET is (told by its arguments): {', '.join([*KINDS, 'backend'])}",
    )
    parser.add_argument("--faults", action="store_true", help="run the kit on planted mistakes")
    parser.add_argument(
        "--emulate",
        nargs="?",
        const="in-order",
        metavar="ORDER",
        help="run a GPU backend's kernels on the CPU, thread by thread, under all checkers; "
        "threads in-order, reversed, or at random with a seed (in-order)",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="of a GPU backend's products: float32, tf32, bfloat16 or float16 (its default)",
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the cases")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=WITH_HALVES,
        help="of floats (float32); half precision is that of a backend's expert weights",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the cases (0)")
    parser.add_argument(
        "--array",
        default="numpy",
        choices=("numpy", "torch", "cupy"),
        help="what a function is called with (numpy)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the check: dialect=sglang, convention=topk_softmax",
    )
    parser.add_argument("--isolate", action="store_true", help="call the target in a child process")
    parser.add_argument(
        "--time-limit", type=float, default=10.0, metavar="S", help="of one call, isolated (10)"
    )
    parser.add_argument("--ledger", metavar="FILE", help="JSON of known failures: {check: reason}")
    parser.add_argument("--out", metavar="DIR", help="write failing cases and scripts to DIR")
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--html", metavar="FILE", help="also write one self-contained page to FILE")


def run(options: argparse.Namespace) -> int:
    """Print the table; 1 if a check failed or a planted mistake survived."""
    check_output("--json", options.json)
    check_output("--html", options.html)
    if (options.target is None) != options.faults:
        raise RangeError("check: TARGET or --faults must be given, and not both.")
    kills: list[Kill] = []
    reports: list[Report] = []
    emulation: dict[str, Any] = {}
    if options.faults:
        kills = _run_faults(options)
        ok = all(k.by_name for k in kills)
    else:
        reports = [_check(options, emulation)]
        ok = reports[0].passed
        print(reports[0])
        _write_cases(options.out, reports[0])
    write_json(
        options.json,
        {
            "passed": ok,
            "reports": [r.to_dict() for r in reports],
            "faults": [
                {"name": k.fault.name, "kind": k.fault.kind, "killed_by": k.killed_by}
                for k in kills
            ],
            **emulation,
        },
    )
    if options.html is not None:
        write_output("--html", options.html, html_page(reports, kills))
    return 0 if ok else 1


def _check(options: argparse.Namespace, emulation: dict[str, Any]) -> Report:
    target: str = options.target
    settings: dict[str, Any] = {
        "quick": options.quick,
        "seed": options.seed,
        "dtype": options.dtype,
        "expected_failed_checks": _ledger(options.ledger),
    }
    if options.kind == "backend" or (options.kind is None and ":" not in target):
        settings |= _settings("backend", options.set)
        chosen: dict[str, Any] = {}
        if options.precision is not None:
            _require_option(target, "precision")
            chosen["precision"] = options.precision
        if options.emulate is not None:
            return _check_emulated(target, options.emulate, chosen, settings, emulation)
        backend = get_backend(target, **chosen) if chosen else target
        with _progress() as say:
            return check_function("backend")(backend, progress=say, **settings)
    for option in ("emulate", "precision"):
        if getattr(options, option) is not None:
            raise RangeError(
                f"check: TARGET must be the name of a GPU backend with --{option}, got {target!r}."
            )
    kind = options.kind or "unknown"
    try:
        function = load_target(target)
        if options.kind is None:
            kind = kind_of(function)
        if kind in KINDS:
            check_arguments(function, required_arguments(kind))
    except TargetNotUsable as error:
        return unusable_report(target, kind, error)
    settings |= _settings(kind, options.set)
    isolated = None
    if options.isolate:
        isolated = function = IsolatedTarget(
            target, array=options.array, seconds=options.time_limit
        )
        settings["array"] = "numpy"
    else:
        settings["array"] = options.array
    try:
        with _progress() as say:
            report = check_function(kind)(function, name=target, progress=say, **settings)
    finally:
        if isolated is not None:
            isolated.close()
    if isolated is None:
        report.notes.append(_NOT_COVERED)
    return report


def _require_option(name: str, option: str) -> None:
    """Raise unless a backend has a keyword."""
    if option not in backend_options(name):
        raise RangeError(
            f"check: --{option} must come with a backend that has one, got {name!r}. "
            f"Its options: {', '.join(backend_options(name)) or 'none'}."
        )


def _check_emulated(
    name: str,
    order: str,
    chosen: dict[str, Any],
    settings: dict[str, Any],
    emulation: dict[str, Any],
) -> Report:
    """Check a backend's kernels without their device, and tell what of them ran."""
    schedule = int(order) if order.isdigit() else order
    if schedule not in ("in-order", "reversed") and not isinstance(schedule, int):
        raise RangeError(f"check: --emulate must be in-order, reversed or a seed, got {order!r}.")
    backend: Any = get_emulated_backend(name, schedule=schedule, **chosen)
    with _progress() as say:
        report = check_function("backend")(backend, progress=say, **settings)
    emulation |= backend.emulator.summary()
    covered = emulation["coverage"].values()
    report.notes.append(
        f"emulated, threads {order}: {sum(c['launches'] for c in covered)} launches of "
        f"{len(covered)} compiled kernels, {len(emulation['findings'])} findings; least coverage "
        f"of a kernel's PTX {min((c['fraction'] for c in covered), default=1.0):.0%}. Not shown "
        "by this: the step from PTX to machine code, weak memory ordering, speed."
    )
    return report


def _run_faults(options: argparse.Namespace) -> list[Kill]:
    kills = []
    with _progress(len(all_faults())) as say:
        for kill in kill_matrix(quick=True, seed=options.seed, progress=say):
            kills.append(kill)
    width = max(len(k.fault.name) for k in kills)
    for k in kills:
        mark = "" if k.by_name else "  <- expected " + k.fault.check
        print(f"  {k.fault.name:<{width}}  {k.killed_by or 'SURVIVED'}{mark}")
    named = sum(k.by_name for k in kills)
    seconds = sum(k.seconds for k in kills)
    print(
        f"{named} of {len(kills)} planted mistakes found by the check that names them "
        f"({seconds:.0f} s)"
    )
    return kills


def _settings(kind: str, pairs: list[str]) -> dict[str, Any]:
    """Return NAME=VALUE pairs as keywords of a check; values are JSON where they parse as such."""
    found: dict[str, Any] = {}
    known = list(inspect.signature(check_function(kind)).parameters)[1:-1]
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise RangeError(f"check: --set must be NAME=VALUE, got {pair!r}.")
        if name not in known:
            raise RangeError(
                f"check: --set must name an option of check_{kind}, got {name!r}. "
                f"Options: {', '.join(known) or 'none'}."
            )
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def _ledger(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--ledger: {path} must be readable JSON, got {error}.") from error
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise DataError(f"--ledger: {path} must hold {{check: reason}}, got {values!r}.")
    return values


def _write_cases(folder: str | None, report: Report) -> None:
    if not report.failures:
        return
    where = Path(folder or "npmoe-check")
    for script in report.write(where):
        print(f"reproduce: python {script}")


@contextmanager
def _progress(total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show what is running, on a terminal that has tqdm."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from tqdm import tqdm  # noqa: PLC0415  # extra cli
    except ImportError:
        yield lambda name: print(f"\r{name:<60}", end="", file=sys.stderr, flush=True)
        return
    with tqdm(total=total, unit="check", leave=False) as bar:

        def say(name: str) -> None:
            bar.set_description_str(name)
            bar.update(1)

        yield say
