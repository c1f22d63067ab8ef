"""The same number of threads for everybody."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from npmoe._cores import usable_cores
from npmoe.backends import Backend, get_backend
from npmoe.errors import BackendUnavailableError, RangeError


def check_threads(threads: int) -> int:
    """Return `threads`, or raise RangeError unless that many cores can be used."""
    cores = usable_cores()
    if not 1 <= threads <= cores:
        raise RangeError(
            f"bench: --threads must lie in 1..{cores}, got {threads}. "
            f"This process may use {cores} core{'s' if cores > 1 else ''}."
        )
    return threads


@contextmanager
def limit_threads(threads: int) -> Iterator[None]:
    """Give NumPy's BLAS, OpenMP and, if it is loaded, torch this many threads.

    Raises
    ------
    BackendUnavailableError
        If threadpoolctl is not installed.
    """
    try:
        from threadpoolctl import threadpool_limits  # noqa: PLC0415
    except ImportError as error:
        raise BackendUnavailableError(
            "bench: package threadpoolctl must be installed, got none. "
            "Run: pip install 'npmoe[cli]'"
        ) from error
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    with threadpool_limits(limits=threads):
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def backend_with_threads(name: str, threads: int, precision: str | None = None) -> Backend:
    """Return a backend that uses `threads` threads, if its class has such an option.

    Raises
    ------
    RangeError
        If a precision is given, and the class has no option for it.
    """
    backend = get_backend(name)
    known = inspect.signature(type(backend)).parameters
    options: dict[str, object] = {"num_threads": threads} if "num_threads" in known else {}
    if precision is not None:
        if "precision" not in known:
            raise RangeError(
                f"bench: --precision must come with backends that have this option, got "
                f"{precision!r} for {name!r}. Leave one of them out."
            )
        options["precision"] = precision
    return get_backend(name, **options) if options else backend
