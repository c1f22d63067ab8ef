"""The backend "cupy": CUDA C++ kernels on CuPy's arrays."""

from __future__ import annotations

from typing import ClassVar, Literal

from npmoe.backends import Availability
from npmoe.errors import RangeError

from ..device.backend import DeviceBackend
from ..device.kernel import Device
from ..device.tilings import SIMT, tensor_cores
from .cupy_device import CupyDevice, cupy_availability

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
TILINGS = {"float32": SIMT} | {name: tensor_cores(name) for name in ("tf32", "bfloat16", "float16")}


class CupyBackend(DeviceBackend):
    """CUDA C++ kernels, compiled by NVRTC for the device that is there.

    Parameters
    ----------
    precision : {"float32", "tf32", "bfloat16", "float16"}
        What rows and matrices are rounded to where they enter a product of the experts. "float32"
        rounds nothing and uses ordinary cores; the others use tensor cores. Sums are float32, and
        activations, outputs and gradients are stored as float32 whatever this is. float64 is
        never rounded.
    launcher : Device, optional
        Where kernels run; default: CuPy's current device.
    """

    name: ClassVar[str] = "cupy"

    def __init__(self, precision: Precision = "float32", launcher: Device | None = None) -> None:
        if precision not in TILINGS:
            raise RangeError(
                f"get_backend: precision must be one of {', '.join(TILINGS)}, got {precision!r}."
            )
        self.precision = precision
        super().__init__(CupyDevice() if launcher is None else launcher, TILINGS[precision])

    @classmethod
    def availability(cls) -> Availability:
        """Say whether CuPy, a driver and a device are there."""
        return cupy_availability()

    @classmethod
    def emulated(cls) -> type[CupyBackend]:
        """Return the class that runs the same kernels from their PTX."""
        from .emulated import EmulatedCupyBackend  # noqa: PLC0415  # which is one of these

        return EmulatedCupyBackend
