"""``npmoe info``: version, libraries and backends."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from npmoe import __version__
from npmoe.backends import available_backends
from npmoe.cli._common import check_output, print_table, write_json

HELP = "show versions, processor count and which backends can run here"
DESCRIPTION = "Show versions, processor count and which backends can run here, with the reason."
_PACKAGES = ("numpy", "safetensors", "threadpoolctl", "tqdm", "matplotlib", "hypothesis", "scipy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", metavar="FILE", help="also write the facts to FILE")


def run(options: argparse.Namespace) -> int:
    """Print the facts."""
    check_output("--json", options.json)
    packages = {name: _version(name) for name in _PACKAGES}
    backends = available_backends()
    print(f"npmoe {__version__}, Python {platform.python_version()}, {os.cpu_count()} processors")
    print("packages")
    print_table([(name, found or "not installed") for name, found in packages.items()])
    print("backends")
    print_table([(n, "usable" if a.ok else f"not here: {a.reason}") for n, a in backends.items()])
    write_json(
        options.json,
        {
            "version": __version__,
            "packages": packages,
            "backends": {n: {"ok": a.ok, "reason": a.reason} for n, a in backends.items()},
        },
    )
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
