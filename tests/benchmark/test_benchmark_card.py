"""Backends on a device: what is moved, waited for, compared, measured and refused."""

from __future__ import annotations

import dataclasses
import sys
import time
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from bench_fakes import SMALL, Clock, ClockedCard, FakePeer, KnownLimits, settings

from accel.loopback import LoopbackArray
from npmoe import get_backend
from npmoe.backends import ReferenceBackend, get_emulated_backend
from npmoe.benchmark import legend_text, machine_text, memory, run_benchmark, table_text
from npmoe.benchmark import run as run_module
from npmoe.benchmark.agreement import agreement_bound, compare, fingerprint_gradients
from npmoe.benchmark.card import Card, card_of
from npmoe.benchmark.card_limits import CardLimits
from npmoe.benchmark.cases import Load, parse_case
from npmoe.benchmark.implementations import GradientArrays, build_backend
from npmoe.benchmark.inputs import make_inputs
from npmoe.benchmark.machine import describe_machine
from npmoe.errors import BackendUnavailableError, RangeError, UnsupportedError
from npmoe.testing import Report

pytest.importorskip("threadpoolctl")


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """Find every backend green."""

    def check(backend, *, name, **_):
        return Report(target=name, kind="backend", results=[], failures=[])

    monkeypatch.setattr(run_module, "check_backend", check)


def bench(chosen, backends, peers=(), clock=None, **options):
    return run_benchmark(chosen, backends, peers, limits=KnownLimits(), clock=clock, **options)


class FakeArray:
    """An array without a namespace, as CuPy's are."""

    def __init__(self, host):
        self.host = np.array(host)
        self.shape, self.dtype, self.size = self.host.shape, self.host.dtype, self.host.size

    def __matmul__(self, other):
        return FakeArray(self.host @ other.host)

    def __setitem__(self, key, value):
        self.host[key] = value.host


class FakeCupy(ModuleType):
    """As much of CuPy as a `Card` asks for."""

    __version__ = "14.2.0"

    def __init__(self):
        super().__init__("cupy")
        self.calls, self.held, self.kept = [], 1000, 0
        runtime = SimpleNamespace(
            getDeviceProperties=lambda number: {"name": b"NVIDIA H100 80GB HBM3"},
            runtimeGetVersion=lambda: 13010,
            memGetInfo=lambda: (500, 2000),
        )
        device = SimpleNamespace(
            id=0, compute_capability="90", synchronize=lambda: self.calls.append("wait")
        )
        self.cuda = SimpleNamespace(runtime=runtime, Device=lambda: device)
        self.pool = SimpleNamespace(
            free_bytes=lambda: 70,
            total_bytes=lambda: self.held,
            free_all_blocks=lambda: self.calls.append("free"),
        )
        self.types = SimpleNamespace(
            COMPUTE_TYPE_DEFAULT=1, COMPUTE_TYPE_TF32=2, now=7,
            get_compute_type=lambda dtype: self.types.now, set_compute_type=self._set,
        )  # fmt: skip

    def get_default_memory_pool(self):
        return self.pool

    def asarray(self, x):
        return FakeArray(x)

    def _set(self, dtype, kind):
        assert dtype == np.float32
        self.calls.append(f"type {kind}")
        self.types.now = kind


class FakeCupyBackend(ReferenceBackend):
    name, host_arrays = "fake", False

    def asarray(self, x):
        return FakeArray(x)


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cupy._core._routines_linalg", fake.types)
    return fake


# --- the run


def test_a_device_is_timed_there():
    clock = Clock()
    card = ClockedCard(clock)
    result = bench(settings(), [card], [FakePeer("peer", clock, 2.0)], clock)
    assert result.complete
    forward, step = result.cases
    for found in (forward, step):
        ours, peer = found.timings
        # The hundred seconds of the first call are in none of them.
        assert ours.seconds.values == (1.0, 1.0, 1.0)
        assert peer.ratio_to_best_peer == 1.0
        assert ours.agreement.difference <= ours.agreement.bound
        assert ours.memory.arrays is None
        assert ours.memory.resident is None
    assert forward.timings[0].ratio_to_best_peer == 2.0
    # Two arrays of the router's and experts' each, tokens, gradient: once, and one of the limits'.
    assert card.log.count("asarray") == 3 + 2 + 1
    device = result.machine.device
    assert device.name == "the device of card"
    assert device.limits == "known"
    assert device.memory.startswith("not measured: ")
    assert result.to_dict()["machine"]["device"]["name"] == device.name
    assert machine_text(result.machine).startswith("the device of card\n")
    assert "limits: known.\n" in legend_text(result.machine)
    assert "\n  card " in table_text(forward, result.settings)


