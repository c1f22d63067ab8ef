"""``npmoe gradcheck``: every gradient of small full models against finite differences."""

from __future__ import annotations

import argparse
import functools
import sys

from npmoe.cli._common import check_output, print_table, write_json
from npmoe.layer_gradcheck import gradcheck_layer, gradcheck_layers
from npmoe.models import host_backend
from npmoe.models.gradcheck import gradcheck_model, gradcheck_models

HELP = "check every hand-written gradient against finite differences"
DESCRIPTION = (
    "Compare every gradient of small full models and layers with fourth-order central "
    "differences in float64, along random directions, and print the worst relative errors."
)
TOLERANCE = 1e-7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--seed", type=int, default=0, help="of parameters and directions (0)")
    parser.add_argument(
        "--directions", type=int, default=2, metavar="N", help="directions per parameter (2)"
    )
    parser.add_argument("--backend", help="of the MoE layers (numpy); 'numba' runs attention too")
    parser.add_argument("--json", metavar="FILE", help="also write the errors to FILE")


def run(options: argparse.Namespace) -> int:
    """Print the worst relative error of every parameter; 1 if one exceeds the tolerance."""
    check_output("--json", options.json)
    backend = host_backend("gradcheck", options.backend)
    found: dict[str, dict[str, float]] = {}
    check = {"seed": options.seed, "directions": options.directions, "backend": backend}
    runs = [
        *(
            (f"model: {t}", functools.partial(gradcheck_model, c))
            for t, c in gradcheck_models().items()
        ),
        *(
            (f"layer: {t}", functools.partial(gradcheck_layer, c))
            for t, c in gradcheck_layers().items()
        ),
    ]
    for title, run_check in runs:
        errors = run_check(**check)
        print(title)
        print_table([(name, _verdict(error)) for name, error in errors.items()])
        found[title] = errors
    worst, title, name = max(
        ((error, title, name) for title, errors in found.items() for name, error in errors.items()),
        # NaN is the worst of all.
        key=lambda entry: (not entry[0] <= TOLERANCE, entry[0]),
    )
    ok = worst <= TOLERANCE
    print(
        f"worst relative error {worst:.1e} at {name} ({title}); "
        f"{'within' if ok else 'ABOVE'} the tolerance of {TOLERANCE:.0e}"
    )
    write_json(
        options.json,
        {"worst_relative_error": worst, "tolerance": TOLERANCE, "ok": ok, "errors": found},
    )
    if not ok:
        print("npmoe gradcheck: error: a gradient is wrong.", file=sys.stderr)
    return 0 if ok else 1


def _verdict(error: float) -> str:
    return f"{error:.1e}" + ("" if error <= TOLERANCE else "  WRONG")
