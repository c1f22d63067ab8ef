"""What goes wrong around the Python kernels is told in a sentence; the runtime is faked."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba_cuda_cases import need_numba_cuda

from accel.cupy_raw import cupy_device
from accel.cupy_raw.cupy_device import LaunchError
from accel.device.kernel import Kernel, Out
from accel.numba_cuda import EmulatedNumbaCudaBackend, NumbaCudaBackend, compiling, numba_device
from accel.numba_cuda.numba_device import NumbaCudaDevice
from npmoe import MoEConfig
from npmoe.errors import BackendUnavailableError, DTypeError, UnsupportedError

need_numba_cuda()

GATHER = Kernel("rows", "gather_rows", (("REAL", "float"),))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "numba-cuda":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(compiling.metadata, "version", version)
    for cls in (NumbaCudaBackend, EmulatedNumbaCudaBackend):
        found = cls.availability()
        assert not found.ok
        assert found.reason == (
            "the package numba-cuda is not installed. "
            "Install it with: pip install 'npmoe[cuda13]' (or [cuda12])"
        )
    with pytest.raises(BackendUnavailableError, match="the package numba-cuda is not installed"):
        compiling.compile_kernel(GATHER)


def test_cupy_is_needed_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "the package cupy is not installed" in NumbaCudaBackend.availability().reason
    with pytest.raises(BackendUnavailableError, match="the package cupy is not installed"):
        NumbaCudaBackend()


class FakeError(Exception):
    """CUDA's."""


def fake_cupy(count: Any = 1, version: str = "90") -> Any:
    def count_devices() -> int:
        if isinstance(count, Exception):
            raise count
        return int(count)

    return SimpleNamespace(
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(getDeviceCount=count_devices, CUDARuntimeError=FakeError),
            Device=lambda: SimpleNamespace(compute_capability=version, id=0),
            get_current_stream=lambda: SimpleNamespace(ptr=5),
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
        ),
        ndarray=np.ndarray,
        empty=np.empty,
        zeros=np.zeros,
    )


@pytest.mark.parametrize(
    ("cupy", "told"),
    [
        (fake_cupy(FakeError("driver too old")), "CUDA says: driver too old"),
        (fake_cupy(0), "there is no CUDA device"),
        (fake_cupy(version="75"), "has compute capability 7.5, 8.0 is needed"),
    ],
)
def test_driver_and_device(monkeypatch: pytest.MonkeyPatch, cupy: Any, told: str) -> None:
    monkeypatch.setattr(cupy_device, "_cupy", lambda: cupy)
    found = NumbaCudaBackend.availability()
    assert not found.ok
    assert told in found.reason


def test_availability_is_cheap() -> None:
    program = (
        "import sys; from accel.numba_cuda import NumbaCudaBackend as B; "
        "assert isinstance(B.availability().ok, bool); assert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> NumbaCudaDevice:
    from numba import cuda

    monkeypatch.setattr(cupy_device, "_cupy", fake_cupy)
    monkeypatch.setattr(cuda, "external_stream", lambda ptr: f"stream {ptr}")
    monkeypatch.setattr(cuda, "as_cuda_array", lambda x, sync: (x, sync))
    return NumbaCudaDevice()


class Launches:
    """A dispatcher that notes what it is called with."""

    def __init__(self, error: Exception | None = None) -> None:
        self.seen: list[Any] = []
        self.error = error

    def __getitem__(self, configuration: Any) -> Any:
        def call(*args: Any) -> None:
            if self.error is not None:
                raise self.error
            self.seen.append((configuration, args))

        return call


def test_a_launch_on_a_device(device: NumbaCudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(numba_device, "_dispatcher", lambda _: launches)
    combine = Kernel("rows", "combine_rows", (("REAL", "float"),))
    rows, row_ids, out = np.ones((4, 3), "f4"), np.zeros((2, 2), "i4"), np.empty((2, 3), "f4")
    args = [rows, row_ids, None, np.int32(3), np.int32(2), Out(out)]
    device.launch(combine, (2,), 128, args, 16)
    device.launch(combine, (2,), 128, args)
    (first, words), (second, again) = launches.seen
    assert first == ((2,), 128, "stream 5", 16)
    assert second == ((2,), 128, "stream 5", 0)
    assert words[0] == (rows, False)  # not waited for
    assert words[1][0].shape == (4,)
    assert np.shares_memory(words[1][0], row_ids)
    assert words[2][0].shape == (0,)
    assert words[2][0].dtype == np.float32
    assert again[2][0] is words[2][0]
    assert words[3:5] == (3, 2)
    assert words[5][0] is out


def test_halves_are_passed_as_bits() -> None:
    weight = np.ones((2, 3, 4), np.float16)
    options = {
        "REAL": "float", "WEIGHT": "half16", "EPILOGUE": 0, "GATED": 0, "GATHER": 0,
        "TRANSPOSED": 0, "BLOCK_M": 16,
    }  # fmt: skip
    product = Kernel("grouped_simt", "grouped_gemm", tuple(options.items()))
    passed = compiling.fit_array(weight, compiling.parameter_types(product)[1])
    assert passed.dtype == np.uint16
    assert np.shares_memory(passed, weight)


def test_a_failed_launch_names_kernel_and_configuration(
    device: NumbaCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba import cuda

    failure = cuda.cudadrv.driver.CudaAPIError(700, "an illegal address")
    monkeypatch.setattr(numba_device, "_dispatcher", lambda _: Launches(failure))
    x, ids, out = np.ones((2, 3), "f4"), np.zeros(4, "i4"), np.empty((4, 3), "f4")
    with pytest.raises(LaunchError) as caught:
        device.launch(GATHER, (4,), 128, [x, ids, np.int32(3), Out(out)], 8)
    assert str(caught.value) == (
        "numba_cuda: CUDA failed in gather_rows of rows (REAL=float), grid (4,), 128 threads, "
        "8 bytes of shared memory: [700] an illegal address"
    )


def test_host_arrays_are_refused() -> None:
    backend = EmulatedNumbaCudaBackend()
    cfg = MoEConfig(hidden_size=2, intermediate_size=2, num_experts=2, top_k=1)
    with pytest.raises(DTypeError, match=r"numba_cuda: arrays must be on the device, got numpy"):
        backend.route(np.zeros((3, 2), np.float32), cfg)


def test_dtypes_of_rows() -> None:
    backend = EmulatedNumbaCudaBackend()
    plan = backend.plan_dispatch(backend.asarray(np.zeros((2, 1), np.int32)), num_experts=1)
    with pytest.raises(
        UnsupportedError, match="numba_cuda: x must have dtype float32 or float64, got float16"
    ):
        backend.gather_rows(backend.asarray(np.zeros((2, 3), np.float16)), plan)


def test_too_many_experts() -> None:
    backend = EmulatedNumbaCudaBackend()
    ids = backend.asarray(np.zeros((2, 1), np.int32))
    with pytest.raises(UnsupportedError, match="num_experts must be at most 12288 on a GPU"):
        backend.plan_dispatch(ids, num_experts=20_000)
