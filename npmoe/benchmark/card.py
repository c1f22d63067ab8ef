"""The device that backends compute on, as far as the namespace of its arrays tells of it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from npmoe._typing import Array, array_namespace
from npmoe.backends import Backend
from npmoe.errors import UnsupportedError

_POOL = "growth of CuPy's memory pool, emptied before, in blocks of 512 bytes"


def card_of(backends: Sequence[Backend]) -> Card | None:
    """Return the device of the backends, or None if all work on host arrays.

    Raises
    ------
    UnsupportedError
        If some do and some do not.
    """
    on_card = [backend for backend in backends if not backend.host_arrays]
    if not on_card:
        return None
    on_host = [backend.name for backend in backends if backend.host_arrays]
    if on_host:
        raise UnsupportedError(
            "bench: backends must all work on host arrays, or all on a device, got "
            f"{', '.join(on_host)} beside {', '.join(b.name for b in on_card)}. Each place has "
            "limits and peers of its own; run it once for each."
        )
    return Card(on_card[0])


class Card:
    """Arrays, waiting, memory and name of the device behind a backend.

    What only CuPy can tell is unknown with another namespace of arrays. A backend whose arrays
    have none is measured with CuPy beside it.

    Parameters
    ----------
    backend : Backend
        With ``host_arrays`` False.

    Raises
    ------
    UnsupportedError
        If its arrays have no namespace, and CuPy is not installed.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._xp = _namespace(backend)
        self._is_cupy = getattr(self._xp, "__name__", "") == "cupy"

    @property
    def name(self) -> str:
        """Say which device it is."""
        if not self._is_cupy:
            return f"the device of {self._backend.name}"
        runtime = self._xp.cuda.runtime
        device = self._xp.cuda.Device()
        found = runtime.getDeviceProperties(device.id)["name"].decode()
        version = runtime.runtimeGetVersion()
        capability = device.compute_capability
        return (
            f"{found}, compute capability {capability[:-1]}.{capability[-1]}, CUDA "
            f"{version // 1000}.{version % 1000 // 10}, CuPy {self._xp.__version__}"
        )

    @property
    def memory_text(self) -> str:
        """Say how memory is measured, or why it is not."""
        return _POOL if self._is_cupy else "not measured: its arrays come from no pool of CuPy's"

    def asarray(self, x: Any) -> Array:
        """Copy x to the device."""
        return self._xp.asarray(x)

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        if self._is_cupy:
            self._xp.cuda.Device().synchronize()
        else:
            self._backend.synchronize()

    def free_bytes(self) -> int | None:
        """Return the bytes that can be allocated, or None if unknown."""
        if not self._is_cupy:
            return None
        pool = self._xp.get_default_memory_pool()
        return int(self._xp.cuda.runtime.memGetInfo()[0] + pool.free_bytes())

    def peak(self, call: Callable[[], object]) -> int | None:
        """Return by how many bytes the pool grows during a call, or None if there is none.

        The pool takes memory of the device only where no free block of its own is large enough;
        it is emptied first, so that what it takes is the call's peak.
        """
        if not self._is_cupy:
            return None
        pool = self._xp.get_default_memory_pool()
        self.synchronize()
        pool.free_all_blocks()
        before = pool.total_bytes()
        result = call()
        self.synchronize()
        grown = int(pool.total_bytes() - before)
        del result
        return grown

    @contextlib.contextmanager
    def products(self, *, tf32: bool) -> Iterator[None]:
        """Let products of float32 arrays use TF32, or not, whatever the environment says."""
        if not self._is_cupy:
            yield
            return
        # The only way to say it that does not depend on when CUPY_TF32 was read.
        linalg = importlib.import_module("cupy._core._routines_linalg")
        dtype = np.dtype(np.float32)
        before = linalg.get_compute_type(dtype)
        wanted = linalg.COMPUTE_TYPE_TF32 if tf32 else linalg.COMPUTE_TYPE_DEFAULT
        linalg.set_compute_type(dtype, wanted)
        try:
            yield
        finally:
            linalg.set_compute_type(dtype, before)


def _namespace(backend: Backend) -> Any:
    """Return the module whose functions take the backend's arrays, or CuPy."""
    x = backend.asarray(np.zeros(1, np.float32))
    if hasattr(x, "__array_namespace__"):
        return array_namespace(x)
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UnsupportedError(
            f"bench: the limits of a device must be measured with CuPy, which cannot be imported "
            f"({error}). Backend {backend.name!r} has no matrix products of its own for it. "
            "Run: pip install 'npmoe[cuda13]' (or [cuda12])."
        ) from error
