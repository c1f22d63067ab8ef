"""``npmoe conventions``: what routing, balance loss and capacity mean, computed side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from npmoe.cli._common import check_output, write_json
from npmoe.conventions import balance_text, capacity_text, routing_text, tables_as_values

HELP = "compare the conventions of routing, balance losses and capacity, computed"
DESCRIPTION = (
    "Print the conventions in circulation, each with the fields of MoEConfig that give it and with "
    "the numbers that it computes on one small example."
)
_TABLES: dict[str, Callable[[], str]] = {
    "routing": routing_text,
    "balance": balance_text,
    "capacity": capacity_text,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("table", nargs="?", choices=tuple(_TABLES), help="only this one (all)")
    parser.add_argument("--json", metavar="FILE", help="also write the tables to FILE")


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    check_output("--json", options.json)
    names = tuple(_TABLES) if options.table is None else (options.table,)
    print("\n\n".join(_TABLES[name]() for name in names))
    values = tables_as_values()
    write_json(options.json, {name: values[name] for name in names})
    return 0
