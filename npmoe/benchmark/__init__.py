"""Backends and peers timed in turn, beside the machine's limits; see README.md."""

from npmoe.benchmark.cases import CASES, DIRECTIONS, Case, Direction, parse_case
from npmoe.benchmark.peers import PEERS
from npmoe.benchmark.picture import plot_roofline
from npmoe.benchmark.result import BenchmarkResult, CaseTimings, Omission, Settings
from npmoe.benchmark.run import run_benchmark
from npmoe.benchmark.text import last_line, machine_text, omission_text, table_text

__all__ = [
    "CASES",
    "DIRECTIONS",
    "PEERS",
    "BenchmarkResult",
    "Case",
    "CaseTimings",
    "Direction",
    "Omission",
    "Settings",
    "last_line",
    "machine_text",
    "omission_text",
    "parse_case",
    "plot_roofline",
    "run_benchmark",
    "table_text",
]
