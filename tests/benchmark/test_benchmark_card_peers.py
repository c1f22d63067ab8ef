"""Peers on a CUDA device: what they say is missing, and, where torch is, what they compute."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from bench_fakes import SMALL, Clock, ClockedCard, KnownLimits, settings

from npmoe.backends import Availability
from npmoe.benchmark import run as run_module
from npmoe.benchmark import run_benchmark
from npmoe.benchmark.card_peers import CARD_PEERS, CudaPeer, GroupedMmExperts, TritonExperts
from npmoe.benchmark.inputs import make_inputs
from npmoe.testing import Report

pytest.importorskip("threadpoolctl")


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """Find every backend green."""

    def check(backend, *, name, **_):
        return Report(target=name, kind="backend", results=[], failures=[])

    monkeypatch.setattr(run_module, "check_backend", check)


def bench(chosen, backends, peers, clock, **options):
    return run_benchmark(chosen, backends, peers, limits=KnownLimits(), clock=clock, **options)


def test_peers_say_what_is_missing(monkeypatch):
    assert [peer.name for peer in CARD_PEERS] == ["torch-grouped_mm", "triton-fused_moe"]
    monkeypatch.setitem(sys.modules, "torch", None)
    for peer in CARD_PEERS:
        assert peer.availability().reason.startswith("needs torch (")
    blind = ModuleType("torch")
    blind.cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", blind)
    for peer in CARD_PEERS:
        assert peer.availability() == Availability(False, "needs a torch that sees a CUDA device")
    blind.cuda.is_available = lambda: True
    for name in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)
    reason = TritonExperts().availability().reason
    assert reason.startswith("needs vllm or sglang, which are not installed (")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert GroupedMmExperts().availability().reason.startswith("needs torch and transformers (")


def fake_vllm(monkeypatch, function):
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("vllm.model_executor.layers.fused_moe")
    module.fused_experts = function
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_an_unknown_fused_experts_is_not_called(monkeypatch):
    def fused_experts(hidden_states, w1, w2, topk_output):
        raise AssertionError

    fake_vllm(monkeypatch, fused_experts)
    found = TritonExperts("cpu").find_experts()
    assert not found.ok
    assert found.reason.endswith(".fused_experts has no topk_ids, topk_weights")


def test_what_a_peer_cannot_run_is_skipped_unless_it_was_named():
    class Refusing(CudaPeer):
        name = "refusing"

        def make_experts(self, inputs, weights):
            raise RuntimeError("Expected mat_a to be BFloat16\nand much more")

    pytest.importorskip("torch")
    clock, peer = Clock(), Refusing("cpu")
    peer.availability = lambda: Availability(True)
    chosen = settings(directions=("forward",), rounds=1)
    result = bench(chosen, [ClockedCard(clock)], [peer], clock)
    assert result.complete
    assert result.omissions[0].reason == (
        "refusing: it cannot run this case, and says: Expected mat_a to be BFloat16."
    )
    named = frozenset(["refusing"])
    assert not bench(chosen, [ClockedCard(clock)], [peer], clock, asked_peers=named).complete


@pytest.mark.parametrize("operands", [None, "bfloat16", "float16"])
def test_peers_agree_with_numpy_where_torch_is(monkeypatch, operands):
    """Both on torch's CPU: the Triton one with a function of its name that loops over experts."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")

    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
        assert topk_ids.dtype == torch.int32
        rows = torch.einsum("th,tkih->tki", hidden_states, w1[topk_ids.long()])
        gate, up = rows.chunk(2, dim=-1)
        rows = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up,
                            w2[topk_ids.long()])  # fmt: skip
        return (rows * topk_weights.to(rows.dtype)[..., None]).sum(dim=1)

    fake_vllm(monkeypatch, fused_experts)
    chosen = settings(rounds=1, precision=operands)
    result = bench(
        chosen, [ClockedCard(Clock(), operands)], [GroupedMmExperts("cpu"), TritonExperts("cpu")],
        time.perf_counter,
    )  # fmt: skip
    assert [[t.name for t in found.timings] for found in result.cases] == [
        ["card", "torch-grouped_mm", "triton-fused_moe"],
        ["card", "torch-grouped_mm"],
    ]
    assert [o.reason for o in result.omissions] == ["it has no backward"]
    for found in result.cases:
        for timing in found.timings[1:]:
            assert 0 < timing.agreement.difference < timing.agreement.bound / 2


def test_peers_have_no_float64():
    pytest.importorskip("torch")
    one = GroupedMmExperts("cpu").build(make_inputs(SMALL, "float64"))
    assert set(one.not_timed.values()) == {"it has no float64"}
    assert set(one.not_timed) == {"forward", "forward+backward"}
