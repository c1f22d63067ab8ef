"""Backends and peers timed in turn, beside the machine's limits; see README.md."""

from npmoe.benchmark.card_peers import CARD_PEERS
from npmoe.benchmark.card_sheets import CARD_SHEETS, CardSheet, find_sheet
from npmoe.benchmark.cases import CASES, DIRECTIONS, Case, Direction, parse_case
from npmoe.benchmark.modelled import ModelledCase, ModelledLaunch, model_case
from npmoe.benchmark.modelled_text import modelled_json, modelled_table
from npmoe.benchmark.peers import PEERS
from npmoe.benchmark.picture import plot_roofline
from npmoe.benchmark.result import BenchmarkResult, CaseTimings, Omission, Settings
from npmoe.benchmark.run import run_benchmark
from npmoe.benchmark.text import last_line, legend_text, machine_text, omission_text, table_text

__all__ = [
    "CARD_PEERS",
    "CARD_SHEETS",
    "CASES",
    "DIRECTIONS",
    "PEERS",
    "BenchmarkResult",
    "CardSheet",
    "Case",
    "CaseTimings",
    "Direction",
    "ModelledCase",
    "ModelledLaunch",
    "Omission",
    "Settings",
    "find_sheet",
    "last_line",
    "legend_text",
    "machine_text",
    "model_case",
    "modelled_json",
    "modelled_table",
    "omission_text",
    "parse_case",
    "plot_roofline",
    "run_benchmark",
    "table_text",
]
