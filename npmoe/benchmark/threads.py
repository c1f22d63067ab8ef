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


def backend_with_threads(name: str, threads: int) -> Backend:
    """Return a backend that uses `threads` threads, if its class has such an option."""
    backend = get_backend(name)
    if "num_threads" in inspect.signature(type(backend)).parameters:
        return get_backend(name, num_threads=threads)
    return backend
