"""Arrays of CuPy, launches of Numba."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from npmoe._typing import Array
from npmoe.backends import Availability
from npmoe.errors import BackendUnavailableError

from ..cupy_raw.cupy_device import CupyDevice, LaunchError, cupy_availability
from ..device.kernel import Kernel
from .compiling import (
    absent,
    find_function,
    fit_array,
    launch_bounds,
    numba_cuda,
    parameter_types,
    require_numba_cuda,
    unwrap,
)


def numba_availability() -> Availability:
    """Say whether numba-cuda, CuPy, a driver and a device of a known architecture are there."""
    try:
        require_numba_cuda()
    except BackendUnavailableError as error:
        return Availability(False, str(error))
    return cupy_availability()


class NumbaCudaDevice(CupyDevice):
    """CuPy's memory and current stream; kernels are Numba's.

    Whatever has ``__cuda_array_interface__`` (Numba's device arrays, PyTorch's tensors) becomes one
    of its arrays by `asarray`, in place; its arrays have the interface too.
    """

    label = "numba_cuda"

    def __init__(self) -> None:
        require_numba_cuda()
        super().__init__()
        self._empty: dict[Any, Array] = {}

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        threads: int,
        args: Sequence[Any],
        shared_mem: int = 0,
    ) -> None:
        """Start a kernel on CuPy's current stream."""
        cuda, types = numba_cuda(), parameter_types(kernel)
        try:
            stream = cuda.external_stream(self._cupy.cuda.get_current_stream().ptr)
            words = [self._argument(unwrap(a), t) for a, t in zip(args, types, strict=True)]
            _dispatcher(kernel)[grid, threads, stream, shared_mem](*words)
        except (cuda.cudadrv.driver.CudaAPIError, cuda.CudaSupportError) as error:
            raise LaunchError(
                f"{self.label}: CUDA failed in {kernel}, grid {grid}, {threads} threads, "
                f"{shared_mem} bytes of shared memory: {error}"
            ) from error

    def _argument(self, arg: Any, wanted: Any) -> Any:
        """Return an argument as Numba takes it; arrays without waiting for their stream."""
        if not hasattr(wanted, "ndim"):
            return arg
        if arg is None:
            key = absent(wanted)
            if key not in self._empty:
                self._empty[key] = self.empty(*key)
            arg = self._empty[key]
        return numba_cuda().as_cuda_array(fit_array(arg, wanted), sync=False)


@lru_cache(maxsize=512)
def _dispatcher(kernel: Kernel) -> Any:
    """Return the kernel, which Numba compiles for the current device."""
    cuda, function = numba_cuda(), find_function(kernel)
    signature = cuda.types.void(*parameter_types(kernel))
    return cuda.jit(signature, launch_bounds=launch_bounds(function))(function)
