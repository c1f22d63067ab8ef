"""CupyDevice on a fake runtime: launches are those that the PTX checker saw; errors are clear."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compile_gates import RecordingDevice
from fake_cupy import (
    CompileException,
    CUDADriverError,
    CUDARuntimeError,
    FakeArray,
    FakeCupy,
)

import npmoe
from accel.cupy_raw import CupyBackend
from accel.cupy_raw.cupy_device import CupyDevice, LaunchError, cupy_availability
from accel.device import core
from accel.device.kernel import InOut, Kernel, Out
from accel.device.products import cast
from accel.device.source import read_source
from npmoe.errors import (
    BackendUnavailableError,
    DTypeError,
    NpmoeError,
    PlanError,
    RangeError,
    UnsupportedError,
)

CFG = npmoe.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, expert_bias=True)
Fake = Callable[..., FakeCupy]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    def install(**options: Any) -> FakeCupy:
        cupy = FakeCupy(**options)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return cupy

    return install


def run_experts(device: Any, precision: str) -> None:
    """Route, plan, and run the experts forward and backward: the host code of the backend."""
    backend = CupyBackend(precision, launcher=device)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    shapes = npmoe.init_params(CFG)
    T, K = 40, CFG.top_k
    params = npmoe.tree.map_arrays(lambda _, x: device.asarray(x), shapes)
    x = device.asarray(rng.standard_normal((T, 16)).astype(np.float32))
    logits = device.asarray(rng.standard_normal((T, 4)).astype(np.float32))
    backend.route(logits, CFG)
    ids = device.asarray(rng.integers(0, 4, (T, K)).astype(np.int32))
    weights = device.asarray(np.ones((T, K), np.float32))
    plan = backend.plan_dispatch(ids, num_experts=4)
    _, gate_up = core.experts_forward(
        device, backend.tiling, x, params, plan, weights, CFG, save=True
    )
    core.experts_backward(
        device, backend.tiling, x, x, gate_up, params, plan, weights, CFG, None, False
    )


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_a_device_gets_what_the_checker_gets(precision: str, fake: Fake) -> None:
    cupy, recorded = fake(), RecordingDevice()
    run_experts(recorded, precision)
    run_experts(CupyDevice(), precision)
    assert len(cupy.launched) == len(recorded.asked) > 12
    for mine, theirs in zip(cupy.launched, recorded.asked, strict=True):
        assert mine.name == theirs.kernel.entry
        assert {f"-D{n}={v}" for n, v in theirs.kernel.options} <= set(mine.options)
        assert (mine.grid, mine.block) == (theirs.grid, (theirs.threads,))
        assert mine.shared_mem == theirs.shared_mem
        assert mine.allowed >= mine.shared_mem
        assert len(mine.args) == len(theirs.args)
        for arg, given in zip(mine.args, theirs.args, strict=True):
            other = given.array if isinstance(given, Out | InOut) else given
            if other is None:  # a null pointer, 8 bytes wide
                assert isinstance(arg, np.uintp), arg
                assert arg == 0
            elif isinstance(other, np.generic):
                assert type(arg) is type(other), (mine.name, arg, other)
                assert arg == other
            else:
                assert isinstance(arg, FakeArray)
                assert (arg.shape, arg.dtype) == (other.shape, other.dtype)
    assert any(arg is not None and type(arg) is np.uintp for m in cupy.launched for arg in m.args)
    large = [m for m in cupy.launched if m.shared_mem > 48 * 1024]
    assert bool(large) == (precision != "float32")
    assert all(m.allowed == m.shared_mem for m in large)


def test_modules_are_compiled_once_and_without_includes(fake: Fake) -> None:
    cupy = fake()
    device = CupyDevice()
    kernel = Kernel("plan", "scan_blocks")
    for _ in range(3):
        device.launch(kernel, (1,), 32, [None])
    assert len(cupy.compiled) == 1
    code, options = cupy.compiled[0]
    assert code == read_source("plan")
    assert "#include" not in code
    assert "--std=c++17" in options


def test_a_failure_inside_a_launch_names_kernel_and_configuration(fake: Fake) -> None:
    for failure in (
        CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access"),
        CUDADriverError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources"),
        CompileException("nvrtc: error: invalid value for --gpu-architecture"),
    ):
        fake(failure=failure)
        with pytest.raises(LaunchError) as caught:
            CupyDevice().launch(
                Kernel("rows", "cast", (("REAL", "float"),)), (3, 2), 256, [], shared_mem=50000
            )
        text = str(caught.value)
        assert "CUDA failed in cast of rows (REAL=float), grid (3, 2), 256 threads" in text
        assert "50000 bytes of shared memory" in text
        assert str(failure) in text
        assert isinstance(caught.value, NpmoeError)


def test_other_errors_are_not_swallowed(fake: Fake) -> None:
    fake(failure=ZeroDivisionError("mine"))
    with pytest.raises(ZeroDivisionError):
        CupyDevice().launch(Kernel("rows", "cast"), (1,), 32, [])


def test_too_little_device_memory(fake: Fake) -> None:
    fake(room=1000)
    device = CupyDevice()
    device.empty((10, 10), np.float32)
    for make in (device.empty, device.zeros):
        with pytest.raises(UnsupportedError, match=r"must have room for an array of shape \(99, 9\)"
                           r".*float32.*Use fewer tokens"):  # fmt: skip
            make((99, 9), np.float32)
    with pytest.raises(UnsupportedError, match="must have room"):
        cast(device, FakeArray(np.zeros(4000, np.float32)), "float16")


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cupy":
            raise ImportError("No module named 'cupy'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    found = cupy_availability()
    assert not found.ok
    assert "pip install 'npmoe[cuda13]'" in str(found.reason)
    with pytest.raises(BackendUnavailableError, match="cupy is not installed"):
        CupyDevice()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"driver": CUDARuntimeError("cudaErrorInsufficientDriver")}, "cudaErrorInsufficientDrive"),
        ({"count": 0}, "there is no CUDA device"),
        ({"capability": "75"}, "compute capability 7.5, 8.0 is needed"),
    ],
)
def test_why_it_is_not_available(options: dict[str, Any], reason: str, fake: Fake) -> None:
    fake(**options)
    found = cupy_availability()
    assert not found.ok
    assert reason in str(found.reason)


@pytest.mark.parametrize("capability", ["80", "90", "103", "120"])
def test_it_is_available(capability: str, fake: Fake) -> None:
    fake(capability=capability)
    assert cupy_availability().ok


def test_arrays_of_the_host_and_of_another_device(fake: Fake) -> None:
    fake()
    backend = CupyBackend()
    host, foreign = np.ones((3, 4), np.float32), FakeArray(np.ones((3, 4), np.float32), 1)
    for x in (host, foreign):
        for call in (
            lambda x=x: backend.gather_rows(x, None),
            lambda x=x: backend.route(x, CFG),
            lambda x=x: backend.plan_dispatch(x, num_experts=4),
        ):
            with pytest.raises(DTypeError, match=r"must be on the device.*backend\.asarray\(x\)"):
                call()
    assert backend.device.is_own(FakeArray(host, 0))


def test_dtypes_and_sizes_that_no_kernel_takes(fake: Fake) -> None:
    fake()
    backend = CupyBackend()
    half = FakeArray(np.ones((3, 4), np.float16))
    with pytest.raises(UnsupportedError, match="x must have dtype float32 or float64, got float16"):
        backend.gather_rows(half, None)
    with pytest.raises(UnsupportedError, match="num_experts must be at most 12288 on a GPU"):
        backend.plan_dispatch(FakeArray(np.zeros((3, 2), np.int32)), num_experts=12289)
    backend.plan_dispatch(FakeArray(np.zeros((3, 2), np.int32)), num_experts=12288)
    with pytest.raises(RangeError, match="precision must be one of float32"):
        CupyBackend("float8")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["asnumpy", "synchronize"])
@pytest.mark.parametrize(
    ("place", "error", "message"),
    [(0, PlanError, r"topk_ids must lie in -1..num_experts-1"),
     (1, RangeError, "router_logits must have a finite largest value")],
)  # fmt: skip
def test_what_was_noted_is_raised_later_and_once(
    place: int, error: Any, message: str, how: str, fake: Fake
) -> None:
    fake()
    backend = CupyBackend()
    x = backend.asarray(np.zeros(3))
    wait = (lambda: backend.asnumpy(x)) if how == "asnumpy" else backend.synchronize
    wait()
    backend._noted.host[place] = 1
    with pytest.raises(error, match=message):
        wait()
    wait()