def test_every_call_waits_at_its_end():
    clock = Clock()
    card = ClockedCard(clock)
    one = build_backend(card, make_inputs(SMALL, "float32"), GradientArrays(), Card(card))
    for call in (one.forward, one.step):
        card.log.clear()
        call()
        assert card.log.index("plan") < card.log.index("synchronize") == len(card.log) - 1


def test_hosts_have_no_device():
    assert card_of([get_backend("numpy")]) is None
    assert describe_machine(1).device is None
    assert "cupy-cuda13x" not in describe_machine(1).packages


def test_hosts_and_devices_are_not_mixed():
    with pytest.raises(UnsupportedError, match=(
        r"^bench: backends must all work on host arrays, or all on a device, got numpy beside "
        r"loopback\. Each place has limits and peers of its own; run it once for each\.$"
    )):  # fmt: skip
        bench(settings(), [get_backend("loopback"), get_backend("numpy")])


def test_two_devices_have_gradient_arrays_of_their_own():
    clock = Clock()
    other = ClockedCard(clock)
    other.name = "other"
    result = bench(settings(rounds=1), [ClockedCard(clock), other], clock=clock)
    assert result.complete
    assert [t.name for t in result.cases[1].timings] == ["card", "other"]


def test_wrong_results_of_a_device_are_not_timed():
    class Wrong(ClockedCard):
        def combine_rows(self, *args, **options):
            return super().combine_rows(*args, **options) * 1.01

    clock = Clock()
    result = bench(settings(), [Wrong(clock)], clock=clock)
    assert result.cases == ()
    assert "its output differs from the numpy backend's by 1.0e-02" in result.omissions[0].reason


def test_gradients_that_a_device_does_not_write_are_found():
    class Lazy(ClockedCard):
        """Says that it wrote to the arrays it was given."""

        def grouped_gemm_wgrad(self, x, grad_y, plan, *, out=None, accumulate=False):
            fresh = super().grouped_gemm_wgrad(x, grad_y, plan)
            return fresh if out is None else out

    clock = Clock()
    card = Lazy(clock)
    inputs = make_inputs(SMALL, "float32")
    gradients = GradientArrays()
    one = build_backend(card, inputs, gradients, Card(card))
    one.step()
    gradients.poison()
    host = card.asnumpy(one.step().down_proj)
    assert np.isnan(host).all()


def test_operands_must_be_those_of_the_settings():
    clock = Clock()
    with pytest.raises(RangeError, match=(
        r"^run_benchmark: settings\.precision must be what products round to, got None with "
        r"backend 'card', whose products round to bfloat16\. Limits, peers"
    )):  # fmt: skip
        bench(settings(), [ClockedCard(clock, "bfloat16")], clock=clock)
    chosen = settings(precision="float32", rounds=1, directions=("forward",))
    assert chosen.operands is None
    assert bench(chosen, [ClockedCard(clock)], clock=clock).complete
    half = dataclasses.replace(chosen, precision="bfloat16")
    result = bench(half, [ClockedCard(clock, "bfloat16")], clock=clock)
    assert "float32, products in bfloat16; " in table_text(result.cases[0], half)


def test_the_emulated_backend_goes_through_all_of_it():
    try:
        backend = get_emulated_backend("cupy")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    chosen = settings(cases=(parse_case("3,16,8,2,1"),), rounds=1, directions=("forward",))
    result = bench(chosen, [backend], clock=time.perf_counter)
    assert result.complete
    assert result.cases[0].timings[0].agreement.ok
    assert backend.emulator.findings == []


# --- agreement with rounded operands


class Rounding(ReferenceBackend):
    """Rounds what enters a product of the experts, as tensor cores do."""

    name, operands = "rounding", "bfloat16"

    def grouped_gemm(self, x, weight, plan, **options):
        return ReferenceBackend.grouped_gemm(_rounded(x), _rounded(weight), plan, **options)

    def grouped_gemm_wgrad(self, x, grad_y, plan, **options):
        return ReferenceBackend.grouped_gemm_wgrad(_rounded(x), _rounded(grad_y), plan, **options)


