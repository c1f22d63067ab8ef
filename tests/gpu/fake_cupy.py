"""A `cupy` that is not there: arrays of NumPy, launches noted; errors on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np


class CUDARuntimeError(RuntimeError):
    """What the runtime says."""


class CUDADriverError(RuntimeError):
    """What the driver says."""


class CompileException(Exception):
    """What NVRTC says."""


class OutOfMemoryError(MemoryError):
    """No room."""


class FakeArray:
    """An array of one device."""

    def __init__(self, host: np.ndarray, device: int = 0) -> None:
        self.host, self.device = host, SimpleNamespace(id=device)
        self.data = SimpleNamespace(ptr=host.ctypes.data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)

    def __getitem__(self, key: Any) -> FakeArray:
        return FakeArray(np.asarray(self.host[key]), self.device.id)


@dataclass
class Function:
    """A kernel, which notes its launches."""

    cupy: FakeCupy
    name: str
    options: tuple[str, ...]
    max_dynamic_shared_size_bytes: int = 48 * 1024
    launches: list[Any] = field(default_factory=list)

    def __call__(self, grid: Any, block: Any, args: Sequence[Any], *, shared_mem: int = 0) -> None:
        if self.cupy.failure is not None:
            raise self.cupy.failure
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        note = SimpleNamespace(
            name=self.name, options=self.options, grid=grid, block=block, args=args,
            shared_mem=shared_mem, allowed=self.max_dynamic_shared_size_bytes,
        )  # fmt: skip
        self.cupy.launched.append(note)


@dataclass(eq=False)
class FakeCupy:
    """The part of CuPy that `CupyDevice` uses."""

    capability: str = "90"
    count: int = 1
    current: int = 0
    room: int | None = None  # bytes of the largest array
    failure: Exception | None = None  # of the next launches
    driver: Exception | None = None
    launched: list[Any] = field(default_factory=list)
    compiled: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    waited: int = 0
    ndarray: type = FakeArray
    __name__: str = "cupy"

    def __post_init__(self) -> None:
        def count() -> int:
            if self.driver is not None:
                raise self.driver
            return self.count

        def wait() -> None:
            self.waited += 1

        stream = SimpleNamespace(synchronize=wait)
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=count),
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            compiler=SimpleNamespace(CompileException=CompileException),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            Device=lambda *_: SimpleNamespace(id=self.current, compute_capability=self.capability),
            get_current_stream=lambda: stream,
        )

    def RawModule(self, *, code: str, options: tuple[str, ...], **_: Any) -> Any:
        self.compiled.append((code, options))
        return SimpleNamespace(get_function=lambda name: Function(self, name, options))

    def asarray(self, x: Any) -> FakeArray:
        return x if isinstance(x, FakeArray) else FakeArray(np.array(x), self.current)

    def asnumpy(self, x: FakeArray) -> np.ndarray:
        return np.array(x.host)

    def empty(self, shape: Any, dtype: Any) -> FakeArray:
        return self.zeros(shape, dtype)

    def zeros(self, shape: Any, dtype: Any) -> FakeArray:
        host = np.zeros(shape, dtype)
        if self.room is not None and host.nbytes > self.room:
            raise OutOfMemoryError(f"Out of memory allocating {host.nbytes} bytes")
        return FakeArray(host, self.current)

    def ascontiguousarray(self, x: FakeArray) -> FakeArray:
        return FakeArray(np.ascontiguousarray(x.host), x.device.id)
