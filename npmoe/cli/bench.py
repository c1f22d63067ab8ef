"""``npmoe bench``: time backends and peers beside the machine's limits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from npmoe import benchmark
from npmoe._cores import usable_cores
from npmoe._half import HALF_DTYPES, named_dtype
from npmoe.backends import Backend, available_backends, get_backend
from npmoe.benchmark.card import card_of
from npmoe.benchmark.implementations import Peer
from npmoe.benchmark.modelled_text import LEGEND as MODELLED_LEGEND
from npmoe.benchmark.threads import backend_with_threads, check_threads
from npmoe.cli._common import check_output, write_json
from npmoe.errors import BackendUnavailableError, RangeError

HELP = "time backends and peers beside the machine's limits"
DESCRIPTION = (
    "Time MoE layers on all usable backends and, where they are installed, on Hugging Face "
    "transformers with CPU torch, in turn in one run, beside the measured rates of matrix "
    "products and of reads from memory. A backend whose quick conformance run is red, or whose "
    "results differ from NumPy's, is not timed. Backends on a device are measured there, beside "
    "its own limits and peers on CUDA; hosts and devices are not mixed in one run."
)
_INSTALL_PEERS = "Run: pip install 'npmoe[parity]'"
_REMEDIES = {
    "torch-grouped_mm": "It needs a CUDA build of torch 2.10 or later, and transformers 5.",
    "triton-fused_moe": "It needs a CUDA build of torch, and vllm or sglang.",
}
_NOT_BY_DEFAULT = ("loopback",)  # a test of the plumbing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--case",
        nargs="+",
        action="extend",
        metavar="CASE",
        help=f"names or sizes T,H,I,E,K (all names: {', '.join(benchmark.CASES)})",
    )
    parser.add_argument(
        "--direction", choices=[*benchmark.DIRECTIONS, "both"], default="both", help="(both)"
    )
    parser.add_argument(
        *("--backends", "--backend"),
        metavar="A,B",
        help="names: on host arrays, or on one device (all that run here on host arrays)",
    )
    names, beside = (
        ", ".join(peer.name for peer in peers) for peers in (benchmark.PEERS, benchmark.CARD_PEERS)
    )
    parser.add_argument(
        "--peers",
        metavar="A,B",
        help=f"of {names}, on a device of {beside}, or none (all that are installed)",
    )
    parser.add_argument(
        "--precision", metavar="NAME", help="option of backends that have it (cupy: float32)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument(
        "--weights", choices=HALF_DTYPES, help="of the experts, beside float32 (as --dtype)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="at the most (7)")
    parser.add_argument(
        "--budget", type=float, default=20.0, metavar="S", help="seconds per case, direction (20)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of every implementation (usable cores)"
    )
    parser.add_argument(
        "--modelled",
        nargs="*",
        metavar="CARD",
        help="time nothing; print what cases would take at the least on cards that are not here, "
        f"MODELLED from data sheets and compiled kernels (all of: "
        f"{', '.join(benchmark.CARD_SHEETS)})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all samples to FILE")
    parser.add_argument("--plot", metavar="FILE", help="also draw the roofline picture, a PNG")


def run(options: argparse.Namespace) -> int:
    """Print a table per case and direction; 1 if something asked for was not timed."""
    check_output("--json", options.json)
    check_output("--plot", options.plot)
    settings = _settings(options)
    if options.modelled is not None:
        return _run_modelled(options, settings)
    _require_packages(with_picture=options.plot is not None)
    backends = _backends(options.backends, settings.threads, options.precision)
    on_host = card_of(backends) is None
    known = benchmark.PEERS if on_host else benchmark.CARD_PEERS
    peers, named = _peers(options.peers, known)
    with closing(_Bar()) as bar:

        def show(event: benchmark.CaseTimings | benchmark.Omission) -> None:
            if isinstance(event, benchmark.Omission):
                bar.print(benchmark.omission_text(event))
            else:
                bar.print("\n" + benchmark.table_text(event, settings))

        result = benchmark.run_benchmark(
            settings, backends, peers, asked_peers=named, on_event=show, progress=bar.update
        )
    legend = benchmark.legend_text(result.machine)
    print(f"\n{legend}\n\n{benchmark.machine_text(result.machine)}")
    write_json(options.json, result.to_dict())
    if options.plot is not None and result.cases:
        benchmark.plot_roofline(result, options.plot)
    print(benchmark.last_line(result))
    return 0 if result.complete else 1


def _run_modelled(options: argparse.Namespace, settings: benchmark.Settings) -> int:
    """Print modelled bounds, a table per case and direction."""
    for name in ("backends", "peers", "plot"):
        if getattr(options, name) is not None:
            raise RangeError(
                f"bench: --{name} must not come with --modelled, got {getattr(options, name)!r}. "
                "Nothing is timed then."
            )
    if settings.dtype != "float32":
        raise RangeError(
            f"bench: --dtype must be float32 with --modelled, got {settings.dtype}. Figures of "
            "other kernels are not kept."
        )
    names = options.modelled or list(benchmark.CARD_SHEETS)
    sheets = [benchmark.find_sheet(name) for name in names]
    precision = settings.precision or "float32"
    found = []
    for case in settings.cases:
        for direction in settings.directions:
            row = [
                benchmark.model_case(case, direction, sheet, precision, settings.weights)
                for sheet in sheets
            ]
            print(f"{benchmark.modelled_table(row)}\n")
            found += row
    print(MODELLED_LEGEND)
    write_json(options.json, benchmark.modelled_json(found))
    return 0


def _settings(options: argparse.Namespace) -> benchmark.Settings:
    if options.rounds < 1:
        raise RangeError(f"bench: --rounds must be at least 1, got {options.rounds}.")
    if not 0 < options.budget < float("inf"):
        raise RangeError(f"bench: --budget must be positive and finite, got {options.budget}.")
    if options.weights is not None:
        if options.dtype != "float32":
            raise RangeError(
                f"bench: --weights {options.weights} must come with --dtype float32, got "
                f"{options.dtype}. Sums are float32 with weights in half precision."
            )
        named_dtype("bench", options.weights, "numba")
    texts = list(benchmark.CASES) if options.case is None else options.case
    both = options.direction == "both"
    return benchmark.Settings(
        cases=tuple(benchmark.parse_case(text) for text in dict.fromkeys(texts)),
        directions=benchmark.DIRECTIONS if both else (options.direction,),
        dtype=options.dtype,
        weights=options.dtype if options.weights is None else options.weights,
        rounds=options.rounds,
        budget=options.budget,
        threads=check_threads(usable_cores() if options.threads is None else options.threads),
        precision=options.precision,
    )


def _backends(names: str | None, threads: int, precision: str | None = None) -> list[Backend]:
    """Return the backends that were named, or all that run here on host arrays."""
    if names is None:
        chosen = [
            name
            for name, found in available_backends().items()
            if found.ok and name not in _NOT_BY_DEFAULT and get_backend(name).host_arrays
        ]
    else:
        chosen = _split("backends", names)
    return [backend_with_threads(name, threads, precision) for name in chosen]


def _peers(names: str | None, peers: Sequence[Peer]) -> tuple[Sequence[Peer], frozenset[str]]:
    """Return peers, and the names of those that the user asked for."""
    if names is None:
        return peers, frozenset()
    if names == "none":
        return (), frozenset()
    known = {peer.name: peer for peer in peers}
    found = []
    for name in _split("peers", names):
        if name not in known:
            raise RangeError(
                f"bench: --peers must name known peers, got {name!r}. "
                f"Known: {', '.join(known)}, or none."
            )
        availability = known[name].availability()
        if not availability.ok:
            raise BackendUnavailableError(
                f"bench: peer {name!r} cannot run here: {availability.reason}. "
                f"{_REMEDIES.get(name, _INSTALL_PEERS)}"
            )
        found.append(known[name])
    return found, frozenset(peer.name for peer in found)


def _split(option: str, names: str) -> list[str]:
    """Return each of the names once."""
    found = [name.strip() for name in names.split(",")]
    if not all(found):
        raise RangeError(f"bench: --{option} must be names with commas between, got {names!r}.")
    return list(dict.fromkeys(found))


def _require_packages(*, with_picture: bool) -> None:
    """Raise before the work starts if a package is missing that its end would need."""
    for package in ("threadpoolctl", "tqdm", *(["matplotlib"] if with_picture else [])):
        try:
            __import__(package)
        except ImportError as error:
            raise BackendUnavailableError(
                f"bench: package {package} must be installed, got none. "
                "Run: pip install 'npmoe[cli]'"
            ) from error


class _Bar:
    """The progress bar on stderr, and lines on stdout that do not run into it.

    It appears with the first step, so that an error before it stands alone.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def update(self, what: str, share: float) -> None:
        """Say what is going on and which share of the run is done."""
        from tqdm import tqdm  # noqa: PLC0415

        if self._bar is None:
            seconds = 0.5 if sys.stderr.isatty() else 30.0  # short logs of unattended runs
            self._bar = tqdm(
                total=1.0,
                desc=what,
                mininterval=seconds,
                maxinterval=max(10.0, seconds),
                dynamic_ncols=True,
                leave=False,
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}",
            )
        self._bar.set_description_str(what, refresh=False)
        self._bar.update(share - self._bar.n)

    def print(self, text: str) -> None:
        """Print on stdout."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
