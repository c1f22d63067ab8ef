"""Arrays and launches of CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from npmoe._typing import Array, HostArray
from npmoe.backends import Availability
from npmoe.errors import BackendUnavailableError, NpmoeError, UnsupportedError

from ..device.kernel import InOut, Kernel, Out, Size
from ..device.source import compiler_options, read_source

_OLDEST = (8, 0)  # the first architecture with cp.async
_STATIC_SHARED = 48 * 1024  # more must be asked for


class LaunchError(NpmoeError):
    """What CUDA says of a launch, with the kernel and its configuration."""


def cupy_availability() -> Availability:
    """Say whether CuPy, a driver and a device of a known architecture are there."""
    try:
        cupy = _cupy()
    except BackendUnavailableError as error:
        return Availability(False, str(error))
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return Availability(False, f"CuPy is installed, but CUDA says: {error}")
    if not count:
        return Availability(False, "CuPy is installed, but there is no CUDA device")
    found = cupy.cuda.Device().compute_capability
    version = int(found[:-1]), int(found[-1])
    if version < _OLDEST:
        return Availability(
            False, f"the device has compute capability {version[0]}.{version[1]}, 8.0 is needed"
        )
    return Availability(True)


def _cupy() -> Any:
    try:
        import cupy  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise BackendUnavailableError(
            f"the package cupy is not installed ({error}). "
            "Install it with: pip install 'npmoe[cuda13]' (or [cuda12])"
        ) from error
    return cupy


class CupyDevice:
    """CuPy's current device at the time this was made; work goes to CuPy's current stream."""

    label = "cupy"

    def __init__(self) -> None:
        self._cupy = _cupy()
        self.number = int(self._cupy.cuda.Device().id)

    def is_own(self, x: Any) -> bool:
        """Say whether x is an array of this device."""
        return isinstance(x, self._cupy.ndarray) and int(x.device.id) == self.number

    def asarray(self, x: Any) -> Array:
        """Copy x to the device."""
        return self._cupy.asarray(x)

    def asnumpy(self, x: Array) -> HostArray:
        """Copy x to the host."""
        found: HostArray = self._cupy.asnumpy(x)
        return found

    def synchronize(self) -> None:
        """Wait for the current stream."""
        self._cupy.cuda.get_current_stream().synchronize()

    def empty(self, shape: Size, dtype: Any) -> Array:
        """Return a new array that holds anything."""
        return self._make("empty", shape, dtype)

    def zeros(self, shape: Size, dtype: Any) -> Array:
        """Return a new array of zeros."""
        return self._make("zeros", shape, dtype)

    def _make(self, name: str, shape: Size, dtype: Any) -> Array:
        try:
            return getattr(self._cupy, name)(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise UnsupportedError(
                f"cupy: the device must have room for an array of shape {shape} and dtype "
                f"{np.dtype(dtype)}, got: {error}. Use fewer tokens at once."
            ) from error

    def contiguous(self, x: Array) -> Array:
        """Return x, or a copy of it in C order."""
        return self._cupy.ascontiguousarray(x)

    def is_contiguous(self, x: Array) -> bool:
        """Say whether a kernel may write to x as it lies in memory."""
        return bool(x.flags.c_contiguous)

    def is_aligned(self, x: Array, step: int) -> bool:
        """Say whether x begins at a multiple of so many bytes."""
        return int(x.data.ptr) % step == 0

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        threads: int,
        args: Sequence[Any],
        shared_mem: int = 0,
    ) -> None:
        """Start a kernel on the current stream."""
        try:
            function = self._function(kernel)
            if shared_mem > _STATIC_SHARED:
                function.max_dynamic_shared_size_bytes = shared_mem
            function(grid, (threads,), tuple(map(_argument, args)), shared_mem=shared_mem)
        except (
            self._cupy.cuda.driver.CUDADriverError,
            self._cupy.cuda.runtime.CUDARuntimeError,
            self._cupy.cuda.compiler.CompileException,
        ) as error:
            raise LaunchError(
                f"cupy: CUDA failed in {kernel}, grid {grid}, {threads} threads, {shared_mem} "
                f"bytes of shared memory: {error}"
            ) from error

    def _function(self, kernel: Kernel) -> Any:
        return _compile(self._cupy, kernel)


@lru_cache(maxsize=512)
def _compile(cupy: Any, kernel: Kernel) -> Any:
    """Return the kernel, which CuPy compiles once for each device and keeps on disk."""
    module = cupy.RawModule(code=read_source(kernel.file), options=tuple(compiler_options(kernel)))
    return module.get_function(kernel.entry)


def _argument(arg: Any) -> Any:
    """Return an argument as CuPy takes it."""
    if isinstance(arg, Out | InOut):
        return arg.array
    return np.uintp(0) if arg is None else arg
