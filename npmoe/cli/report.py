"""``npmoe report``: one HTML page about a training run."""

from __future__ import annotations

import argparse
from pathlib import Path

from npmoe.reporting import write_report
from npmoe.training.files import RunFolder

HELP = "write one HTML page about a training run"
DESCRIPTION = (
    "Write one self-contained HTML page about a run, finished or not: curves, the load of every "
    "expert, dead experts, the plan of a step, specialisation. It needs no server and no network."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="RUN", help="run folder, as `npmoe train` printed it")
    parser.add_argument("--step", type=int, metavar="N", help="whose plan to show (the last)")
    parser.add_argument(
        "--block-size", type=int, default=64, metavar="B", help="rows per block of the plan (64)"
    )
    parser.add_argument("--out", metavar="FILE", help="(RUN/report.html)")


def run(options: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    folder = RunFolder(options.folder)
    path = folder.path / "report.html" if options.out is None else Path(options.out)
    write_report(folder, path, step=options.step, block_size=options.block_size)
    print(path)
    return 0