def _rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("sizes", ["40,64,96,4,2", "64,512,256,4,2"])
def test_the_bound_of_rounded_operands_is_above_rounding_and_below_a_mistake(sizes):
    case = parse_case(sizes)
    inputs = make_inputs(case, "float32", operands="bfloat16")
    found, expected = (
        fingerprint_gradients(build_backend(backend, inputs, GradientArrays()).step())
        for backend in (Rounding(), get_backend("numpy"))
    )
    load = Load(num_rows=case.num_tokens * case.top_k, used_experts=4, largest=case.num_tokens)
    bound = agreement_bound(case, load, "forward+backward", "float32", "bfloat16")
    difference = compare(found, expected, bound).difference
    assert agreement_bound(case, load, "forward+backward", "float32") < difference < bound / 3
    assert bound < 0.1
    assert agreement_bound(case, load, "forward", "float32", "float16") < bound / 8


# --- the card


def test_a_card_of_cupys(cupy):
    card = Card(FakeCupyBackend())
    assert card.name == "NVIDIA H100 80GB HBM3, compute capability 9.0, CUDA 13.1, CuPy 14.2.0"
    assert "CuPy's memory pool" in card.memory_text
    assert card.free_bytes() == 570

    def call():
        cupy.held += 123
        cupy.calls.append("call")

    assert card.peak(call) == 123
    assert cupy.calls == ["wait", "free", "call", "wait"]


def test_a_card_that_is_not_cupys():
    card = Card(get_backend("loopback"))
    assert card.free_bytes() is None
    assert card.peak(lambda: 1 / 0) is None
    assert isinstance(card.asarray(np.zeros(2)), LoopbackArray)
    with card.products(tf32=True):
        pass


def test_without_cupy_arrays_need_a_namespace(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match=(
        r"^bench: the limits of a device must be measured with CuPy, which cannot be imported .*"
        r"Backend 'fake' has no matrix products of its own .*Run: pip install"
    )):  # fmt: skip
        Card(FakeCupyBackend())


def test_float32_products_are_measured_without_tf32(cupy):
    limits = CardLimits(Card(FakeCupyBackend()), "float32", None, gemm_size=4, copy_bytes=16)
    assert [call for call in cupy.calls if call != "wait"] == ["type 1", "type 7"]
    assert limits.text().startswith("product of 4 in float32 with TF32 off, best of 3; copy of ")
    cupy.calls.clear()
    limits = CardLimits(Card(FakeCupyBackend()), "float32", "tf32", gemm_size=4, copy_bytes=16)
    assert [call for call in cupy.calls if call != "wait"] == ["type 2", "type 7"]
    assert "product of 4 in float32 with TF32, best" in limits.text()
    assert np.array_equal(limits._to.host, limits._from.host)


def test_half_products_are_measured_in_float16():
    card = Card(get_backend("loopback"))
    for operands, words in (
        ("bfloat16", "product of 4 in float16, whose rate is bfloat16's, best"),
        ("float16", "product of 4 in float16, best"),
    ):
        limits = CardLimits(card, "float32", operands, gemm_size=4, copy_bytes=16)
        assert limits._a.dtype == np.float16
        assert words in limits.text()
    limits = CardLimits(card, "float64", None, gemm_size=4, copy_bytes=16)
    assert limits._a.dtype == np.float64
    assert "product of 4 in float64, best" in limits.text()


def test_limits_of_a_card_count_flops_and_bytes_of_the_best_call():
    clock = Clock()
    card = Card(get_backend("loopback"))
    limits = CardLimits(card, "float32", None, clock=clock, gemm_size=8, copy_bytes=4000)
    products, copies = iter([4.0, 2.0, 3.0]), iter([5.0, *[8.0] * 7])
    limits._multiply = lambda: clock.advance(next(products))
    limits._copy_all = lambda: clock.advance(next(copies))
    limits.measure()
    flops, moved = limits.take()
    assert flops.values == (2 * 8**3 / 2.0,)
    assert moved.values == (2 * 4000 / 5.0,)


def test_a_case_that_does_not_fit_on_the_card(cupy):
    """One copy of the weights for each backend, and one for all peers."""
    card = Card(FakeCupyBackend())
    chosen = settings(cases=(parse_case("1,1000,1000,1000,1"),), directions=("forward",))
    cupy.cuda.runtime.memGetInfo = lambda: (int(24.1e9), 0)
    memory.check_fits_card(chosen, card, num_backends=2, with_peers=False)
    memory.check_fits_card(chosen, card, num_backends=1, with_peers=True)
    with pytest.raises(RangeError, match=(
        r"^bench: case must fit into memory of NVIDIA H100.*, got 'T1-.*' which needs about "
        r"36\.0 GB\. 24\.1 GB are free\."
    ).replace("' which", "', which")):  # fmt: skip
        memory.check_fits_card(chosen, card, num_backends=2, with_peers=True)
