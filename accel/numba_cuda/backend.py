"""The backend "numba_cuda": kernels in numba.cuda's Python."""

from __future__ import annotations

from typing import ClassVar

from npmoe.backends import Availability

from ..device.backend import DeviceBackend
from ..device.kernel import Device
from ..device.tilings import SIMT
from .numba_device import NumbaCudaDevice, numba_availability


class NumbaCudaBackend(DeviceBackend):
    """Kernels in Python, compiled by Numba for the device that is there.

    Arrays are CuPy's; `asarray` takes whatever else lies on the device (Numba's, PyTorch's) without
    a copy.

    Parameters
    ----------
    launcher : Device, optional
        Where kernels run; default: CuPy's current device.
    """

    name: ClassVar[str] = "numba_cuda"

    def __init__(self, launcher: Device | None = None) -> None:
        super().__init__(NumbaCudaDevice() if launcher is None else launcher, SIMT)

    @classmethod
    def availability(cls) -> Availability:
        """Say whether numba-cuda, CuPy, a driver and a device are there."""
        return numba_availability()

    @classmethod
    def emulated(cls) -> type[NumbaCudaBackend]:
        """Return the class that runs the same kernels from their PTX."""
        from .emulated import EmulatedNumbaCudaBackend  # noqa: PLC0415  # which is one of these

        return EmulatedNumbaCudaBackend
